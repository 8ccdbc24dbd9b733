"""What happens to a slot that becomes a product of two thinner weights: factors, refit, product.

Shapes: O outputs, I inputs, R the rank.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from ace_cli.core.errors import AceError
from ace_cli.kernels.finite_checks import check_finite
from ace_cli.methods.low_rank import Factorisation
from ace_cli.methods.statistics import Seen
from ace_cli.model.files import hash_of_tensor
from ace_cli.model.slots import Slot
from ace_cli.pruning.facts import SlotFacts
from ace_cli.pruning.slot_pruner import SlotPruner


class RankPruner(SlotPruner):
    """Puts products in place of the slots of one loaded block; ``recipe.ranks`` says how thin they are."""

    def _prune(self, slot: Slot, seen: Seen, routed: int | None) -> SlotFacts:
        start = time.perf_counter()
        tokens = self._tokens(slot, seen)
        metric, rank = self._recipe.metric, self._recipe.ranks[slot.name]
        assert isinstance(metric, Factorisation)
        dense_OI = self.new.dense(slot).to(self._model.device, torch.float32).contiguous()
        check_finite(dense_OI, slot.name)
        try:
            with self._clock("score"):
                up_OR, down_RI, notes = metric.factors(dense_OI, seen, rank)
            with self._clock("repair"):
                up_OR = self._recipe.repair.refit_factors(dense_OI, up_OR, down_RI, seen)
        except ArithmeticError as fault:
            raise AceError(f"{slot.name}: {fault}", "Use more windows, or metric=asvd.") from fault
        with self._clock("mask"):
            new_OI = (up_OR @ down_RI).to(self.new.dtype(slot.key))
            self._finite.expect(new_OI, f"the product for {slot.name}")
            self.new.put(slot, new_OI)
        self._look(slot, seen)
        off = float((new_OI.float() - dense_OI).norm() / dense_OI.norm().clamp(min=1e-30))
        words, seconds = f"rank {rank} of {min(slot.shape)}", time.perf_counter() - start
        kept = list(range(rank))
        return SlotFacts(slot.name, slot.shape, words, tokens, {"off": off}, notes, seconds, routed, kept=kept)

    def take_weights(self) -> dict[str, Tensor]:
        """The tensors of the block with products in them, as they will be written."""
        weights = super().take_weights()
        keys = {slot.name: slot.key for slot in self._block.slots}
        found = {key: hash_of_tensor(tensor) for key, tensor in weights.items()}
        self.facts = [replace(fact, digests={keys[fact.name]: found[keys[fact.name]]}) for fact in self.facts]
        return weights
