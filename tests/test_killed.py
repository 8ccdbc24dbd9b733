"""Runs that are killed at many moments and then go on: the result is bit-equal to an uninterrupted run's."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import programs
import pytest
from tiny_models import make

from ace_cli.model.pruned import verify

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no forks")
BLOCKS, KILLS = 24, 3
#: At least so many episodes, and at most so many if no kill came while a run could be continued from.
LEAST, MOST = 1, 8
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]


def start(model: Path, out: Path) -> Any:
    arguments = [f"model.path={model}", "metric=varp", "sparsity=2:4", "calib=self", "calib.n_samples=4",
                 "calib.seq_len=8", "eval=none", "device=cpu", "html=false", f"output_dir={out}"]  # fmt: skip
    log = out.with_suffix(".log")
    return programs.start("cli.prune", arguments, out.parent, log, log)


def finish(process: Any, out: Path) -> None:
    process.join(300)
    assert process.exitcode == 0, out.with_suffix(".log").read_text()


def digest(out: Path) -> str:
    return hashlib.sha256((out / "checkpoint" / "model.safetensors").read_bytes()).hexdigest()


def assert_nothing_half_finished(out: Path) -> bool:
    """What looks like a result is one. Returns whether a checkpoint is there."""
    there = (out / "checkpoint").exists()
    if there:
        assert verify(out / "checkpoint") == BLOCKS * 7
    elif (out / "checkpoint.partial" / "pruning.json").exists():  # whole, but not yet renamed
        assert verify(out / "checkpoint.partial") == BLOCKS * 7
    if (out / "report.json").exists():
        assert there
        json.loads((out / "report.json").read_text())
    return there


def test_killed_at_many_moments_and_continued(tmp_path: Path) -> None:
    model = make(tmp_path / "model", "llama", num_hidden_layers=BLOCKS)
    finish(start(model, tmp_path / "warm"), tmp_path / "warm")
    began = time.perf_counter()
    finish(start(model, tmp_path / "straight"), tmp_path / "straight")
    whole = time.perf_counter() - began
    draw, continued = random.Random(0), 0
    for episode in range(MOST):
        if episode >= LEAST and continued:
            break
        out = tmp_path / f"episode{episode}"
        for number in range(KILLS):
            process = start(model, out)
            time.sleep(draw.uniform(0.3, 1.0) * whole)
            with contextlib.suppress(ProcessLookupError):  # already done: it had little left
                os.kill(process.pid, SIGNALS[(episode + number) % len(SIGNALS)])
            process.join(300)
            assert process.exitcode is not None
            assert_nothing_half_finished(out)
        finish(start(model, out), out)
        assert digest(out) == digest(tmp_path / "straight")
        assert sorted(file.name for file in out.iterdir() if not file.name.startswith(".")) == [
            "checkpoint", "report.json", "report.md", "run.log",
        ]  # fmt: skip
        continued += "Continuing in" in out.with_suffix(".log").read_text()
    assert continued >= 1, "no run was ever continued: the kills came too early"
