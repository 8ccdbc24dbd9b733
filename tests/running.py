"""What tests share, as a plugin of pytest.

They are to be fast, so that they are run often: the whole set takes minutes on two cores.

- A test calls functions; a whole run in this process is ``prune_here`` (0.1 s), the command line is ``here``; a process
  of its own (``command``, 1 s) is for what only a process shows: exit codes, what is written where, signals, memory.
- A grid of choices covers each pair of values, not each cell of the product: ``grids.pairs``.
- Models and texts that are only read are made once (``llama``, ``documents``); ``own_llama`` may be damaged.
- What costs and is the same each time is done once: configurations (``composed``), what Hydra composes for ``here``
  and what tiny models write (``shortcuts``), tiny models themselves (``tiny_models.make``).
"""

from __future__ import annotations

import copy
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# before any library reads them: no network, and no thread storm on a shared machine
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import garbage  # before what is large
import programs
import pytest
import shortcuts  # noqa: F401 (in place for all tests)
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf
from tiny_models import add_tokenizer, make, write_documents

from ace_cli.cli.prune import main
from ace_cli.core import registry
from ace_cli.core.cache import cache_folder
from ace_cli.evaluation.dense import DenseCache
from ace_cli.report import plots
from ace_cli.report.facts import Report
from ace_cli.report.terminal import Terminal
from ace_cli.run.config import RunConfig, config_folder, parse, store_schemas
from ace_cli.run.pipeline import run

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other


def pytest_collection_finish() -> None:
    garbage.begin()


_CACHE = os.environ.get("ACE_PRUNE_CACHE")
#: Tests of what pictures show, by name of their modules; for all others a picture is a file or an element.
_OF_PICTURES = {"test_html", "test_overview", "test_report", "test_readme"}


@pytest.fixture(autouse=True)
def pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep of tiny models takes less time than its page's pictures."""
    if request.module.__name__ not in _OF_PICTURES:
        monkeypatch.setattr(plots, "svg", lambda name, draw, height=2.5: f'<svg class="plot" aria-label="{name}"/>')
        monkeypatch.setattr(plots, "png", lambda file, draw, height=4.0: file.write_bytes(b""))


@pytest.fixture(scope="session", autouse=True)
def no_trace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Imports of tiny models are not left in the user's cache. Compiled kernels are the user's: the same for all."""
    users, own = cache_folder(), tmp_path_factory.mktemp("cache")
    (users / "kernels").mkdir(parents=True, exist_ok=True)
    (own / "kernels").symlink_to(users / "kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACE_PRUNE_CACHE", str(own))
        yield


@pytest.fixture(scope="module")
def users_cache(no_trace: None) -> Iterator[None]:
    """For the real model, whose import takes seconds and is the same each time."""
    with pytest.MonkeyPatch.context() as patch:
        if _CACHE is None:
            patch.delenv("ACE_PRUNE_CACHE")
        else:
            patch.setenv("ACE_PRUNE_CACHE", _CACHE)
        yield


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer. Shared: tests must not write into it."""
    return add_tokenizer(make(tmp_path_factory.mktemp("llama"), "llama"))


@pytest.fixture
def own_llama(llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "own_llama"))


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSON-lines file of 30 documents of 60 tokens."""
    return write_documents(tmp_path_factory.mktemp("documents") / "pages.jsonl")


def composed(*overrides: str) -> RunConfig:
    """The configuration that the command line would make of ``overrides``.

    Hydra takes its time: what differs in nothing but the folders of a test is composed once.
    """
    folders, others = {}, []
    for override in overrides:
        name, _, value = override.partition("=")
        if name in ("model.path", "output_dir") and value.startswith("/"):
            folders[name] = value
        else:
            others.append(override)
    config = _composed(*(f"{name}=/given" for name in folders), *others)
    for name, value in folders.items():
        OmegaConf.update(config, name, value)
    return parse(config, Path(config.output_dir).absolute())


@functools.lru_cache(maxsize=64)
def _composed(*overrides: str) -> DictConfig:
    """Choices that say something of others are composed. The rest is set on a copy, as Hydra itself would."""
    read = OverridesParser.create().parse_overrides(list(overrides))
    recipe = any(each.key_or_group in ("preset", "recipe", "experiment") for each in read)
    alone = [] if recipe else [each for each in read if _alone(each)]
    options = [each for each in read if each.type is OverrideType.CHANGE and not _chooses(each)]
    config = copy.deepcopy(_chosen(*(each.input_line for each in read if each not in alone and each not in options)))
    for each in alone:
        config[each.key_or_group] = registry.choices(each.key_or_group)[each.value()]
    ConfigLoaderImpl._apply_overrides_to_config(options, config)
    return config


def _chooses(override: Override) -> bool:
    """Whether it names one of a group's choices, or speaks to Hydra."""
    name = override.key_or_group
    return name in registry.PACKAGES or (config_folder() / name).is_dir() or name.startswith("hydra")


def _alone(override: Override) -> bool:
    """Whether it names a choice that is a class of options and nothing else."""
    group, name = override.key_or_group, override.value()
    if override.type is not OverrideType.CHANGE or group not in registry.PACKAGES or not isinstance(name, str):
        return False
    return name in registry.choices(group) and not registry.brought(group, name)


@functools.lru_cache(maxsize=64)
def _chosen(*choices: str) -> DictConfig:
    store_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder().absolute()), version_base="1.3"):
        return compose("prune", list(choices))


@pytest.fixture
def configure() -> Callable[..., RunConfig]:
    return composed


@pytest.fixture
def prune_here() -> Callable[..., Report]:
    """Run ace-prune's run() in this process on a folder, self-calibrated with few windows unless told otherwise."""

    def prune(model: Path, out: Path, *overrides: str) -> Report:
        defaults = {
            "calib": "self",
            "calib.n_samples": "8",
            "eval": "none",
            "device": "cpu",
            "samples.prompts": "[]",
            "html": "false",
        }
        given = dict(override.split("=", 1) for override in overrides)
        options = {"model": "custom", "model.path": str(model), "output_dir": str(out), **defaults, **given}
        report = run(
            composed(*(f"{name}={value}" for name, value in options.items())), "test", Terminal(), DenseCache()
        )
        assert report is not None
        return report

    return prune


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a module of ace_cli as a program of its own, in ``cwd``."""
    return programs.done


@pytest.fixture
def here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """ace-prune in this process, for faults that are found only after torch is imported; no page unless asked for."""

    def start(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = [str(argument) for argument in arguments]
        options = [word for word in words if "=" in word]
        if options and not any(word.startswith("html=") for word in words):
            words.insert(words.index(options[0]), "html=false")  # a tiny model's run takes less time than its pictures
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["ace-prune", *words])
        GlobalHydra.instance().clear()
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
            raise SystemExit(0)
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(sys.argv, int(caught.value.code or 0), out, err)

    return start
