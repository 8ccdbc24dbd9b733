"""Compiled loops: where they are missing, that is said once, and written down with the versions that decide."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ace_cli.kernels import loops
from ace_cli.report.facts import Report
from ace_cli.run import pipeline, prune_checkpoint


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A numba that does not fit the installed numpy."""

    def refuse(name: str) -> None:
        raise ImportError("Numba needs NumPy 2.4 or less.\n Got NumPy 2.5.")

    loops.load.cache_clear()
    monkeypatch.setattr(loops, "import_module", refuse)
    yield
    loops.load.cache_clear()
    loops._failed.clear()


def test_a_numba_that_refuses_its_numpy_is_said_once_and_written_down(
    here: Callable[..., subprocess.CompletedProcess[str]], llama: Path, tmp_path: Path, refused: None
) -> None:
    options = [f"model.path={llama}", "metric=ace", "calib=self", "calib.n_samples=4", "eval=none", "device=cpu"]
    done = here(*options, f"output_dir={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    assert said.count("loops are not compiled: Numba needs NumPy 2.4 or less. Got NumPy 2.5.") == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["hardware"]["loops"].startswith("not compiled: Numba needs")
    assert any("install numba" in warning for warning in report["warnings"])


def test_other_faults_of_numba_are_no_traceback(monkeypatch: pytest.MonkeyPatch, refused: None) -> None:
    def broken(name: str) -> None:
        raise OSError("libLLVM.so: cannot open shared object file")

    monkeypatch.setattr(loops, "import_module", broken)
    assert loops.load("weight_loops") is None
    assert "libLLVM" in loops.why_not()


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
def test_compiled_loops_and_the_versions_that_decide_are_in_the_report(
    llama: Path, tmp_path: Path, prune_here: Callable[..., Report]
) -> None:
    report = prune_here(llama, tmp_path / "ace", "metric=ace")
    assert report.hardware["loops"] == "compiled"
    assert {"numba", "scipy"} <= set(report.versions)
    assert prune_here(llama, tmp_path / "varp", "metric=varp").hardware["loops"] == "not needed"


def test_without_loops_it_is_another_run(
    llama: Path, tmp_path: Path, prune_here: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was interrupted with compiled loops is not continued without."""
    found: list[dict[str, Any]] = []
    original = prune_checkpoint.identity_of

    def remembered(*args: Any) -> dict[str, Any]:
        found.append(original(*args))
        return found[-1]

    monkeypatch.setattr(pipeline, "identity_of", remembered)
    for number, state in enumerate(("compiled", "not compiled: no numba")):
        monkeypatch.setattr(prune_checkpoint, "loops_of", lambda *_, state=state: state)
        prune_here(llama, tmp_path / str(number), "metric=ace")
    assert found[0] != found[1]
    assert {**found[0], "loops": ""} == {**found[1], "loops": ""}
