"""Whole blocks that go: which, and what the block before a gap is taught so that the states behind it stay close.

Shapes: B windows, L tokens in a window, H hidden size, T tokens, I inputs.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ace_cli.core.errors import AceError
from ace_cli.core.memory import Trimmer
from ace_cli.kernels.finite_checks import check_finite
from ace_cli.methods.metrics.base import Metric
from ace_cli.methods.repair.base import Repaired
from ace_cli.methods.statistics import Gram
from ace_cli.methods.units import equal_width
from ace_cli.model.calls import Batch
from ace_cli.model.cuts import Numbered, Renamed, renumbered
from ace_cli.model.depth_config import depth_changes, numbered_blocks
from ace_cli.model.files import Checkpoint, hash_of_tensor
from ace_cli.model.header import TensorEntry
from ace_cli.model.proven_config import Place
from ace_cli.model.slots import Slot
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.cutting import Cutting, kind_of
from ace_cli.pruning.facts import BlockFacts, SlotFacts
from ace_cli.pruning.observer import hooked
from ace_cli.pruning.orders import Order
from ace_cli.pruning.slot_pruner import SlotPruner
from ace_cli.pruning.units.block import Choose, Depth

#: How far the output may be from linear in the last weight, relative; in float32, and in dtypes of fewer digits.
_LINEAR, _EPS = 1e-3, 16


@dataclass
class DepthCutting(Cutting):
    """Blocks of ``model`` that go. ``kept``: those that stay; until ``keep`` says otherwise all but the middle ones."""

    by_slots = False
    beside = 1  # of the gap, where states go through it
    kept: list[int] = field(init=False)
    numbered: Numbered = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.model.blocks)
        self.numbered = numbered_blocks(self.model)
        self.couplings = ((),) * count
        self.stay, self.kept = {self.numbered.before.rstrip("."): count}, list(range(count))
        self._last = self._last_weights()

    def _last_weights(self) -> set[str]:
        """Of each block the weight that runs last: only its output can be the block's, but for what is added to it."""
        found: dict[Any, int] = {}
        last = set()
        with torch.no_grad():
            for index, block in enumerate(self.model.blocks):
                if kind_of(block) not in found:
                    with self.model.loaded(block):
                        found[kind_of(block)] = _last_reached(self.model, index)
                last |= {block.layers[place].name for place in [found[kind_of(block)]] if place >= 0}
        return last

    @property
    def order(self) -> type[Order]:  # type: ignore[override]
        """Blocks are run, not observed slot by slot."""
        return Follow

    @property
    def pruner(self) -> type[SlotPruner]:
        return DepthPruner

    @property
    def watched(self) -> StreamedModel:
        """The model whose slots are the last weight of each block: what may be refitted."""
        return self.model.watching(self._last) if self._last else self.model

    @property
    def planned(self) -> StreamedModel:
        return self.model

    @property
    def looks(self) -> int:  # type: ignore[override]
        assert isinstance(self.unit, Depth)
        return len(self.goes) if self.unit.choose is Choose.one_by_one else 1

    def ask(self, share: Fraction, keep: int | None) -> None:
        """So many blocks stay; for now, all but the middle ones. AceError if none would, or all."""
        count = len(self.model.blocks)
        if keep is not None and not 0 < keep <= count:
            raise AceError(f"keep={keep}: the model has {count} blocks.", f"Give 1 to {count - 1}.")
        stay = keep or equal_width("block", count, share, 1)
        first = stay - stay // 2
        self.keep([*range(first), *range(first + count - stay, count)])

    def described(self, on_average: bool) -> str:
        return self.words()

    def words(self) -> str:
        return f"{len(self.kept)} of {len(self.model.blocks)} blocks stay"

    def keep(self, kept: Sequence[int]) -> None:
        """These blocks stay."""
        self.kept = sorted(kept)
        self.stay = dict.fromkeys(self.stay, len(kept))

    @property
    def goes(self) -> list[int]:
        """The blocks that do not."""
        return [index for index in range(len(self.model.blocks)) if index not in self.kept]

    def gap_behind(self, index: int) -> list[int]:
        """The blocks that go right behind block ``index``."""
        end = next((kept for kept in self.kept if kept > index), len(self.model.blocks))
        return list(range(index + 1, end))

    def choose(self, batches: list[Batch], metric: Metric, on_block: Callable[[int], None]) -> list[int]:
        assert isinstance(self.unit, Depth)
        goes = least_important(self.model, batches, metric, len(self.goes), self.unit.choose, on_block)
        self.keep([index for index in range(len(self.model.blocks)) if index not in goes])
        return goes

    def runs(self, index: int) -> bool:
        return index in self.kept

    def taught(self, index: int, of_model: bool) -> list[int] | None:
        gap = self.gap_behind(index)
        return gap if index in self.kept and (gap or of_model) else None

    def entries(self) -> dict[str, TensorEntry]:
        return renumbered(self.model.checkpoint, self.numbered, self.kept).tensors

    def changes(self) -> dict[Place, Any] | None:
        found = depth_changes(self.model, self.numbered, self.kept)
        self.why_not = f" ({found})" if isinstance(found, str) else ""
        return None if isinstance(found, str) else found

    def replay(self, batches: list[Batch], blocks: list[BlockFacts], written: Checkpoint, dense: bool) -> None:
        names = {key: new for key in self.model.checkpoint.tensors if (new := self.numbered.moved(key, self.kept))}
        model = self.model.reading(Renamed(written, names))
        with torch.no_grad():
            for index in (index for index in self.kept if index < len(blocks)):
                with model.loaded(model.blocks[index]):
                    model.advance(index, batches)

    def manifest(self, blocks: Iterable[BlockFacts], entries: Mapping[str, TensorEntry]) -> list[dict[str, Any]]:
        source = self.model.checkpoint
        found = {self.numbered.moved(key, self.kept): digest for key, digest in dict(source.digests).items()}
        found |= {key: digest for block in blocks for slot in block.slots for key, digest in slot.digests.items()}
        fewer = sum(entry.numel for entry in source.tensors.values()) - sum(entry.numel for entry in entries.values())
        tensors = {key: entry for key, entry in entries.items() if self.numbered.number(key) is not None}
        return [
            {
                "name": next(iter(self.stay)), "units": len(self.model.blocks), "pattern": self.words(),
                "fewer": fewer, "kept": self.kept,
                "tensors": {key: {"shape": list(entry.shape), "xxh3": found[key]} for key, entry in tensors.items()},
            }
        ]  # fmt: skip


def _last_reached(model: StreamedModel, index: int) -> int:
    """Which of a loaded block's layers runs last and puts out hidden states; -1 if none does."""
    reached: list[Slot] = []
    layers = model.blocks[index].layers
    (batch,) = model.batches((torch.arange(8) % model.vocabulary).view(1, 8))
    with hooked(layers, lambda slot, x, y: reached.append(slot), before=False):
        width = model.forward(index, batch).shape[-1]
    if not reached or reached[-1].shape[0] != width:
        return -1
    return next(place for place, slot in enumerate(layers) if slot is reached[-1])


# --- which -----------------------------------------------------------------------------------------------------------


def least_important(
    model: StreamedModel, batches: list[Batch], metric: Metric, count: int, choose: Choose,
    on_block: Callable[[int], None] = lambda _: None,
) -> list[int]:  # fmt: skip
    """The ``count`` blocks that go, in order. Leaves ``batches`` as they are; of equal scores the first goes."""
    goes: list[int] = []
    while len(goes) < count:
        scores = block_scores(model, batches, metric, goes, on_block)
        ranked = sorted(scores, key=lambda index: (scores[index], index))
        goes += ranked[: count if choose is Choose.at_once else 1]
    return sorted(goes)


def block_scores(
    model: StreamedModel, batches: list[Batch], metric: Metric, goes: Sequence[int], on_block: Callable[[int], None]
) -> dict[int, float]:
    """The score of each block but those in ``goes``, which are left out. AceError if one is not finite."""
    batches = [copy.copy(batch) for batch in batches]
    scores, trimmer = {}, Trimmer()
    with torch.inference_mode():
        for index in (index for index in range(len(model.blocks)) if index not in goes):
            with model.loaded(model.blocks[index]):
                before = [batch.hidden_BLH for batch in batches]
                model.advance(index, batches)
                after = [batch.hidden_BLH for batch in batches]
                for state in after:
                    check_finite(state, f"the output of {model.blocks[index].name}")
                scores[index] = metric.score_states(before, after)
            trimmer()
            on_block(index)
    return scores


# --- and what becomes of the others ----------------------------------------------------------------------------------


class DepthPruner(SlotPruner):
    """What becomes of one loaded block: it goes, it stays, or its last weight is refitted."""

    @property
    def cutting(self) -> DepthCutting:
        """What goes."""
        assert isinstance(self._recipe.cutting, DepthCutting)
        return self._recipe.cutting

    def note(self, words: str, tokens: int = 0, repaired: Repaired | None = None, seconds: float = 0.0) -> None:
        """What became of the block."""
        diagnosis, notes = (repaired.diagnosis, repaired.notes) if repaired is not None else ({}, [])
        self.facts += [
            SlotFacts(slot.name, slot.shape, words, tokens, {**diagnosis}, [*notes], seconds)
            for slot in self._block.slots
        ]

    def put(self, slot: Slot, repaired: Repaired) -> None:
        """The weight has new values, rounded as the file will have them."""
        check_finite(repaired.weight_OI, f"the refit of {slot.name}")
        self.new.put(slot, repaired.weight_OI.to(self.new.dtype(slot.key)))

    def weight(self, slot: Slot) -> Tensor:
        """As the file has it, float32 (O, I)."""
        return self.new.dense(slot).to(self._model.device, torch.float32)

    def take_weights(self) -> dict[str, Tensor]:
        cutting = self.cutting
        self.moved = {
            key: new for key in self._block.files if (new := cutting.numbered.moved(key, cutting.kept)) != key
        }
        weights = super().take_weights()
        found = {self.moved.get(key, key): hash_of_tensor(tensor) for key, tensor in weights.items()}
        self.facts = [replace(fact, digests=found) for fact in self.facts]
        return weights


class Follow(Order):
    """Takes the states past what goes; teaches the block before a gap what those behind it would have added.

    With ``recipe.catch_up`` = p, that block and all kept ones behind a gap are to put out (1 - p) times that (or what
    they would themselves) plus p times the dense model's states.
    """

    def run(self) -> None:
        pruner = self.pruner
        assert isinstance(pruner, DepthPruner)
        if self.index not in pruner.cutting.kept:
            pruner.note("gone")
            return
        gap = pruner.cutting.gap_behind(self.index)
        if (gap or self._behind) and self.batches and self.recipe.repair.acts and self.block.layers:
            self._refit(pruner, gap)
        else:
            pruner.note("as it was")
        self._advance()

    @property
    def _behind(self) -> bool:
        """Whether the states that come here are not the dense model's, and are to catch up with them."""
        assert isinstance(self.pruner, DepthPruner)
        return self.dense is not None and any(gone < self.index for gone in self.pruner.cutting.goes)

    def _refit(self, pruner: DepthPruner, gap: list[int]) -> None:
        start, (slot,) = time.perf_counter(), self.block.layers
        with self.clock("observe"):
            scale = _linear_in(slot, lambda: self.model.forward(self.index, self.batches[0]))
        if scale is None:
            why = f"not refitted: the states behind {self.block.name} are not linear in its last weight"
            pruner.note("as it was", repaired=Repaired(slot.weight_OI, slot.weight_OI, [why]))
            return
        with self.clock("forward"):
            behind = [copy.copy(batch) for batch in self.batches]
            self.model.advance(self.index, behind)
            for index in gap:
                with self.model.loaded(self.model.blocks[index]):
                    self.model.advance(index, behind)
            if self.dense is not None:
                for batch, goal in zip(behind, self.dense.behind(self.index + 1 + len(gap)), strict=True):
                    batch.hidden_BLH = batch.hidden_BLH.lerp(goal.hidden_BLH, self.recipe.catch_up)
        with self.clock("observe"):
            gram, cross_OI, energy = self._moments(slot, behind, scale)
        try:
            with self.clock("repair"):
                repaired = self.recipe.repair.follow(pruner.weight(slot), cross_OI, energy, gram)
        except ArithmeticError as fault:
            raise AceError(f"{slot.name}: {fault}", "Use more windows, or repair=none.") from fault
        pruner.put(slot, repaired)
        where = f"the states {len(gap)} further" if gap else "the dense states"
        pruner.note(f"refitted to {where}", gram.tokens, repaired, time.perf_counter() - start)

    def _moments(self, slot: Slot, behind: list[Batch], scale: float) -> tuple[Gram, Tensor, float]:
        """Of the inputs x and the missing outputs d: sum x x^T, sum d x^T (O, I), sum ||d||^2."""
        gram, energy = Gram(), 0.0
        cross_OI = torch.zeros(slot.shape, dtype=torch.float64, device=self.model.device)
        for batch, target in zip(self.batches, behind, strict=True):
            inputs: list[Tensor] = []
            with hooked([slot], lambda slot, x: inputs.append(x), before=True):  # noqa: B023 (run at once)
                out_BLH = self._forward(batch)
            assert out_BLH is not None
            x_TI = torch.cat([x.flatten(0, -2).float() for x in inputs])
            goal_TO = target.hidden_BLH.float().flatten(0, -2)
            d_TO = (goal_TO - out_BLH.float().flatten(0, -2)) / scale
            gram.update(x_TI, x_TI, slot.weight_OI)
            cross_OI += (d_TO.T @ x_TI).double()
            energy += float(d_TO.square().sum(dtype=torch.float64))
        return gram, cross_OI, energy


def _linear_in(slot: Slot, forward: Callable[[], Tensor]) -> float | None:
    """c if the block's output is c W x plus what does not depend on the slot's weight W; None if it is not so."""
    inputs: list[Tensor] = []
    with hooked([slot], lambda slot, x: inputs.append(x), before=True):
        out_BLH = forward()
    if len(inputs) != 1 or inputs[0].flatten(0, -2).shape[0] != out_BLH.flatten(0, -2).shape[0]:
        return None
    weight_OI = slot.weight_OI.clone()
    noise_OI = torch.randn(weight_OI.shape, generator=torch.Generator().manual_seed(0)).to(weight_OI)
    noise_OI *= weight_OI.float().std()
    try:
        slot.put(weight_OI + noise_OI)
        change_TO = (forward().float() - out_BLH.float()).flatten(0, -2)
    finally:
        slot.put(weight_OI)
    expected_TO = inputs[0].flatten(0, -2).float() @ noise_OI.float().T
    scale = float((change_TO * expected_TO).sum() / expected_TO.square().sum().clamp(min=1e-30))
    off = float((change_TO - scale * expected_TO).norm() / change_TO.norm().clamp(min=1e-30))
    return scale if scale and off <= max(_LINEAR, _EPS * torch.finfo(slot.weight_OI.dtype).eps) else None
