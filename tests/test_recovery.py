"""recover=blocks: pruned positions stay zero, blocks come closer to the dense ones, and nothing is left to chance."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from running import composed
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_models import make

from ace_cli.core.errors import AceError
from ace_cli.kernels.divergence import divergence
from ace_cli.model.files import Checkpoint, CheckpointWriter
from ace_cli.recovery.base import RecoveryFacts
from ace_cli.recovery.blocks import relative_error
from ace_cli.recovery.distill import Distill
from ace_cli.recovery.fit import Fit
from ace_cli.recovery.training import LOWER, split
from ace_cli.report.facts import Report

Prune = Callable[..., Report]
TRAINED = (
    "metric=wanda", "recover=blocks", "recover.batch=32", "recover.lr=3e-3", "recover.epochs=2", "calib.n_samples=16",
)  # fmt: skip


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoint" / "model.safetensors")


def digest(run: Path) -> str:
    return hashlib.sha256((run / "checkpoint" / "model.safetensors").read_bytes()).hexdigest()


def test_the_error_is_relative_to_each_tokens_size() -> None:
    torch.manual_seed(0)
    out, target = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    slow = [
        sum((float(o) - float(t)) ** 2 for o, t in zip(out[b, i], target[b, i], strict=True))
        / sum(float(t) ** 2 for t in target[b, i])
        for b in range(2)
        for i in range(3)
    ]
    assert float(relative_error(out, target)) == pytest.approx(sum(slow) / len(slow), rel=1e-6)


@pytest.mark.parametrize(  # the target is the same hidden states for every family: each meets one, and llama both
    ("family", "target"),
    [
        ("llama", "block"), ("llama", "model"), ("gpt2", "model"), ("gemma3_text", "block"), ("bloom", "model"),
        ("opt", "block"), ("mixtral", "model"), ("gpt_oss", "block"),
    ],
)  # fmt: skip
def test_blocks_come_closer_and_what_was_pruned_stays_zero(
    tmp_path: Path, prune_here: Prune, family: str, target: str
) -> None:
    model = make(tmp_path / "m", family)
    options = ("sparsity=2:4", "metric=wanda", "calib.n_samples=16")
    pruned = prune_here(model, tmp_path / "pruned", *options)
    trained = prune_here(model, tmp_path / "trained", *TRAINED, f"recover.target={target}", "sparsity=2:4")
    before, after = weights(tmp_path / "pruned"), weights(tmp_path / "trained")
    assert all(block["recovery"] is None for block in pruned.blocks)
    for block in trained.blocks:
        assert block["recovery"]["after"] < block["recovery"]["before"]
    assert trained.sparsity.achieved == pruned.sparsity.achieved
    first = trained.blocks[0]["name"]
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any(name.endswith("weight") and before[name].dim() > 1 for name in changed)
    assert any(before[name].dim() == 1 for name in changed)  # norms and biases, too
    for name in before:  # in the first block, the masks are those of the same pruning
        if first in name or first.removeprefix("model.") in name:
            assert (
                torch.equal(after[name][before[name] == 0], before[name][before[name] == 0]) or before[name].dim() == 1
            )


def test_what_is_no_slot_is_not_trained(tmp_path: Path, prune_here: Prune) -> None:
    model = make(tmp_path / "m", "mixtral")
    prune_here(model, tmp_path / "out", *TRAINED, "exclude=*.self_attn.*")
    dense, after = load_file(model / "model.safetensors"), weights(tmp_path / "out")
    same = [name for name in dense if torch.equal(dense[name], after[name])]
    assert {name for name in dense if "gate.weight" in name or "self_attn" in name or "embed" in name} <= set(same)


def test_a_block_that_gets_no_better_keeps_every_bit(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    prune_here(llama, tmp_path / "pruned", "metric=wanda", "calib.n_samples=16")
    report = prune_here(llama, tmp_path / "trained", *TRAINED, "recover.lr=1e6")
    assert [block["recovery"]["epochs"] for block in report.blocks] == [0, 0]
    assert any("got no better by training" in warning for warning in report.warnings)
    assert digest(tmp_path / "pruned") == digest(tmp_path / "trained")


def test_the_same_command_gives_the_same_bytes_and_another_seed_others(
    llama: Path, tmp_path: Path, prune_here: Prune
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prune_here(llama, tmp_path / name, *TRAINED, f"recover.seed={seed}")
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


@pytest.mark.parametrize("target", ["block", "model"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    model = make(tmp_path / "m", "llama", num_hidden_layers=4)
    options = (*TRAINED, f"recover.target={target}")
    straight = prune_here(model, tmp_path / "straight", *options)
    write, left = CheckpointWriter.write, [9 * 2 + 3]  # 7 matrices and 2 norms a block: inside the third

    def stop(writer: CheckpointWriter, name: str, tensor: torch.Tensor) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        write(writer, name, tensor)

    monkeypatch.setattr(CheckpointWriter, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        prune_here(model, tmp_path / "broken", *options)
    monkeypatch.undo()
    report = prune_here(model, tmp_path / "broken", *options)
    assert digest(tmp_path / "broken") == digest(tmp_path / "straight")
    assert [block["recovery"] for block in report.blocks] == [block["recovery"] for block in straight.blocks]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_16_bits_and_several_batches(tmp_path: Path, prune_here: Prune, dtype: str) -> None:
    model = make(tmp_path / "m", "gemma2", dtype=torch.bfloat16)
    report = prune_here(model, tmp_path / "out", *TRAINED, f"dtype={dtype}", "recover.lr=1e-3")
    assert all(block["recovery"]["after"] < block["recovery"]["before"] for block in report.blocks)
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}


def test_a_metric_without_statistics_recovers_too(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    report = prune_here(llama, tmp_path / "out", *TRAINED, "metric=magnitude")
    assert all(block["recovery"]["after"] < block["recovery"]["before"] for block in report.blocks)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("recover.epochs=0", "must be at least 1"), ("recover.lr=0", "above 0"), ("recover.lr=nan", "finite"),
        ("recover.batch=0", "at least 1"), ("recover.held_out=1", "between 0 and 1"), ("recover.seed=-1", "between"),
        ("propagate=dense", "recover needs"),
    ],
)  # fmt: skip
def test_bad_options_are_one_line(configure: Callable[..., object], override: str, said: str) -> None:
    with pytest.raises(AceError, match=said):
        configure("model.path=x", "model=custom", "recover=blocks", override)


def test_the_split_keeps_something_to_train_on() -> None:
    assert split(1, 0.1) == ([0], [0])
    assert split(2, 0.1) == ([0], [1])
    assert split(32, 0.1) == (list(range(29)), [29, 30, 31])


# --- the whole model -------------------------------------------------------------------------------------------------

TAUGHT = (
    "metric=wanda",
    "recover=distill",
    "recover.batch=64",
    "recover.lr=3e-3",
    "calib.n_samples=16",
    "recover.windows=16",
    "recover.epochs=2",
)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_the_whole_model_predicts_more_like_the_dense_one(tmp_path: Path, prune_here: Prune, family: str) -> None:
    model = make(tmp_path / "m", family)
    prune_here(model, tmp_path / "pruned", "metric=wanda", "sparsity=2:4", "calib.n_samples=16")
    report = prune_here(model, tmp_path / "taught", *TAUGHT, "sparsity=2:4")
    before, after = weights(tmp_path / "pruned"), weights(tmp_path / "taught")
    assert report.recovery is not None
    assert report.recovery["after"] < report.recovery["before"]
    assert any(not torch.equal(before[name], after[name]) for name in before)
    slots = {slot["name"].rpartition(".")[0] if slot["name"][-1].isdigit() else slot["name"] for slot in report.slots}
    for name in before:
        if before[name].dim() > 1:
            assert not after[name][before[name] == 0].any()
        if before[name].dim() > 1 and name not in slots:
            assert torch.equal(before[name], after[name]), name  # embeddings, head, routers


def test_the_divergence_is_that_of_the_whole_models(tmp_path: Path, prune_here: Prune, documents: Path) -> None:
    """Before any training: mean KL over the held-out windows, from transformers' own models in float64."""
    from tiny_models import add_tokenizer
    from transformers import AutoModelForCausalLM

    model = add_tokenizer(make(tmp_path / "m", "llama"))
    options = ("calib=text", f"calib.path={documents}", "calib.n_samples=8", "calib.seq_len=16")
    prune_here(model, tmp_path / "pruned", "metric=wanda", *options)
    report = prune_here(model, tmp_path / "taught", *TAUGHT, *options, "recover.held_out=0.5", "recover.batch=16",
                        "recover.windows=8")  # fmt: skip
    config = composed("model=custom", f"model.path={model}", "metric=wanda", *options)
    ids_NL = config.calib.windows(Checkpoint(model), "cpu")[4:]
    log_p, log_q = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)(ids_NL).logits.log_softmax(-1)
        for folder in (model, tmp_path / "pruned" / "checkpoint")
    )
    divergence = float((log_p.detach().exp() * (log_p - log_q).detach()).sum(-1).mean())
    assert report.recovery is not None
    assert report.recovery["before"] == pytest.approx(divergence, rel=0.05)  # products in bfloat16 where they are fast


def test_an_interrupted_training_goes_on_to_the_same_bytes(
    llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = prune_here(llama, tmp_path / "straight", *TAUGHT)
    for moment in ("epoch", "replacing", "described"):
        report = interrupted(moment, llama, tmp_path / moment, prune_here, monkeypatch)
        assert digest(tmp_path / moment) == digest(tmp_path / "straight")
        assert report.recovery == straight.recovery
        assert not (tmp_path / moment / "checkpoint.training").exists()


def interrupted(moment: str, llama: Path, out: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch) -> Report:
    """A run that is stopped at this moment of its training, and goes on. No epoch is trained twice."""
    epochs = []
    original = Fit._epoch

    def epoch(fit: Fit, step: Callable[[], None]) -> None:
        if moment == "epoch" and len(epochs) == 1:
            epochs.append("stopped")
            raise KeyboardInterrupt
        epochs.append("done")
        original(fit, step)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Fit, "_epoch", epoch)
    if moment == "replacing":
        monkeypatch.setattr("ace_cli.run.recover_checkpoint._move", stop)
    if moment == "described":
        monkeypatch.setattr("ace_cli.run.prune_checkpoint.forget_training", stop)
    if moment != "epoch":
        monkeypatch.setattr(Fit, "_save", lambda fit: None)
    with pytest.raises(KeyboardInterrupt):
        prune_here(llama, out, *TAUGHT)
    monkeypatch.undo()
    monkeypatch.setattr(Fit, "_epoch", epoch)
    report = prune_here(llama, out, *TAUGHT)
    monkeypatch.undo()
    assert epochs.count("done") == 2
    return report


def test_a_training_that_gains_nothing_changes_nothing(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    prune_here(llama, tmp_path / "pruned", "metric=wanda", "calib.n_samples=16")
    report = prune_here(llama, tmp_path / "taught", *TAUGHT, "recover.lr=1e4")
    assert report.recovery is not None
    assert report.recovery["epochs"] == 0
    assert digest(tmp_path / "pruned") == digest(tmp_path / "taught")


def test_too_little_memory_for_the_whole_model_is_one_line(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    with pytest.raises(AceError, match=r"recover=distill needs .* GB of memory.*recover=blocks"):
        prune_here(llama, tmp_path / "out", *TAUGHT, "memory_gb=1")


def test_the_divergence_and_its_gradient_are_those_of_the_formula() -> None:
    torch.manual_seed(0)
    student_TV = torch.randn(130, 11, requires_grad=True)
    teacher_TV = torch.randn(130, 11)
    (3 * divergence(student_TV, teacher_TV)).backward()
    slow_TV = student_TV.detach().double().requires_grad_(True)
    p_TV, q_TV = teacher_TV.double().softmax(-1), slow_TV.softmax(-1)
    slow = (p_TV * (p_TV / q_TV).log()).sum()
    (3 * slow).backward()
    assert float(divergence(student_TV.detach(), teacher_TV)) == pytest.approx(float(slow), rel=1e-5)
    assert student_TV.grad is not None
    assert slow_TV.grad is not None
    assert torch.allclose(student_TV.grad, slow_TV.grad.float(), atol=1e-6)


def test_blocks_first_then_the_whole(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    options = (*TAUGHT, "recover=both", "recover.block_lr=3e-3", "recover.lr=1e-3", "sparsity=2:4")
    report = prune_here(llama, tmp_path / "both", *(each for each in options if each != "recover=distill"))
    assert report.recovery is not None
    assert report.recovery["after"] < report.recovery["before"]
    assert all(block["recovery"]["after"] < block["recovery"]["before"] for block in report.blocks)
    assert report.sparsity.achieved == pytest.approx(0.5, abs=0.01)


def test_bad_options_of_both_name_their_own(configure: Callable[..., object]) -> None:
    with pytest.raises(AceError, match=r"recover.block_epochs=0: must be at least 1"):
        configure("model.path=x", "model=custom", "recover=both", "recover.block_epochs=0")


@pytest.mark.parametrize(("count", "given", "expected"), [
    (128, {}, (128, 15)), (1, {}, (1, 1)), (4, {"held_out": 0.99}, (4, 4)),  # at most as many again
    (128, {"windows": 384}, (346, 38)), (128, {"windows": 16}, (14, 2)), (128, {"windows": 2, "held_out": 0.9}, (1, 1)),
])  # fmt: skip
def test_how_many_windows_are_held_out(count: int, given: dict[str, Any], expected: tuple[int, int]) -> None:
    assert Distill(**given).trained_on(count) == expected


@pytest.mark.parametrize("more", [(), ("calib.pack=24",), ("calib.n_samples=1",), ("calib.n_samples=100",)])
def test_what_is_held_out_is_nothing_that_pruning_saw(
    documents: Path, llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch, more: tuple[str]
) -> None:
    """They are the windows that a larger draw would have next; training has those that prune."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch(*given: Any) -> RecoveryFacts:
        seen.append(given[3:5])
        return RecoveryFacts(1, 1, 0)

    monkeypatch.setattr(Distill, "recover_model", watch)
    options = ("calib=text", f"calib.path={documents}", "calib.seq_len=8", "calib.n_samples=12", *more)
    prune_here(llama, tmp_path / "out", "metric=wanda", *options, "recover=distill")
    config = composed("model=custom", f"model.path={llama}", *options)
    ((trained_NL, held_NL),) = seen
    assert torch.equal(trained_NL, config.calib.windows(Checkpoint(llama), "cpu"))
    assert len(held_NL) == math.ceil(len(trained_NL) / 9)
    drawn = config.calib.source.draw(Checkpoint(llama), 200, 8, 0, "cpu")
    drawn = config.calib.source.begin(drawn, Checkpoint(llama))
    drawn = drawn.flatten()[: 1200 // config.calib.length * config.calib.length].reshape(-1, config.calib.length)
    assert torch.equal(torch.cat([trained_NL, held_NL]), drawn[: len(trained_NL) + len(held_NL)])


@pytest.mark.parametrize("how", ["calib.continue_to=12", "calib.pack=24"])
def test_windows_that_follow_are_made_like_those_before(documents: Path, llama: Path, how: str) -> None:
    options = ("calib=text", f"calib.path={documents}", "calib.seq_len=8", "calib.n_samples=9", how)
    config = composed("model=custom", f"model.path={llama}", *options)
    source = Checkpoint(llama)
    windows_NL = config.calib.windows(source, "cpu")
    more_NL = config.calib.windows(source, "cpu", more=2)
    assert len(more_NL) == len(windows_NL) + 2
    assert torch.equal(more_NL[: len(windows_NL)], windows_NL)
    assert more_NL.unique(dim=0).shape == more_NL.shape


def test_more_windows_than_the_text_has(
    documents: Path, llama: Path, tmp_path: Path, prune_here: Prune, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many as prune were there: by default it is said, and goes on; what was asked for is an error."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(documents.read_text().splitlines(keepends=True)[:1]))
    options = (*(each for each in TAUGHT if "windows" not in each), "calib=text", f"calib.path={few}")
    report = prune_here(llama, tmp_path / "out", *options, "calib.n_samples=40", "calib.seq_len=16")
    assert report.recovery is not None
    assert "the text has no more windows" in capsys.readouterr().out
    with pytest.raises(AceError, match="Too few long documents"):
        prune_here(llama, tmp_path / "more", *options, "calib.seq_len=16", "recover.windows=60")


# --- a learning rate that is too high --------------------------------------------------------------------------------


def test_blocks_that_get_worse_begin_again_with_a_lower_rate(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    report = prune_here(llama, tmp_path / "out", *TRAINED, "recover.lr=0.1", "sparsity=2:4")
    for block in report.blocks:
        assert block["recovery"]["lowered"] > 0
        assert block["recovery"]["after"] < block["recovery"]["before"]


def test_a_lowered_rate_is_that_rate(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    begun = prune_here(llama, tmp_path / "begun", *TAUGHT, "recover.lr=0.9", "sparsity=2:4")
    assert begun.recovery is not None
    lowered = begun.recovery["lowered"]
    assert lowered > 0
    assert begun.recovery["after"] < begun.recovery["before"]
    known = prune_here(llama, tmp_path / "known", *TAUGHT, f"recover.lr={0.9 * LOWER**lowered!r}", "sparsity=2:4")
    assert known.recovery == {**begun.recovery, "lowered": 0}
    assert digest(tmp_path / "begun") == digest(tmp_path / "known")


def test_a_lowered_rate_outlives_an_interruption(
    llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*TAUGHT, "recover.lr=0.9", "sparsity=2:4")
    straight = prune_here(llama, tmp_path / "straight", *options)
    assert straight.recovery is not None
    assert straight.recovery["lowered"] > 0
    save, left = Fit._save, [2]

    def stop(fit: Fit) -> None:
        save(fit)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Fit, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        prune_here(llama, tmp_path / "stopped", *options)
    monkeypatch.undo()
    again = prune_here(llama, tmp_path / "stopped", *options)
    assert again.recovery == straight.recovery
    assert digest(tmp_path / "stopped") == digest(tmp_path / "straight")


# --- the disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recover", ["recover=distill", "recover=both"])
def test_what_training_keeps_on_disk_is_asked_for_before_work(
    llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch, recover: str
) -> None:
    """Twice 16 bytes for each weight that is trained, and the files once more."""
    room, usage = [0], shutil.disk_usage

    def free(path: Any) -> Any:
        found = usage(path)
        return type(found)(found.total, found.used, room[0])

    monkeypatch.setattr(shutil, "disk_usage", free)
    stored = load_file(llama / "model.safetensors")
    trained = sum(weight.numel() for name, weight in stored.items() if "_proj" in name)
    more = 32 * trained + sum(weight.nbytes for weight in stored.values())
    plain = sum(weight.nbytes for weight in stored.values())
    room[0] = round(1.01 * (plain + more)) + 50_000
    prune_here(llama, tmp_path / "enough", "metric=wanda", recover, "recover.epochs=1")
    room[0] = plain + more - 50_000
    with pytest.raises(AceError, match=r"needs .* GB of disk"):
        prune_here(llama, tmp_path / "less", "metric=wanda", recover)


def test_a_disk_that_is_full_meanwhile_loses_nothing(
    llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = prune_here(llama, tmp_path / "straight", *TAUGHT)
    save, left = safetensors.torch.save_file, [1]

    def full(tensors: Any, file: Path, words: Any) -> None:
        save(tensors, file, words)
        left[0] -= 1
        if left[0] < 0:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(AceError, match=r"No space left on device: .*repeat the command"):
        prune_here(llama, tmp_path / "full", *TAUGHT)
    monkeypatch.undo()
    assert not list(tmp_path.glob("full/**/*.partial"))[1:]  # the folder of the checkpoint alone
    again = prune_here(llama, tmp_path / "full", *TAUGHT)
    assert again.recovery == straight.recovery
    assert digest(tmp_path / "full") == digest(tmp_path / "straight")
