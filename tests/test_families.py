"""Every family, as its own tiny random model: streamed equals whole, pruned files are exact and load."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_models import FAMILIES, load, make, token_windows, weights

from ace_cli.core.timing import Clock
from ace_cli.methods.metrics.wanda import Wanda
from ace_cli.methods.patterns import NofM, Pattern, Scope, parse_sparsity
from ace_cli.methods.repair.none import NoRepair
from ace_cli.model.files import Checkpoint, CheckpointWriter
from ace_cli.model.pruned import write_metadata
from ace_cli.model.slots import Slot
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.engine import prune
from ace_cli.pruning.recipe import Propagate, Recipe
from ace_cli.run.plan import Demand, make_plan

CPU = torch.device("cpu")
#: Longer than the sliding windows of 8.
LENGTH = 20


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp(request.param), request.param)


def streamed(folder: Path, dtype: torch.dtype = torch.float32) -> StreamedModel:
    return StreamedModel(Checkpoint(folder), CPU, dtype)


def stream(model: StreamedModel, ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Each block's output and the logits."""
    (batch,) = model.batches(ids)
    outputs = []
    with torch.inference_mode():
        for index, block in enumerate(model.blocks):
            with model.loaded(block):
                batch.hidden_BLH = model.forward(index, batch)
            outputs.append(batch.hidden_BLH)
        with model.head_loaded():
            return outputs, model.logits(ids, batch.hidden_BLH)


def whole(model: Any, blocks: list[str], ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The same from transformers' own model."""
    outputs = []

    def record(module: object, args: object, output: object) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    for name in blocks:
        model.get_submodule(name).register_forward_hook(record)
    with torch.inference_mode():
        return outputs, model(ids, use_cache=False).logits


def slots_of(model: StreamedModel) -> list[Slot]:
    return [slot for block in model.blocks for slot in block.slots]


def prune_into(folder: Path, out: Path, sparsity: str, model: StreamedModel | None = None) -> list[Slot]:
    model = model or streamed(folder)
    out.mkdir()
    pattern = parse_sparsity(sparsity, Scope.row)
    patterns: dict[str, Pattern] = {slot.name: pattern for slot in slots_of(model)}
    make_plan(model, patterns, Demand())
    writer = CheckpointWriter(model.checkpoint, out)
    recipe = Recipe(Wanda(), patterns, NoRepair(), Propagate.block)
    list(prune(model, list(model.batches(token_windows(4, LENGTH))), recipe, writer, Clock()))
    writer.finish()
    write_metadata(model.checkpoint, out, {"pattern": sparsity}, [], "card")
    return slots_of(model)


def digests(folder: Path) -> dict[str, str]:
    """Name -> dtype, shape and sha256 of the stored bytes."""
    found = {}
    for name, tensor in weights(folder).items():
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        found[name] = f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"
    return found


def test_streamed_blocks_and_logits_equal_the_whole_model_bit_for_bit(folder: Path) -> None:
    """So do all buffers that no file holds: tables are longer than these windows reach."""
    ids = token_windows(3, LENGTH)
    model, ordinary = streamed(folder), load(folder)
    outputs, logits = stream(model, ids)
    expected, expected_logits = whole(ordinary, [block.name for block in model.blocks], ids)
    assert len(outputs) == len(expected) >= 2
    for index, (got, want) in enumerate(zip(outputs, expected, strict=True)):
        assert torch.equal(got, want), f"block {index}"
    assert torch.equal(logits, expected_logits)
    buffers, stored = dict(model.skeleton.named_buffers()), ordinary.state_dict()
    for name, value in ordinary.named_buffers():
        if name not in stored:
            assert torch.equal(buffers[name], value), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_streams_alike_in_sixteen_bits(folder: Path, dtype: torch.dtype) -> None:
    """Also where a class keeps some of its weights in float32."""
    ids = token_windows(2, LENGTH)
    _, logits = stream(streamed(folder, dtype), ids)
    with torch.inference_mode():
        assert torch.equal(logits, load(folder, dtype)(ids, use_cache=False).logits)


@pytest.fixture(scope="module")
def pruned(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Slot]]:
    """The family pruned to 2:4, and its slots."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    return out, prune_into(folder, out, "2:4")


def test_pruned_folder_is_exact_loads_and_computes_the_same(folder: Path, pruned: tuple[Path, list[Slot]]) -> None:
    out, slots = pruned
    before, after = weights(folder), weights(out)
    for slot in slots:
        new_OI, old_OI = slot.in_file(after[slot.key]), slot.in_file(before[slot.key])
        assert new_OI.shape == slot.shape
        assert bool((new_OI.reshape(-1, 4).count_nonzero(dim=1) == 2).all()), slot.name
        kept = new_OI != 0
        assert torch.equal(new_OI, torch.where(kept, old_OI, torch.zeros(()))), slot.name
        assert not bool(torch.signbit(new_OI[~kept]).any()), f"{slot.name} holds -0.0"
    ids = token_windows(2, LENGTH, seed=1)
    _, logits = stream(streamed(out), ids)
    with torch.inference_mode():
        assert torch.equal(logits, load(out)(ids, use_cache=False).logits)


def test_everything_but_the_slots_is_byte_identical(folder: Path, pruned: tuple[Path, list[Slot]]) -> None:
    out, slots = pruned
    before, after = digests(folder), digests(out)
    assert list(before) == list(after)
    assert {name for name in before if before[name] != after[name]} == {slot.key for slot in slots}
    described = {name: text.rsplit(" ", 1)[0] for name, text in before.items()}
    assert described == {name: text.rsplit(" ", 1)[0] for name, text in after.items()}


def test_the_blocks_are_pruned_but_for_routers(folder: Path) -> None:
    """Every matrix of the blocks is a slot, or is named with the reason why it is not."""
    model = streamed(folder)
    plan = make_plan(model, dict.fromkeys((slot.name for slot in slots_of(model)), NofM(2, 4)), Demand())
    named = [pair for block in model.blocks for pair in block.module.named_parameters()]
    whole = sum(p.numel() for name, p in named if p.dim() >= 2 and not name.endswith("bias"))
    left = sum(left.count for block in model.blocks for left in block.left.values())
    assert plan.slot_weights + left == whole
    assert plan.coverage > 0.97
    assert all("(router)" in name for name in plan.left_dense)


def test_twice_gives_the_same_bytes(folder: Path, pruned: tuple[Path, list[Slot]], tmp_path: Path) -> None:
    prune_into(folder, tmp_path / "again", "2:4")
    assert digests(pruned[0]) == digests(tmp_path / "again")


def test_a_ratio_is_exact_in_each_row(tmp_path: Path) -> None:
    for family in ("llama", "gpt2", "mixtral", "gpt_oss"):
        folder, out = make(tmp_path / family, family), tmp_path / f"{family}_out"
        slots = prune_into(folder, out, "0.5")
        after = weights(out)
        for slot in slots:
            new_OI = slot.in_file(after[slot.key])
            assert bool((new_OI.count_nonzero(dim=1) == new_OI.shape[1] // 2).all()), slot.name


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    for family in ("gemma", "opt", "bloom"):
        folder, out = make(tmp_path / family, family), tmp_path / f"{family}_out"
        prune_into(folder, out, "2:4")
        model = load(out)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert not any("lm_head" in name for name in weights(out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=lambda d: f"in {d}")
def test_stored_dtype_is_kept_whatever_is_computed_in(tmp_path: Path, dtype: torch.dtype, compute: torch.dtype) -> None:
    folder = make(tmp_path / "model", "llama", dtype)
    names = {slot.key for slot in prune_into(folder, tmp_path / "out", "2:4", streamed(folder, compute))}
    before, after = weights(folder), weights(tmp_path / "out")
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    for name, tensor in after.items():
        kept = tensor != 0 if name in names else torch.ones_like(tensor, dtype=torch.bool)
        assert torch.equal(tensor[kept], before[name][kept]), name
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    ids = token_windows(2, LENGTH)
    _, logits = stream(streamed(tmp_path / "out", compute), ids)
    with torch.inference_mode():
        assert torch.equal(logits, load(tmp_path / "out", compute)(ids, use_cache=False).logits)
