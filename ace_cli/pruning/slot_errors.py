"""How far each weight's own outputs move when it is pruned, for the report alone.

Measured on what the weight sees while the block is still dense, so that no error is counted that came from another.
Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from ace_cli.model.blocks import Block
from ace_cli.model.experts import ExpertCall, Experts
from ace_cli.model.slots import Slot
from ace_cli.pruning.facts import SlotFacts
from ace_cli.pruning.observer import hooked, reached

#: Outputs that are looked at, spread evenly over all: enough to tell a norm by, and next to nothing of a pass.
MOST_ROWS = 512


@dataclass
class SlotErrors:
    """Of one loaded block: what its slots read and put out before they are pruned, and how that differs afterwards."""

    block: Block
    _seen: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)  # slot name -> its (x, y) of each call
    _shapes: dict[str, tuple[int, int]] = field(default_factory=dict)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While inside, the dense block may run; experts are shown the tokens that are sent to them."""
        calls: list[tuple[Experts, ExpertCall]] = []
        with (
            hooked(self.block.layers, self._note, before=True),
            reached(self.block.experts, lambda experts, call: calls.append((experts, call))),
        ):
            yield
        for experts, call in calls:
            for expert in range(experts.count):
                for stage in experts.stages(expert):
                    experts.show(call, expert, False, stage, self._note)

    def told(self, facts: list[SlotFacts]) -> list[SlotFacts]:
        """``facts`` with the error of each slot that was seen and is as large as it was.

        ||y' - y|| / ||y||, Frobenius norms over all tokens and at most some ``MOST_ROWS`` outputs: y = W x of the dense
        weight, y' of what is loaded now.
        """
        slots = {slot.name: slot for slot in self.block.slots if self._seen.get(slot.name)}
        squares = {name: self._squares(slot) for name, slot in slots.items()}
        kept = {name: found for name, found in squares.items() if found is not None}
        if not kept:
            return facts
        changes_N, sizes_N = torch.stack(list(kept.values())).sqrt().unbind(1)
        errors = dict(zip(kept, (changes_N / sizes_N).tolist(), strict=True))  # one wait for the device
        finite = {name: error for name, error in errors.items() if error < float("inf")}
        return [replace(fact, error=finite.get(fact.name)) for fact in facts]

    def _note(self, slot: Slot, x: Tensor) -> None:
        self._shapes[slot.name] = slot.shape
        self._seen.setdefault(slot.name, []).append((x, _some_outputs(slot, x)))

    def _squares(self, slot: Slot) -> Tensor | None:
        """(sum of squared changes, sum of squares) of all calls; None where the weight has another shape."""
        seen = self._seen[slot.name]
        if slot.shape != self._shapes[slot.name]:
            return None
        found = [torch.stack([(_some_outputs(slot, x) - y).square().sum(), y.square().sum()]) for x, y in seen]
        return torch.stack(found).sum(0)


def _some_outputs(slot: Slot, x: Tensor) -> Tensor:
    """W x without bias, of evenly spaced rows of W, float32."""
    weight_OI = slot.weight_OI
    some_OI = weight_OI[:: max(1, len(weight_OI) // MOST_ROWS)]
    return linear(x.to(some_OI.dtype), some_OI).float()
