"""Sweeps: on every launcher the same table, page and exit code; killed jobs are failed jobs, and done again."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import slurm
import torch

from ace_cli.core import cache
from ace_cli.core.locks import locked

Command = Callable[..., "subprocess.CompletedProcess[str]"]
EVAL = ("eval=self", "eval.seq_len=16", "eval.max_windows=4", "samples.prompts=[]", "html=false", "calib=self",
        "calib.n_samples=8")  # fmt: skip


def needs(package: str, extra: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(f"hydra_plugins.{package}") is None
    return pytest.mark.skipif(missing, reason=f'pip install "ace-prune[{extra}]"')


JOBLIB = needs("hydra_joblib_launcher", "sweeps-joblib")
OPTUNA = needs("hydra_optuna_sweeper", "search")
#: joblib keeps its processes, in the folder where the first was started: output_dir is absolute in tests of it.
RAY = [
    needs("hydra_ray_launcher", "sweeps-ray"),
    pytest.mark.skipif(not os.environ.get("ACE_TEST_RAY"), reason="Ray takes long to start: set ACE_TEST_RAY=1"),
]
LAUNCHERS = [
    pytest.param((), id="basic"),
    pytest.param(("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), id="joblib", marks=JOBLIB),
    pytest.param(("hydra/launcher=ray",), id="ray", marks=RAY),
]


def jobs_of(sweep: Path) -> list[dict[str, Any]]:
    return list(json.loads((sweep / "sweep.json").read_text())["jobs"])


def skip_unless_ray_started(said: str) -> None:
    """Ray's own limit, on a busy machine: then no job has begun, and each counts as failed."""
    if "The launcher stopped: Exception: The current node timed out during startup" in said:
        pytest.skip("Ray did not start within its 30 s")


# --- two sweeps in one folder, and a sweep that is started again ------------------------------------------------------


def test_a_job_that_another_process_still_works_on_keeps_its_record(here: Command, llama: Path, tmp_path: Path) -> None:
    """A sweep's process was killed, one of its jobs goes on: the refusal is not written over what that job will say."""
    arguments = ["-m", f"model.path={llama}", "metric=magnitude", "sparsity=0.3,0.5", "eval=none", "output_dir=sweep"]
    assert here(*arguments).returncode == 0
    record = tmp_path / "sweep" / "jobs" / "0.json"
    before = record.read_text()
    with locked(record.parent, "0.lock"):
        done = here(*arguments)
    assert done.returncode == 1
    assert record.read_text() == before
    failed, kept = jobs_of(tmp_path / "sweep")
    assert "another process" in failed["error"]
    assert "error" not in kept
    assert here(*arguments).stdout.count("not repeated") == 2


def test_finished_jobs_stay_finished_when_the_import_cache_is_gone(
    here: Command, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = Path(shutil.copytree(llama, tmp_path / "old"))
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    arguments = ["-m", f"model.path={source}", "metric=magnitude", "sparsity=0.3", "eval=none", "output_dir=sweep"]
    assert here(*arguments).returncode == 0
    shutil.rmtree(cache.cache_folder() / "imports")
    done = here(*arguments)
    assert done.returncode == 0, done.stderr
    assert "not repeated" in done.stdout
    state = torch.load(source / "pytorch_model.bin", weights_only=True)
    state["model.layers.0.mlp.up_proj.weight"] *= 2
    torch.save(state, source / "pytorch_model.bin")
    assert "not repeated" not in here(*arguments).stdout, "another model in the same place"


# --- launchers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_leaves_the_same_table_and_exit_code(
    here: Command, llama: Path, tmp_path: Path, launcher: tuple[str, ...]
) -> None:
    arguments = ["-m", f"model.path={llama}", "metric=wanda", "sparsity=3:7,2:4,1:4", *EVAL, *launcher,
                 f"output_dir={tmp_path / 'sweep'}"]  # fmt: skip
    done = here(*arguments)
    skip_unless_ray_started(done.stderr)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    jobs = jobs_of(tmp_path / "sweep")
    assert ["error" in job for job in jobs] == [True, False, False]
    assert [job["overrides"]["sparsity"] for job in jobs] == ["3:7", "2:4", "1:4"]
    assert jobs[1]["dense"] == jobs[2]["dense"]
    assert "64 inputs" in (tmp_path / "sweep" / "sweep.md").read_text()
    assert f"{jobs[1]['perplexity']:.3f}" in done.stdout
    assert "Sweep of 3 jobs" in (tmp_path / "sweep" / "sweep.html").read_text()
    assert len(list((tmp_path / "sweep" / "dense").glob("*.safetensors"))) == 1, "dense is measured once for all"

    shutil.rmtree(tmp_path / "sweep" / "1")
    assert here(*arguments).returncode == 1
    again = jobs_of(tmp_path / "sweep")
    assert again[2] == jobs[2], "finished jobs are not repeated"
    assert again[1]["perplexity"] == jobs[1]["perplexity"]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_gate_closes_under_every_launcher(
    here: Command, llama: Path, tmp_path: Path, launcher: tuple[str, ...]
) -> None:
    done = here("-m", f"model.path={llama}", "metric=magnitude", "sparsity=0.1,0.2", *EVAL, "gate.max_ppl_ratio=0.5",
                f"output_dir={tmp_path / 'sweep'}", *launcher)  # fmt: skip
    skip_unless_ray_started(done.stderr)
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("gate.max_ppl_ratio=0.5") == 2


@JOBLIB
def test_a_worker_that_is_killed_is_a_failed_job_and_is_done_again(here: Command, llama: Path, tmp_path: Path) -> None:
    """By any launcher: the second one is this process, which need not import anything again."""
    arguments = ["-m", f"model.path={llama}", "metric=magnitude", "sparsity=0.3,0.5", *EVAL, "output_dir=sweep"]
    command = [sys.executable, "-m", "ace_cli", *arguments, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        os.kill(process_of(tmp_path / "sweep" / "jobs" / "1.json", started), signal.SIGKILL)
        out, err = started.communicate(timeout=120)
    assert started.returncode == 1, err
    assert "Traceback" not in err
    assert "Ended without a result" in jobs_of(tmp_path / "sweep")[1]["error"]
    assert "Ended without a result" in out
    done = here(*arguments)
    assert done.returncode == 0, done.stderr
    assert not [job for job in jobs_of(tmp_path / "sweep") if "error" in job]


@needs("hydra_submitit_launcher", "sweeps-slurm")
@pytest.mark.skipif(slurm.missing() is not None, reason=str(slurm.missing()))
@pytest.mark.skipif(not os.environ.get("ACE_TEST_SLURM"), reason="starts a Slurm of its own: set ACE_TEST_SLURM=1")
def test_on_slurm_cancelled_and_killed_jobs_have_failed_and_are_done_again(llama: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "ace_cli", "-m", f"model.path={llama}", "metric=magnitude", "sparsity=0.1,0.2,0.3,0.4",
        *EVAL, "output_dir=sweep", "hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1",
    ]  # fmt: skip
    records = tmp_path / "sweep" / "jobs"
    with slurm.cluster(tmp_path / "slurm") as env:
        pipes: Any = {"cwd": tmp_path, "env": env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, **pipes) as started:
            process_of(records / "0.json", started)  # each is stopped while it still imports torch
            number = subprocess.check_output(["squeue", "-h", "-o", "%F"], env=env, text=True).split()[0]
            subprocess.run(["scancel", f"{number}_0"], env=env, check=True)
            os.kill(process_of(records / "1.json", started), signal.SIGKILL)
            _, err = started.communicate(timeout=240)
        assert started.returncode == 1, err
        assert "Traceback" not in err
        jobs = jobs_of(tmp_path / "sweep")
        assert ["error" in job for job in jobs] == [True, True, False, False]
        assert all("Ended without a result" in job["error"] for job in jobs[:2])
        done = subprocess.run(command, timeout=240, check=False, **pipes)
        assert done.returncode == 0, done.stderr
    again = jobs_of(tmp_path / "sweep")
    assert not [job for job in again if "error" in job]
    assert again[2:] == jobs[2:], "finished jobs are not repeated"


def process_of(record: Path, started: subprocess.Popen[str]) -> int:
    """The process that works on a job, as soon as it does."""
    for _ in range(3000):
        try:
            found = json.loads(record.read_text())
            return int(found["running"]["process"])
        except (OSError, KeyError):
            assert started.poll() is None, "ended before the job was seen"
            time.sleep(0.01)
    raise AssertionError(f"{record} was never written")


@pytest.mark.parametrize(
    ("package", "chosen", "extra"),
    [
        ("hydra_ray_launcher", "hydra/launcher=ray", "sweeps-ray"),
        ("hydra_joblib_launcher", "hydra/launcher=joblib", "sweeps-joblib"),
        ("hydra_submitit_launcher", "hydra/launcher=submitit_slurm", "sweeps-slurm"),
        ("hydra_optuna_sweeper", "experiment=search", "search"),
    ],
)
def test_a_plugin_that_is_not_installed_is_named_with_how_to_get_it(
    here: Command, llama: Path, monkeypatch: pytest.MonkeyPatch, package: str, chosen: str, extra: str
) -> None:
    from hydra.core.config_store import ConfigStore

    group, plugin = chosen.split("=") if "/" in chosen else ("hydra/sweeper", "optuna")
    stored = ConfigStore.instance().repo["hydra"].get(group.split("/")[1], {})
    monkeypatch.delitem(stored, f"{plugin}.yaml", raising=False)
    monkeypatch.setitem(sys.modules, f"hydra_plugins.{package}", None)  # type: ignore[arg-type]
    done = here("-m", f"model.path={llama}", "sparsity=0.1,0.2", chosen)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f'pip install "ace-prune[{extra}]"' in done.stderr


# --- searches --------------------------------------------------------------------------------------------------------


@OPTUNA
def test_a_search_minimises_perplexity_and_ends_with_a_picture_of_its_trials(
    here: Command, llama: Path, tmp_path: Path
) -> None:
    arguments = [
        "-m", "experiment=search", f"model.path={llama}", "metric=ria", "metric.alpha=interval(0.1,0.9)", *EVAL,
        "hydra.sweeper.n_trials=3", "output_dir=search",
    ]  # fmt: skip
    done = here(*arguments)
    assert done.returncode == 0, done.stderr
    jobs = jobs_of(tmp_path / "search")
    assert len({job["overrides"]["metric.alpha"] for job in jobs}) == 3
    assert (tmp_path / "search" / "sweep_trials.png").is_file()
    assert "Trials" in (tmp_path / "search" / "sweep.html").read_text()
    assert here(*arguments).stdout.count("not repeated") == 3, "the same search asks the same questions"
