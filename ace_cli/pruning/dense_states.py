"""What the dense model makes of the calibration windows while it is pruned: states, and inputs of slots.

Shapes: B windows, L tokens, H hidden size, I inputs of a slot.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from ace_cli.core.errors import AceError
from ace_cli.model.calls import Batch
from ace_cli.model.slots import Slot
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.observer import hooked


class DenseStates:
    """``batches`` of windows, in front of block 0, on their way through the dense model.

    ``batches`` are copies, with states of their own; they have gone through the ``passed`` first blocks.
    """

    def __init__(self, model: StreamedModel, batches: Iterable[Batch], passed: int = 0) -> None:
        self.batches = [copy.copy(batch) for batch in batches]
        self.passed = passed
        self._model = model
        with torch.no_grad():
            for index in model.one_by_one(passed):
                model.advance(index, self.batches)

    def through(self, end: int, loaded: int) -> None:
        """Take them to block ``end``; of the blocks until there ``loaded`` may be loaded, dense."""
        through(self._model, range(self.passed, end), self.batches, loaded)
        self.passed = max(self.passed, end)


def through(model: StreamedModel, blocks: Iterable[int], batches: list[Batch], loaded: int) -> None:
    """Take ``batches`` through dense ``blocks``, of which one may be loaded."""
    for index in blocks:
        with nullcontext() if index == loaded else model.loaded(model.blocks[index]):
            model.advance(index, batches)


class _Stop(Exception):
    """Enough of the block has run."""


class DenseInputs:
    """The inputs that slots have in the dense model, of the same tokens, while their block is pruned.

    Costs a copy of the block, the states of the dense model, and of one batch the inputs of its slots.
    """

    def __init__(self, model: StreamedModel, batches: Iterable[Batch], passed: int = 0) -> None:
        self._states = DenseStates(model, batches, passed)
        self._model = self._copy = model
        self._index = passed
        self._ahead: set[int] = set()  # batches that are behind the block already

    def before(self, index: int) -> None:
        """Block ``index`` is loaded, and still dense."""
        self._index, self._copy = index, self._model.beside(index)

    def of(self, number: int, names: Iterable[str], first: bool = False) -> Mapping[str, Tensor]:
        """Slot's name -> its input (..., I) in batch ``number``; ``first``: of the first that read one tensor alone.

        AceError for a slot that does not see every token once.
        """
        batch, wanted = self._states.batches[number], set(names)
        found: dict[str, Tensor] = {}

        def note(slot: Slot, x: Tensor) -> None:
            if first and any(x is not other for other in found.values()):
                raise _Stop
            if slot.name in found or x.numel() != batch.ids_BL.numel() * x.shape[-1]:
                raise AceError(f"catch_up: {slot.name} does not see every token once.", "Leave catch_up=0.")
            found[slot.name] = x

        slots = [slot for slot in self._copy.blocks[self._index].layers if slot.name in wanted]
        try:
            with hooked(slots, note, before=True):
                out_BLH = self._copy.forward(self._index, batch)
        except _Stop:
            return found
        if not first:
            batch.hidden_BLH = out_BLH
            self._ahead.add(number)
        return found

    def behind(self, end: int) -> list[Batch]:
        """The states of the dense model in front of block ``end``; the loaded block is still dense."""
        self._states.through(end, self._index)
        return self._states.batches

    def after(self) -> None:
        """What is left of the dense states moves on; the copy of the block is let go of."""
        if self._states.passed <= self._index:
            left = [batch for number, batch in enumerate(self._states.batches) if number not in self._ahead]
            self._copy.advance(self._index, left)
            self._states.passed = self._index + 1
        self._ahead.clear()
        self._copy = self._model
