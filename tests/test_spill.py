"""Hidden states on disk: the same bits as in memory, room used again, nothing left behind, budgets refused."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import token_windows

from ace_cli.core.errors import AceError
from ace_cli.evaluation.perplexity import window_losses
from ace_cli.model import streamed
from ace_cli.model.files import Checkpoint
from ace_cli.model.spill import Spill, SpilledBatch, kept
from ace_cli.model.streamed import StreamedModel
from ace_cli.report.facts import Report
from ace_cli.run.plan import Plan

Prune = Callable[..., Report]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_come_back_bit_for_bit_and_room_is_used_again(tmp_path: Path, dtype: torch.dtype) -> None:
    spill = Spill(tmp_path)
    tensors = [torch.randn(2, 3, 8).to(dtype), torch.randn(1, 3, 8).to(dtype), torch.randn(2, 8, 3).mT.to(dtype)]
    stored = [spill.put(tensor) for tensor in tensors]
    for tensor, one in zip(tensors, stored, strict=True):
        assert one.get().dtype == dtype
        assert torch.equal(one.get(), tensor)
    end = spill._end
    del stored[0]
    stored.append(spill.put(tensors[0] + 1))
    assert spill._end == end
    assert torch.equal(stored[0].get(), tensors[1])
    assert torch.equal(stored[-1].get(), tensors[0] + 1)
    assert list(tmp_path.iterdir()) == []


def test_a_copied_batch_keeps_what_it_had(llama: Path, tmp_path: Path) -> None:
    model = StreamedModel(Checkpoint(llama), torch.device("cpu"), torch.float32)
    (batch,) = kept(model.batches(token_windows(2, 8)), Spill(tmp_path))
    assert isinstance(batch, SpilledBatch)
    before, other = batch.hidden_BLH, copy.copy(batch)
    batch.hidden_BLH = before + 1
    assert torch.equal(other.hidden_BLH, before)
    assert torch.equal(batch.hidden_BLH, before + 1)


def test_perplexity_is_the_same_from_disk(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "BATCH_BYTES", 0)
    monkeypatch.setattr(streamed, "BATCH_TOKENS", 64)
    model = StreamedModel(Checkpoint(llama), torch.device("cpu"), torch.float32)
    ids = token_windows(9, 32)
    assert window_losses(model, ids) == window_losses(model, ids, spill=Spill(tmp_path))


def weights_digest(report: Report) -> str:
    return hashlib.sha256((Path(report.checkpoint) / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("options", [
    ("metric=wanda", "propagate=sublayer"), ("metric=cosp", "propagate=block"), ("metric=varp", "propagate=dense"),
    ("metric=wanda", "allocation=owl", "allocation.lam=0.02"), ("metric=wanda", "catch_up=0.5"),
])  # fmt: skip
def test_a_run_that_spills_writes_the_same_bytes(
    llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    """Several batches of several windows, the last one smaller."""
    monkeypatch.setattr(streamed, "BATCH_TOKENS", 64)
    monkeypatch.setattr(streamed, "BATCH_BYTES", 0)
    monkeypatch.setattr(StreamedModel, "batch_tokens", property(lambda _: 48))
    used = []
    monkeypatch.setattr(Spill, "put", lambda self, tensor, put=Spill.put: used.append(1) or put(self, tensor))
    in_memory = prune_here(llama, tmp_path / "memory", "calib.n_samples=8", "calib.seq_len=16", *options)
    assert not used
    monkeypatch.setattr(Plan, "spills", lambda self, tokens: True)
    on_disk = prune_here(llama, tmp_path / "disk", "calib.n_samples=8", "calib.seq_len=16", *options)
    assert len(used) >= 6
    assert weights_digest(on_disk) == weights_digest(in_memory)
    assert sorted(file.name for file in (tmp_path / "disk").iterdir() if not file.name.startswith(".")) == [
        "checkpoint", "report.json", "report.md", "run.log",
    ]  # fmt: skip


def test_the_budget_decides_and_too_small_a_one_is_refused(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    with pytest.raises(AceError, match=r"needs 0\.5\d GB of memory at least, it may use 0\.20 GB") as caught:
        prune_here(llama, tmp_path / "out", "metric=wanda", "memory_gb=0.2")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_memory_gb_must_be_a_size(configure: Callable[..., object]) -> None:
    with pytest.raises(AceError, match=r"memory_gb=-1\.0: must be more than 0"):
        configure("model=custom", "model.path=x", "memory_gb=-1")
