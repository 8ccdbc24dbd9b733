"""Samples of text, the gate, and the trackers."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Terminal, composed, run
from tiny_models import load

from ace_cli.core.errors import AceError
from ace_cli.evaluation.dense import DenseCache
from ace_cli.evaluation.gate import Gate
from ace_cli.evaluation.samples import Samples, repeated
from ace_cli.report.facts import Report
from ace_cli.report.markdown import loops_line, render

Prune = Callable[..., Report]
Command = Callable[..., subprocess.CompletedProcess[str]]
EVAL = ("eval=self", "eval.seq_len=16", "eval.max_windows=4")


# --- samples ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sampled(llama: Path, tmp_path: Path, prune_here: Prune) -> Report:
    prompts = "samples.prompts=[w5 w6 w7,w9]"
    return prune_here(llama, tmp_path / "out", "metric=magnitude", *EVAL, prompts, "samples.tokens=6")


def test_greedy_samples_are_those_of_the_whole_models(sampled: Report, llama: Path) -> None:
    """Token by token, without a cache, one prompt at a time."""
    assert [(sample.prompt, sample.sampled) for sample in sampled.samples] == [
        ("w5 w6 w7", False), ("w9", False), ("w5 w6 w7", True), ("w9", True),
    ]  # fmt: skip
    for name, folder in (("dense", llama), ("pruned", Path(sampled.checkpoint))):
        model = load(folder)
        for sample in sampled.samples[:2]:
            ids = [int(word[1:]) for word in sample.prompt.split()]
            start = len(ids)
            with torch.inference_mode():
                while len(ids) < start + 6 and (ids[-1] != 2 or len(ids) == start):
                    ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            words = [f"w{token}" for token in ids[start:] if token > 2]
            assert getattr(sample, name).split() == words


def test_the_same_seed_draws_the_same(sampled: Report, llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    options = ("metric=magnitude", *EVAL, "samples.prompts=[w5 w6 w7,w9]", "samples.tokens=6")
    again = prune_here(llama, tmp_path / "again", *options)
    other = prune_here(llama, tmp_path / "other", *options, "samples.seed=1")
    assert again.samples == sampled.samples
    assert other.samples[:2] == sampled.samples[:2]
    assert other.samples[2:] != sampled.samples[2:]


def test_loops_are_runs_of_four_that_stood_there_before(sampled: Report) -> None:
    assert repeated([1, 2, 3]) == repeated([]) == 0
    assert repeated([1, 2, 3, 4, 5, 6]) == 0
    assert repeated([7] * 10) == pytest.approx(6 / 7)
    assert repeated([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    for sample in sampled.samples:
        assert sample.loops.keys() == {"dense", "pruned"}
        assert all(0 <= share < 1 for share in sample.loops.values())
    known = dataclasses.replace(sampled.samples[0], loops={"dense": 0.25, "pruned": 0.75})
    line = loops_line({"samples": [dataclasses.asdict(known)]})
    assert "25 % (dense) and 75 % (pruned)" in line
    assert "none and none when drawn" in line
    assert loops_line({"samples": []}) == ""
    assert loops_line(dataclasses.asdict(sampled)) in render(sampled)


def test_samples_are_shown(sampled: Report) -> None:
    text = render(sampled)
    assert "## Samples" in text
    assert sampled.samples[0].pruned in text
    assert (
        json.loads((Path(sampled.checkpoint).parent / "report.json").read_text())["samples"][0]["prompt"] == "w5 w6 w7"
    )


def test_large_models_are_not_asked(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    report = prune_here(
        llama, tmp_path / "out", "metric=magnitude", *EVAL, "samples.prompts=[w5]", "samples.max_gb=1e-6"
    )
    assert report.samples == []
    assert any("samples.max_gb=1e-06" in warning for warning in report.warnings)


def test_a_model_that_would_fill_what_is_free_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is what this process may still take, a control group's limit included."""
    monkeypatch.setattr("ace_cli.core.memory.free", lambda: 1000)
    assert Samples().refusal(250, torch.bfloat16) is None
    assert "half of what is free" in str(Samples().refusal(251, torch.bfloat16))
    assert "samples.max_gb=4" in str(Samples().refusal(2 * 10**9 + 1, torch.bfloat16))


def test_a_model_without_tokenizer_loses_only_its_samples(own_llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    for file in own_llama.glob("tokenizer*"):
        file.unlink()
    report = prune_here(own_llama, tmp_path / "out", "metric=magnitude", *EVAL, "samples.prompts=[w5]")
    assert report.samples == []
    assert report.perplexity.pruned is not None
    assert any("No samples" in warning and "tokenizer" in warning for warning in report.warnings)


def test_faults_of_samples() -> None:
    assert Samples().faults() == []
    faults = Samples(prompts=[" "], tokens=0, seed=-1, temperature=0, max_gb=-1).faults()
    assert len(faults) == 5
    assert not Samples(prompts=[]).wanted
    assert not Samples(max_gb=0).wanted


# --- the gate --------------------------------------------------------------------------------------------------------


def test_the_gate() -> None:
    assert Gate(1.5).objection(1.5) is None
    assert "1.501" in str(Gate(1.5).objection(1.501))
    assert Gate().objection(99.0) is None
    assert [len(Gate(value).faults()) for value in (0, -1.0, float("nan"), 1.5, None)] == [1, 1, 1, 0, 0]


def test_a_gate_without_evaluation_is_refused_at_once() -> None:
    with pytest.raises(AceError, match="eval=none"):
        composed("model.path=org/name", "model=custom", "gate.max_ppl_ratio=1.5", "eval=none")


@pytest.mark.parametrize(("allowed", "code"), [("1000", 0), ("0.5", 3)])
def test_a_model_that_is_too_bad_exits_3_with_its_files(
    here: Command,
    llama: Path,
    tmp_path: Path,
    allowed: str,
    code: int,
) -> None:
    done = here(
        f"model.path={llama}", "metric=magnitude", "calib=self", *EVAL, f"gate.max_ppl_ratio={allowed}",
        "output_dir=out", "samples.prompts=[]", "html=false",
    )  # fmt: skip
    assert done.returncode == code
    assert done.stderr.count("\n") == (code == 3)
    assert ("gate.max_ppl_ratio=0.5" in done.stderr) == (code == 3)
    assert (tmp_path / "out" / "checkpoint" / "config.json").is_file()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["gate"] == {"max_ppl_ratio": float(allowed), "passed": code == 0}


def test_a_sweep_with_a_bad_model_exits_3(here: Command, llama: Path) -> None:
    done = here(
        "-m", f"model.path={llama}", "metric=magnitude", "calib=self", *EVAL, "gate.max_ppl_ratio=0.5,1000",
        "output_dir=out", "samples.prompts=[]", "html=false",
    )  # fmt: skip
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1


# --- trackers --------------------------------------------------------------------------------------------------------


class Recorder(types.ModuleType):
    """Stands for the libraries of wandb and mlflow: notes every call."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.util.spec_from_loader(name, None)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return self

        return call

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.calls.append(("exit", (), {}))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_trackers_get_the_numbers_of_the_report(
    name: str, llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Recorder(name)
    monkeypatch.setitem(sys.modules, name, library)
    report = prune_here(llama, tmp_path / "out", "metric=wanda", f"tracker={name}", *EVAL)
    calls = {call: args[0] if args else kwargs for call, args, kwargs in library.calls}
    numbers = calls["log" if name == "wandb" else "log_metrics"]
    assert numbers["perplexity/pruned"] == report.perplexity.pruned
    assert numbers["seconds/total"] == report.seconds["total"]
    choices = calls["init"]["config"] if name == "wandb" else calls["log_params"]
    assert choices["metric"] == "wanda"
    assert choices["calib_seq_len"] == 16
    assert ("finish" if name == "wandb" else "log_artifact") in calls


def test_tensorboard_has_the_numbers(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = prune_here(llama, tmp_path / "out", "metric=wanda", "tracker=tensorboard", *EVAL)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    assert events.Scalars("perplexity/pruned")[0].value == pytest.approx(report.perplexity.pruned)


def test_a_missing_library_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(AceError, match="pip install wandb"):
        composed("model.path=org/name", "model=custom", "tracker=wandb")


def test_a_tracker_that_fails_takes_nothing_with_it(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = Recorder("wandb")
    library.init = lambda **_: (_ for _ in ()).throw(OSError("no route to host"))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", library)
    config = composed(
        "model=custom", f"model.path={llama}", "metric=magnitude", "eval=none", "tracker=wandb", "html=false",
        f"output_dir={tmp_path / 'out'}",
    )  # fmt: skip
    assert run(config, "test", Terminal(), DenseCache()) is not None
    assert "no route to host" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.json").is_file()


def test_a_run_of_wandb_ends_where_logging_fails() -> None:
    from ace_cli.report.trackers.wandb import WandB

    library = Recorder("wandb")

    def log(_: object) -> None:
        raise OSError("no route to host")

    library.log = log  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", library)
        with pytest.raises(OSError, match="no route"):
            WandB().record({}, {}, Path("run"))
    assert library.calls[-1] == ("finish", (), {"exit_code": 1})


def test_samples_leave_the_tokenizer_as_it_was(llama: Path) -> None:
    """Calibration and evaluation use the same one. Prompts of several lengths are written on as each alone is."""
    from ace_cli.data.documents import load_tokenizer
    from ace_cli.evaluation.samples import write_on
    from ace_cli.model.files import Checkpoint

    checkpoint = Checkpoint(llama)
    tokenizer = load_tokenizer(checkpoint)
    before = (tokenizer.padding_side, tokenizer.pad_token)
    prompts = ["w5", "w7 w8 w9 w10", "w3 w4"]
    cpu, kind = torch.device("cpu"), torch.float32
    together = write_on(checkpoint, Samples(prompts=prompts, tokens=5), cpu, kind)
    alone = [write_on(checkpoint, Samples(prompts=[prompt], tokens=5), cpu, kind).greedy[0] for prompt in prompts]
    assert together.greedy == alone
    assert load_tokenizer(checkpoint) is tokenizer
    assert (tokenizer.padding_side, tokenizer.pad_token) == before
