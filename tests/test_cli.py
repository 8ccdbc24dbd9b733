"""The programs as a user starts them. Each start costs seconds, so what can be shown in-process is shown elsewhere."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import composed
from safetensors.torch import load_file
from tiny_models import edit, make, write_documents

from ace_cli import __version__
from ace_cli.cli import verify
from ace_cli.core.locks import locked
from ace_cli.model.pruned import verify as verified
from ace_cli.run.finished import finished

Command = Callable[..., subprocess.CompletedProcess[str]]


def assert_one_line(done: subprocess.CompletedProcess[str], *expected: str) -> None:
    """Exit code 2, one line on standard error, no traceback."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    for text in expected:
        assert text in done.stderr


# --- before torch ----------------------------------------------------------------------------------------------------


def test_help_answers_at_once(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command = [sys.executable, "-m", "ace_cli", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before  # of the processor: whoever else is busy
    assert done.returncode == 0
    for text in (
        "[ace], ",
        "smollm2",
        "sparsity",
        "Exit codes",
    ):
        assert text in done.stdout
    assert seconds < 3  # half a second on a quiet machine; with torch it would be more
    assert not list(tmp_path.iterdir())


def test_without_arguments_it_says_what_can_be_typed_and_does_nothing(here: Command, tmp_path: Path) -> None:
    done = here()
    assert (done.returncode, done.stderr) == (0, "")
    assert "ace-prune --help" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert not list(tmp_path.iterdir())
    assert here("--version").stdout == f"ace-prune {__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["metric=wand"], ["model=llama7b", "calib.n_samples=0"]])
def test_help_and_configuration_errors_import_no_torch(tmp_path: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "ace_cli", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "hydra" in imported
    assert not imported & {"torch", "transformers", "datasets", "safetensors", "accelerate"}


def test_an_unknown_name_is_one_line_with_a_suggestion(here: Command, tmp_path: Path) -> None:
    done = here("model=llama7b", "metric=wand")
    assert_one_line(done, "metric=wand", "Did you mean 'wanda'?")
    assert not list(tmp_path.iterdir())


def test_several_faults_are_one_line(here: Command, tmp_path: Path) -> None:
    done = here("model=llama7b", "calib.n_samples=0", "eval.seq_len=1", "sparsity=2")
    assert_one_line(done, "calib.n_samples=0", "eval.seq_len=1", "sparsity=2")
    assert not list(tmp_path.iterdir())


def test_unquoted_n_of_m_in_a_yaml_file(here: Command, tmp_path: Path) -> None:
    """In an experiment of the user's own, whose values win over the defaults."""
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "e.yaml").write_text("# @package _global_\nsparsity: 2:4\n")
    arguments = ("--config-dir", "mine", "experiment=e", "model=llama7b", "dry_run=true")
    assert_one_line(here(*arguments), "124", '"2:4"')


def test_the_whole_configuration(command: Command, tmp_path: Path) -> None:
    done = command("__main__", "model=llama7b", "metric=ria", "metric.alpha=0.25", "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0
    assert "alpha: 0.25" in done.stdout
    assert "n_samples: 128" in done.stdout
    assert not list(tmp_path.iterdir())


# --- with torch, in this process -------------------------------------------------------------------------------------


def test_no_such_model(here: Command) -> None:
    assert_one_line(here("model.path=/no/such/folder"), "/no/such/folder")


def test_a_truncated_file(here: Command, own_llama: Path) -> None:
    file = own_llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert_one_line(here(f"model.path={own_llama}", "calib=self", "eval=none"), "model.safetensors", "whole")


def test_too_few_long_documents(here: Command, llama: Path, tmp_path: Path) -> None:
    documents = write_documents(tmp_path / "short.jsonl", count=3, length=10)
    done = here(f"model.path={llama}", "calib=text", f"calib.path={documents}", "calib.seq_len=32", "eval=none")
    assert_one_line(done, "Too few long documents", "32 tokens")
    assert not (tmp_path / "outputs").exists()


def test_a_pattern_that_does_not_fit(here: Command, llama: Path) -> None:
    done = here(f"model.path={llama}", "sparsity=3:7", "calib=self", "eval=none")
    assert_one_line(done, "q_proj.weight", "64 inputs", "7")


def test_windows_longer_than_the_model(here: Command, llama: Path) -> None:
    done = here(f"model.path={llama}", "calib=self", "calib.seq_len=500", "eval=none")
    assert_one_line(done, "calib.seq_len=500", "128")


def test_nan_in_the_weights(here: Command, own_llama: Path, tmp_path: Path) -> None:
    edit(own_llama, "model.layers.1.mlp.up_proj.weight", lambda weight: weight.fill_(float("nan")))
    assert_one_line(here(f"model.path={own_llama}", "metric=magnitude", "eval=none", "output_dir=out"), "NaN")
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_a_family_that_is_not_covered(here: Command, tmp_path: Path) -> None:
    options = {"num_key_value_heads": 4, "kv_channels": 16, "num_local_experts": 4}
    folder = make(tmp_path / "m", "jetmoe", **options)
    assert_one_line(here(f"model.path={folder}", "metric=magnitude", "eval=none"), "JetMoeParallelExperts")


@pytest.mark.skipif("__import__('torch').cuda.is_available()")
def test_a_device_that_is_not_there(here: Command, llama: Path) -> None:
    assert_one_line(here(f"model.path={llama}", "calib=self", "eval=none", "device=cuda"), "device=cuda")


def test_a_dry_run_shows_the_plan_and_leaves_nothing(here: Command, llama: Path, tmp_path: Path) -> None:
    done = here(f"model.path={llama}", "sparsity=2:4", "calib=self", "eval=none", "dry_run=true", "output_dir=out")
    assert (done.returncode, done.stderr) == (0, "")
    for text in ("LlamaForCausalLM", "2 blocks", "14 matrices", "2:4", "memory", "disk"):
        assert text in done.stdout
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_cannot_be_made(here: Command, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = here(f"model.path={llama}", "metric=magnitude", "eval=none", "output_dir=file/out")
    assert_one_line(done, "file")


def test_a_sweep_leaves_one_table_and_goes_on_after_a_failure(here: Command, llama: Path, tmp_path: Path) -> None:
    done = here(
        "-m", f"model.path={llama}", "metric=wanda,magnitude", "sparsity=3:7,2:4", "calib=self", "calib.n_samples=8",
        "eval=self", "eval.seq_len=16", "eval.max_windows=4", "samples.prompts=[]", "output_dir=sweep",
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    content = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert ["error" in job for job in content["jobs"]] == [True, False, True, False]
    assert [job["overrides"]["metric"] for job in content["jobs"]] == ["wanda", "wanda", "magnitude", "magnitude"]
    good = [job for job in content["jobs"] if "error" not in job]
    assert all(job["perplexity"] > 1 and job["sparsity"] == 0.5 for job in good)
    assert good[0]["dense"] == good[1]["dense"]
    assert len({json.dumps(job["protocol"]) for job in good}) == 1
    assert all(Path(job["report"]).is_file() for job in good)
    text = (tmp_path / "sweep" / "sweep.md").read_text()
    assert "3:7" in text.replace("\\", "")
    for part in ("64 inputs", f"{good[0]['perplexity']:.3f}"):
        assert part in text
        assert part in done.stdout


def test_a_sweep_started_again_repeats_only_what_is_not_finished(here: Command, llama: Path, tmp_path: Path) -> None:
    arguments = ["-m", f"model.path={llama}", "metric=magnitude", "sparsity=0.3,0.5,2:4", "eval=none",
                 "output_dir=sweep"]  # fmt: skip
    assert here(*arguments).returncode == 0
    first = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    (tmp_path / "sweep" / "1" / "report.json").unlink()
    (tmp_path / "sweep" / "2" / "checkpoint" / "pruning.json").unlink()
    shutil.rmtree(tmp_path / "sweep" / "2" / "checkpoint")
    done = here(*arguments)
    assert done.returncode == 0
    assert done.stdout.count("not repeated") == 1
    again = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert again["jobs"][0] == first["jobs"][0]
    assert [job["sparsity"] for job in again["jobs"]] == [job["sparsity"] for job in first["jobs"]]


def test_a_sweep_of_another_model_or_option_is_done_anew(here: Command, own_llama: Path, tmp_path: Path) -> None:
    arguments = ["-m", f"model.path={own_llama}", "metric=magnitude", "sparsity=0.5", "eval=none", "output_dir=sweep"]
    assert here(*arguments).returncode == 0
    assert "not repeated" in here(*arguments).stdout
    assert "not repeated" not in here(*arguments, "keep_checkpoint=false").stdout
    edit(own_llama, "model.layers.1.mlp.up_proj.weight", lambda weight: weight.roll(1))
    assert "not repeated" not in here(*arguments, "keep_checkpoint=false").stdout


def test_a_sweep_whose_import_is_gone_from_the_cache_is_still_finished(
    here: Command, own_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACE_PRUNE_CACHE", str(tmp_path / "cache"))
    torch.save(load_file(own_llama / "model.safetensors"), own_llama / "pytorch_model.bin")
    (own_llama / "model.safetensors").unlink()
    arguments = ["-m", f"model.path={own_llama}", "metric=magnitude", "sparsity=0.5", "eval=none", "output_dir=sweep"]
    assert here(*arguments).returncode == 0
    shutil.rmtree(tmp_path / "cache")
    done = here(*arguments)
    assert (done.returncode, done.stdout.count("not repeated")) == (0, 1)
    assert not (tmp_path / "cache").exists()
    (own_llama / "pytorch_model.bin").touch()
    assert "not repeated" in here(*arguments).stdout, "the content is the same"
    report = tmp_path / "sweep" / "0" / "report.json"
    for junk in ("", "[]", "null", "{", "[" * 100_000, '{"schema_version": 2, "versions": [], "config": 5}'):
        report.write_text(junk)
        assert finished(composed(*arguments[1:-1], f"output_dir={report.parent}")) is None


def test_a_sweep_of_a_model_with_other_weights_is_done_anew(here: Command, own_llama: Path) -> None:
    """The first and last bytes of every tensor are as they were."""
    arguments = ["-m", f"model.path={own_llama}", "metric=magnitude", "sparsity=0.5", "eval=none", "output_dir=sweep"]
    assert here(*arguments).returncode == 0
    edit(own_llama, "model.layers.1.mlp.up_proj.weight", lambda w: w.index_fill_(0, torch.tensor([40]), 0.5))
    assert "not repeated" not in here(*arguments).stdout


def test_a_second_sweep_in_the_folder_leaves_the_first_one_s_records(
    here: Command, llama: Path, tmp_path: Path
) -> None:
    arguments = ["-m", f"model.path={llama}", "metric=magnitude", "sparsity=0.5,0.3", "eval=none", "output_dir=sweep"]
    assert here(*arguments).returncode == 0
    first = (tmp_path / "sweep" / "sweep.json").read_text()
    with locked(tmp_path / "sweep"):
        done = here(*arguments, "html=false")
    assert done.returncode == 2
    assert_one_line(done, "Another run is working in")
    assert (tmp_path / "sweep" / "sweep.json").read_text() == first


def test_an_unknown_name_in_a_sweep_starts_no_job(here: Command, llama: Path, tmp_path: Path) -> None:
    done = here("-m", f"model.path={llama}", "metric=magnitude,wand", "eval=none", "output_dir=sweep")
    assert_one_line(done, "wand", "Did you mean 'wanda'?")
    assert not (tmp_path / "sweep" / "0" / "checkpoint").exists()


# --- programs of their own -------------------------------------------------------------------------------------------


def test_prune_and_verify_as_programs(command: Command, llama: Path, documents: Path, tmp_path: Path) -> None:
    """From another folder, relative paths, the default output folder; then a tampered weight."""
    arguments = [f"model.path={llama}", "metric=ria_varp", "sparsity=2:4", "calib=text", f"calib.path={documents}",
                 "calib.n_samples=8", "eval=text", f"eval.path={documents}", "eval.seq_len=32",
                 "eval.max_windows=4"]  # fmt: skip
    done = command("__main__", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    (out,) = (tmp_path / "outputs").iterdir()
    assert str(out) in done.stdout.strip().splitlines()[-1]
    report = json.loads((out / "report.json").read_text())
    assert report["command"].startswith("ace-prune ")
    assert all(argument in report["command"] for argument in arguments[1:3])
    assert f"{report['perplexity']['pruned']:.3f}" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]

    checkpoint = out / "checkpoint"
    assert verified(checkpoint) == 14
    name = "model.layers.0.mlp.gate_proj.weight"
    edit(checkpoint, name, lambda weight: weight.index_fill_(1, (weight[0] == 0).nonzero()[0], 0.5))
    done = command("cli.verify", checkpoint, cwd=tmp_path)
    assert done.returncode == 1
    assert name in done.stderr
    assert done.stderr.count("\n") == 1


def test_verify_of_a_folder_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ace-verify", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit) as caught:
        verify.main()
    out, err = capfd.readouterr()
    assert_one_line(subprocess.CompletedProcess([], int(caught.value.code or 0), out, err), "nothing")


@pytest.mark.parametrize("text", ["+foo=1", "+calib.n_sample=3", "metric=null", "metric=", "output_dir="])
def test_options_that_nothing_reads_are_refused(here: Command, tmp_path: Path, text: str) -> None:
    done = here("model.path=org/name", text)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_flags_may_follow_the_path(command: Command, tmp_path: Path) -> None:
    done = command("__main__", "model.path=org/name", "metric=wanda", "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0
    assert "path: org/name" in done.stdout


def test_verify_finds_the_checkpoint_of_a_run_folder(
    here: Command, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], llama: Path, tmp_path: Path
) -> None:
    assert here(f"model.path={llama}", "metric=magnitude", "eval=none", "output_dir=out").returncode == 0
    monkeypatch.setattr(sys, "argv", ["ace-verify", str(tmp_path / "out")])
    verify.main()
    assert f"{tmp_path / 'out' / 'checkpoint'}: 14 pruned weights" in capfd.readouterr().out


NOTHING = "Interrupted. No block was finished: nothing is kept."
BLOCKS = "Interrupted. Repeat the command to continue: finished blocks are kept."


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("ace_cli.run.pipeline.open_model", NOTHING),
        (
            "ace_cli.run.prune_checkpoint.replay",
            BLOCKS,
        ),
        ("ace_cli.run.pipeline.make_report", BLOCKS),
    ],
)
def test_what_ctrl_c_leaves_is_said(
    here: Command, monkeypatch: pytest.MonkeyPatch, llama: Path, where: str, said: str
) -> None:
    arguments = [
        f"model.path={llama}",
        "metric=wanda",
        "calib=self",
        "calib.n_samples=4",
        "eval=none",
        "output_dir=out",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(where, stopped)
        if "replay" in where:
            patch.setattr("ace_cli.model.files.CheckpointWriter.finish", stopped)
            assert_one_line(here(*arguments), said)
        done = here(*arguments)
    assert_one_line(done, said)


def test_ctrl_c_while_libraries_are_imported_is_one_line(tmp_path: Path) -> None:
    program = """
import os, signal
from ace_cli.cli.ending import stopping_at_once
with stopping_at_once("ace-prune"):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException as fault:  # what a library makes of it in the middle of its own import
        raise RecursionError from fault
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert_one_line(done, "Interrupted. Nothing was begun.")


def stopped(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
