"""The orders that a block's weights have their inputs put into. Shapes: O outputs, I inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ace_cli.methods.patterns import NofM, Pattern
from ace_cli.model.blocks import Block
from ace_cli.model.links import Link, reorder
from ace_cli.model.slots import Slot
from ace_cli.pruning.new_weights import NewWeights
from ace_cli.pruning.permutation import best_order, kept_score


class InputOrders:
    """``links`` are the block's slots whose inputs may be reordered, because other weights of it make them."""

    def __init__(self, block: Block, links: Iterable[Link], patterns: Mapping[str, Pattern], new: NewWeights) -> None:
        self._block = block
        self._patterns = patterns
        self._new = new
        self._links = self._usable(links)
        #: Slot name -> the order its inputs were put in; the tensor that is fed to it has not been reordered.
        self.found: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        """Whether the inputs of the slot of this name may be reordered."""
        return name in self._links

    def choose(self, slot: Slot, score_OI: Tensor) -> tuple[Tensor, float] | None:
        """The order of the inputs that keeps more of the score, and how much more relative to what was kept.

        None to leave them as they are.
        """
        pattern = self._patterns[slot.name]
        if slot.name not in self._links or not isinstance(pattern, NofM):
            return None
        order_I = best_order(score_OI, self._links[slot.name].channels_RWC, pattern)
        if torch.equal(order_I, order_I.sort().values):
            return None
        self.found[slot.name] = order_I
        return order_I, kept_score(score_OI[:, order_I], pattern) / kept_score(score_OI, pattern) - 1

    def reorder_producers(self, slot: Slot) -> None:
        """Put what makes the slot's inputs in their order: rows, loaded and as they will be written, and biases."""
        order_I = self.found[slot.name]
        slots = {each.name: each for each in self._block.slots}
        for name, order_O in reorder(self._block, self._links[slot.name], order_I, columns=False).items():
            key = self._block.parts[name][0].key
            rows = self._new.of_slot(slots[key]) if key in slots else self._new.of_file(key)
            rows.copy_(rows[order_O])

    def _usable(self, links: Iterable[Link]) -> dict[str, Link]:
        """Consumer's slot -> its link, where the consumer's pattern is N:M and fits the link's regions."""
        found = {}
        for link in links:
            name = self._block.parts[f"{link.consumer}.weight"][0].key
            pattern = self._patterns[name]
            if isinstance(pattern, NofM) and link.misfit(pattern) is None:
                found[name] = link
        return found
