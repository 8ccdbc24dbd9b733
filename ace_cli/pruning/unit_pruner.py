"""What happens to a block whose units are cut: the weight that reads them is scored, repaired, and all are sliced.

In the loaded block nothing changes its shape: the columns of units that go become zeros, which computes the same.

Shapes: O outputs, I inputs, U units.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ace_cli.core.errors import AceError
from ace_cli.methods.metrics.base import Metric
from ace_cli.methods.row_pruning import masked
from ace_cli.methods.statistics import Seen
from ace_cli.methods.units import Units
from ace_cli.model.cuts import Coupling
from ace_cli.model.files import hash_of_tensor
from ace_cli.model.slots import Slot
from ace_cli.pruning.facts import SlotFacts
from ace_cli.pruning.slot_pruner import SlotPruner
from ace_cli.pruning.unit_cutting import UnitCutting


def unit_scores(metric: Metric, weight_OI: Tensor, seen: Seen, units: Units, what: str) -> Tensor:
    """``metric``'s scores, (U,). AceError if they are not one finite number for each unit."""
    score_U = metric.score_units(weight_OI, seen, units)
    assert score_U.shape == (units.count,)
    if not bool(score_U.isfinite().all()):
        raise AceError(f"{what} or the score of its units holds NaN or Inf.", "Try dtype=float32.")
    return score_U


class UnitPruner(SlotPruner):
    """Cuts the units of one loaded block; ``recipe.cutting`` says which there are, and how many stay."""

    def __init__(self, *given: Any) -> None:
        """``given`` as a SlotPruner is. AceError if the loaded block's weights do not hang together as expected."""
        super().__init__(*given)
        self._kept: dict[str, Tensor] = {}
        with self._clock("permute"):  # now: while the block runs, it can be asked nothing
            self._couplings = self._cutting.proven(self._block.name)

    def _prune(self, slot: Slot, seen: Seen, routed: int | None) -> SlotFacts:
        start = time.perf_counter()
        cutting = self._cutting
        each = self._couplings[slot.name]
        tokens = self._tokens(slot, seen)
        diagnosis: dict[str, Any] = {**self._recipe.metric.diagnose(seen)}
        keep_U, notes = self._cut(slot, seen, each, diagnosis)
        self._keep(slot.name, keep_U)
        self._look(slot, seen)
        words, seconds = f"{cutting.stay[each.name]} of {each.width} {cutting.name}s", time.perf_counter() - start
        kept = keep_U.nonzero().flatten().tolist()
        return SlotFacts(slot.name, slot.shape, words, tokens, diagnosis, notes, seconds, routed, kept=kept)

    def _keep(self, name: str, keep_U: Tensor) -> None:
        """Of all tensors that hold the units of ``name`` these are to stay."""
        self._kept[name] = keep_U
        for axis in self._couplings[name].axes:
            self.new.of_file(axis.key)

    def _exchanged(self, parts: list[list[Slot]], mine: list[SlotFacts]) -> list[SlotFacts]:
        facts = super()._exchanged(parts, mine)
        for fact in facts:
            each = self._couplings[fact.name]
            keep_U = torch.zeros(each.regions * each.width, dtype=torch.bool)
            keep_U[fact.kept or []] = True
            self._keep(fact.name, keep_U)
        return facts

    @property
    def _cutting(self) -> UnitCutting:
        assert isinstance(self._recipe.cutting, UnitCutting)
        return self._recipe.cutting

    def _cut(self, slot: Slot, seen: Seen, each: Coupling, diagnosis: dict[str, Any]) -> tuple[Tensor, list[str]]:
        """Score, select, repair and zero; which units stay, bool (U,), and what the repair noted."""
        units = self._cutting.units(self._block.name, each, self.gradients)
        with self._clock("score"):
            dense_OI = self.new.dense(slot).to(self._model.device, torch.float32).contiguous()
            score_U = unit_scores(self._recipe.metric, dense_OI, seen, units, slot.name)
        with self._clock("select"):
            keep_U = units.best(score_U, self._cutting.stay[each.name])
        try:
            with self._clock("repair"):
                repaired = self._recipe.repair.repair_units(dense_OI, keep_U, seen, units)
        except ArithmeticError as fault:
            raise AceError(f"{slot.name}: {fault}", "Use more windows, or repair=none.") from fault
        with self._clock("mask"):
            self.new.put(slot, masked(repaired.weight_OI, repaired.keep_OI, self.new.dtype(slot.key)))
        diagnosis |= repaired.diagnosis
        stays_I = repaired.keep_OI[0]
        return stays_I[units.columns_RWC[..., 0].flatten().to(stays_I.device)], repaired.notes

    def take_weights(self) -> dict[str, Tensor]:
        """The tensors of the block that got smaller, as they will be written."""
        cut, weights = self._cutting.cut(), super().take_weights()
        weights = {key: cut.sliced(key, tensor, self._kept) for key, tensor in weights.items()}
        found = {key: hash_of_tensor(tensor) for key, tensor in weights.items()}
        keys = {name: [axis.key for axis in each.axes] for name, each in self._couplings.items()}
        self.facts = [replace(fact, digests={key: found[key] for key in keys[fact.name]}) for fact in self.facts]
        return weights
