"""The one loop: load a block, observe its inputs, score, select, repair, write, move on.

Knows the base types of metrics, patterns and repairs, never a concrete one; prints nothing; yields a fact per block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ace_cli.clock import Clock
from ace_cli.errors import AceError
from ace_cli.metrics.base import Metric
from ace_cli.model.files import DTYPES, CheckpointWriter
from ace_cli.model.streamed import Batch, Block, Slot, StreamedModel
from ace_cli.patterns import Pattern
from ace_cli.propagate import Propagate
from ace_cli.repair.base import Repair
from ace_cli.statistics import Seen, Statistic


@dataclass(frozen=True)
class Recipe:
    """The four choices of a run; ``patterns`` is what the allocation made of the sparsity asked for, by slot name."""

    metric: Metric
    patterns: Mapping[str, Pattern]
    repair: Repair
    propagate: Propagate


@dataclass(frozen=True)
class SlotFacts:
    """What became of one slot. ``zeros`` are counted in the stored weight; ``tokens`` is what its statistics saw."""

    name: str
    shape: tuple[int, int]
    pattern: str
    pruned: int
    zeros: int
    tokens: int
    diagnosis: dict[str, float]
    notes: list[str]


@dataclass(frozen=True)
class BlockFacts:
    """One finished block; its weights are in the writer's files."""

    index: int
    name: str
    slots: list[SlotFacts]
    seconds: float


def prune(
    model: StreamedModel, batches: list[Batch], recipe: Recipe, writer: CheckpointWriter, clock: Clock
) -> Iterator[BlockFacts]:
    """Prune every slot of ``model``, writing each finished block; replaces the hidden states in ``batches``.

    Raises AceError when weights or activations are not finite.
    """
    wanted = tuple(dict.fromkeys((*recipe.metric.needs(), *recipe.repair.needs())))
    for index, block in enumerate(model.blocks):
        before = sum(clock.seconds.values())
        last = index == len(model.blocks) - 1
        with torch.inference_mode(), _timed_load(model, block, clock):
            with clock("observe"):
                seen = _observe(model, index, batches, wanted, advance=recipe.propagate is Propagate.dense)
            facts = [_prune_slot(model, slot, seen[slot.name], recipe, writer, clock) for slot in block.slots]
            with clock("write"):
                writer.copy(sorted(set(block.keys.values()) - {slot.name for slot in block.slots}))
            if wanted and recipe.propagate is Propagate.block and not last:
                with clock("forward"):
                    _advance(model, index, batches)
        yield BlockFacts(index, block.name, facts, sum(clock.seconds.values()) - before)


@contextmanager
def _timed_load(model: StreamedModel, block: Block, clock: Clock) -> Iterator[None]:
    """``model.loaded`` with the time it takes under "load"."""
    context = model.loaded(block)
    with clock("load"):
        context.__enter__()
    try:
        yield
    finally:
        context.__exit__(None, None, None)


def _observe(
    model: StreamedModel, index: int, batches: list[Batch], wanted: tuple[Statistic, ...], advance: bool
) -> dict[str, Seen]:
    """Run the dense block on every batch; slot name -> its statistics."""
    block = model.blocks[index]
    seen = {slot.name: Seen(wanted) for slot in block.slots}
    if not wanted:
        return seen
    watcher = _Watcher(block.slots, seen)
    with watcher.watching():
        for batch in batches:
            out_BLH = model.forward(index, batch)
            _check_finite(out_BLH, f"the output of {block.name}")
            if advance:
                batch.hidden_BLH = out_BLH
    return seen


def _advance(model: StreamedModel, index: int, batches: list[Batch]) -> None:
    for batch in batches:
        batch.hidden_BLH = model.forward(index, batch)


@dataclass
class _Watcher:
    """Feeds the slots' statistics from forward hooks. Slots that read the same tensor share input-only statistics."""

    slots: list[Slot]
    seen: dict[str, Seen]
    _leader: dict[str, str] = field(default_factory=dict)
    _input: Tensor | None = None
    _reader: str = ""

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [slot.module.register_forward_hook(self._hook(slot)) for slot in self.slots]
        try:
            yield
        finally:
            self._input = None
            for handle in handles:
                handle.remove()

    def _hook(self, slot: Slot) -> Any:
        def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._update(slot, args[0], output)

        return watch

    def _update(self, slot: Slot, x: Tensor, y: Tensor) -> None:
        seen = self.seen[slot.name]
        if slot.name not in self._leader:  # the first batch decides who observes for whom
            same = self._input is x
            self._leader[slot.name] = self._leader[self._reader] if same else slot.name
            if same:
                seen.share(self.seen[self._leader[slot.name]])
        self._input, self._reader = x, slot.name
        follows = self._leader[slot.name] != slot.name
        due = [statistic for statistic in seen if statistic.needs_output or not follows]
        if due:
            x_TI, y_TO = x.reshape(-1, x.shape[-1]).float(), y.reshape(-1, y.shape[-1]).float()
            for statistic in due:
                statistic.update(x_TI, y_TO, slot.weight_OI)


def _prune_slot(
    model: StreamedModel, slot: Slot, seen: Seen, recipe: Recipe, writer: CheckpointWriter, clock: Clock
) -> SlotFacts:
    pattern = recipe.patterns[slot.name]
    tokens = max((statistic.tokens for statistic in seen), default=0)
    with clock("score"):
        dense_OI = _stored_weight(model, slot)
        _check_finite(dense_OI, slot.name)
        if recipe.metric.needs() and not tokens:
            raise AceError(f"No calibration token reached {slot.name}.", "Use more windows, or metric=magnitude.")
        score_OI = recipe.metric.score(dense_OI, seen)
        _check_finite(score_OI, f"the score of {slot.name}")
    with clock("select"):
        keep_OI = pattern.keep(score_OI)
    with clock("repair"):
        repaired = recipe.repair.repair(dense_OI, keep_OI, seen, pattern)
    with clock("write"):
        stored = getattr(torch, DTYPES[model.checkpoint.tensors[slot.name].dtype][0])
        new_OI = repaired.weight_OI.masked_fill(~repaired.keep_OI, 0).to(stored)
        writer.write(slot.name, new_OI)
        slot.module.weight = nn.Parameter(new_OI.to(model.dtype), requires_grad=False)
        zeros = new_OI.numel() - int(new_OI.count_nonzero())
    return SlotFacts(
        slot.name, slot.shape, str(pattern), new_OI.numel() - int(repaired.keep_OI.sum()), zeros, tokens,
        recipe.metric.diagnose(seen), repaired.notes,
    )  # fmt: skip


def _stored_weight(model: StreamedModel, slot: Slot) -> Tensor:
    """The slot's weight as the file has it, float32 (O, I): read again where the compute dtype has fewer digits."""
    dtype = model.checkpoint.tensors[slot.name].dtype
    if model.dtype in (torch.float32, getattr(torch, DTYPES[dtype][0])):
        return slot.weight_OI.float()
    return model.checkpoint.read(slot.name).to(model.device, torch.float32)


def _check_finite(values: Tensor, what: str) -> None:
    """A sum is finite only if every value is: one pass, no temporary."""
    if not bool(values.float().sum().isfinite()):
        hint = "The file may be damaged, or the compute dtype too narrow: try dtype=float32."
        raise AceError(f"NaN or Inf in {what}.", hint)
