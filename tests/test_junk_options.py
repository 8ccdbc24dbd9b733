"""Junk by the hundred for options and YAML files: a configuration, or one line and exit code 2, never a traceback."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from ace_cli.cli import job, prune
from ace_cli.core.errors import AceError
from ace_cli.evaluation import task_options
from ace_cli.run.config import CONFIGURATION_ERRORS, RunConfig, config_folder, explain, parse, store_schemas

#: Between them, every class of options that can be chosen.
CHOICES = [
    ("metric=ace", "allocation=owl", "repair=sparsegpt", "calib=text", "eval=text", "tracker=none"),
    ("metric=ria_varp", "allocation=dlp", "repair=admm", "calib=self", "eval=self", "tracker=none"),
    ("metric=varp", "allocation=alpha", "repair=swaps", "calib=c4", "eval=none", "tracker=none"),
    ("metric=cosp", "allocation=atp", "repair=none", "calib=wikitext2", "eval=c4", "tracker=none"),
]
SETTINGS = settings(deadline=None, derandomize=True, database=None, phases=[Phase.generate], report_multiple_bugs=False)


@functools.cache
def composed(choices: tuple[str, ...]) -> tuple[DictConfig, list[str]]:
    """A configuration, and the full names of all its options."""
    store_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder().absolute()), version_base="1.3"):
        config = compose("prune", ["model=custom", "model.path=org/name", *choices])

    def names(node: Any, prefix: str) -> list[str]:
        if not isinstance(node, DictConfig):
            return [prefix]
        inside = [name for key in node for name in names(node._get_node(key), f"{prefix}.{key}".lstrip("."))]
        return [prefix, *inside] if prefix else inside

    return config, names(config, "")


EDGES = st.sampled_from([
    0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"),
    "", " ", "0.5", "2:4", "1e-1000000000", "1/0", "50%", "~nobody-of-this-name/x", "null", "auto", "cuda:" + "9" * 30,
    "*", "x" * 5000, "/" + "y" * 300, "\0", "a\nb", "\ud800", "${x}", "${", "[", "è", "../..", None, True, [], {},
    [None], [[[]]], {"a": {"b": 1}},
])  # fmt: skip
JUNK = EDGES | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


def outcome(config: DictConfig) -> RunConfig | str:
    """What becomes of a configuration; anything but the errors that are printed in one line goes through."""
    try:
        return parse(config, Path(config.output_dir))
    except OSError as fault:
        return str(fault)
    except AceError as fault:
        return str(fault)
    except CONFIGURATION_ERRORS as fault:
        return str(explain(fault))


@settings(SETTINGS, max_examples=100)
@given(st.data())
def test_junk_in_options_is_a_configuration_or_one_line(data: st.DataObject) -> None:
    base, names = composed(data.draw(st.sampled_from(CHOICES)))
    config = copy.deepcopy(base)
    for _ in range(data.draw(st.integers(1, 3))):
        name, value = data.draw(st.sampled_from(names)), data.draw(JUNK)
        try:
            OmegaConf.update(config, name, value)
        except Exception as fault:  # while a configuration is composed, all that fails is the configuration
            assert "\n" not in str(explain(fault))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_options, "_unknown_to_lm_eval", lambda names: [])  # reads 13,000 files
        found = outcome(config)
    assert isinstance(found, RunConfig) or "\n" not in found


def ended(arguments: list[str], patch: pytest.MonkeyPatch) -> None:
    """Start ace-prune, up to where it would open a model; assert how it ends."""
    patch.setattr(sys, "argv", ["ace-prune", *arguments])
    patch.setattr(job, "_run", lambda *_: None)
    patch.setattr(task_options, "_unknown_to_lm_eval", lambda names: [])
    GlobalHydra.instance().clear()
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            prune.main()
        except SystemExit as end:
            code = end.code
    assert code in (0, 2)
    assert err.getvalue().count("\n") == (1 if code else 0), err.getvalue()


LETTERS = st.text(alphabet=st.sampled_from("ab=,:[]{}()'\"\\$#~+*@ é\t/.|&%!<>?-0"), max_size=8)


@settings(SETTINGS, max_examples=25)
@given(st.sampled_from(CHOICES), st.data())
def test_junk_on_the_command_line_ends_in_one_line(choices: tuple[str, ...], data: st.DataObject) -> None:
    names = composed(choices)[1]
    values = LETTERS | EDGES.filter(lambda value: isinstance(value, str) and "\0" not in value)
    prefix = data.draw(st.sampled_from(["", "", "", "+", "++", "~"]))
    junk = f"{prefix}{data.draw(st.sampled_from(names) | LETTERS)}={data.draw(values)}"
    if junk.startswith("-"):
        return
    with pytest.MonkeyPatch.context() as patch:
        ended(["model.path=org/name", *choices, junk], patch)


WORDS = st.sampled_from(
    ["metric", "wanda", "calib:", "n_samples: 3", "sparsity: 0.5", "\t", ":", "- ", "[", "]", "{", "}", "&a", "*a", "#",
     "\n", "  ", "---\n", "...", "!!python/object:x", "!!binary", "null", "~", "'", '"', "|", ">", "?", "%", "@", "`",
     "defaults:\n", "override /metric: ria", "1:30", "0x1F", "2020-01-01", "<<: ", "yes", "\r", "é"]
)  # fmt: skip
YAML = st.binary(max_size=30) | st.lists(WORDS, max_size=8).map(lambda words: "".join(words).encode())


@settings(SETTINGS, max_examples=25)
@given(YAML, st.sampled_from([b"# @package _global_\n", b"", b"\xef\xbb\xbf", b"# @package calib\n"]))
def test_junk_in_a_yaml_file_ends_in_one_line(content: bytes, head: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        (Path(folder) / "experiment").mkdir()
        (Path(folder) / "experiment" / "e.yaml").write_bytes(head + content)
        ended(["--config-dir", folder, "experiment=e", "model.path=org/name"], patch)
