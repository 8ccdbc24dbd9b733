"""A block's recovery inside the stream: what went in, what the dense block made of it, and training in between.

Shapes: B windows, L tokens, H hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ace_cli.core.workers import ONE, Workers
from ace_cli.model.calls import Batch
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.dense_states import DenseStates, through
from ace_cli.pruning.slot_pruner import SlotPruner
from ace_cli.recovery.base import Recovery, RecoveryFacts

if TYPE_CHECKING:
    from ace_cli.pruning.cutting import Cutting


class Recovering:
    """Trains each block of ``model`` after it is pruned.

    ``steps``: which of the calibration windows each step of the training takes; of ``workers`` each has some of every
    step, and where they are apart no others go through its blocks. ``dense`` blocks are finished: if it is not None,
    states of the dense model, behind them, are the targets. ``cutting``: of units that are cut out, which may be whole
    blocks: the one before a gap learns what those in it did.
    """

    def __init__(
        self, model: StreamedModel, recovery: Recovery, windows_NL: Tensor, steps: Iterable[range],
        dense: int | None = None, workers: Workers = ONE, cutting: Cutting | None = None,
    ) -> None:  # fmt: skip
        self._model = model
        self._recovery = recovery
        self._workers = workers
        self._cutting = cutting
        self._rows = [workers.part(step) for step in steps]
        ends = zip(self._rows, accumulate(map(len, self._rows)), strict=True)
        #: Where they lie among the windows that go through the blocks.
        self._places = [range(end - len(rows), end) for rows, end in ends] if workers.apart else self._rows
        embedded = iter([*model.embedded(windows_NL[rows.start : rows.stop] for rows in self._rows if rows)])
        self._steps = [next(embedded) if rows else None for rows in self._rows]
        mine = [step for step in self._steps if step is not None]
        self._dense = None if dense is None else DenseStates(model, mine, dense)
        self._inputs: list[Tensor] = []
        self._targets: list[Tensor | None] = []

    def runs(self, index: int) -> bool:
        """Whether states go through the block, pruned."""
        return self._cutting is None or self._cutting.runs(index)

    def before(self, index: int, batches: list[Batch]) -> None:
        """The loaded block is still dense; ``batches`` hold its inputs."""
        self._inputs = [batch.hidden_BLH for batch in batches]
        hidden_NLH = torch.cat(self._inputs)
        mine = [(step, rows) for step, rows in zip(self._steps, self._places, strict=True) if step is not None]
        for step, rows in mine:
            step.hidden_BLH = hidden_NLH[rows.start : rows.stop]
        gap = [] if self._cutting is None else self._cutting.taught(index, self._dense is not None)
        end = index + 1 + len(gap or [])
        if self._dense is not None:
            self._dense.through(end, index)
        if gap is not None:
            targets = [copy.copy(step) for step, _ in mine] if self._dense is None else self._dense.batches
            if self._dense is None:
                through(self._model, range(index, end), targets, index)
            found = iter([batch.hidden_BLH for batch in targets])
            self._targets = [None if step is None else next(found) for step in self._steps]

    def after(self, index: int, batches: list[Batch], pruner: SlotPruner) -> RecoveryFacts | None:
        """The loaded block is pruned: train it, and put its inputs back into ``batches``. None: nothing to learn."""
        facts = None
        if self._targets:
            keep = trainable(self._model, index)
            facts = self._recovery.recover(self._model, index, self._steps, self._targets, keep, self._workers)
            if facts.epochs:
                pruner.new.take_loaded(keep)
        for batch, hidden_BLH in zip(batches, self._inputs, strict=True):
            batch.hidden_BLH = hidden_BLH
        self._inputs, self._targets = [], []
        return facts


def trainable(model: StreamedModel, index: int) -> dict[str, Tensor]:
    """Name inside loaded block ``index`` -> what of it may be trained: kept weights of slots; norms and biases whole.

    What stays dense because it is no slot (routers) is not trained.
    """
    block = model.blocks[index]
    pruned = {(id(slot.module), slot.leaf) for slot in block.slots}
    keep = {}
    for name, parameter in block.module.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if name not in block.parts:  # made by a rule that has no way back to the files
            continue
        if (id(block.module.get_submodule(owner)), leaf) in pruned:
            keep[name] = parameter != 0
        elif parameter.dim() == 1:
            keep[name] = torch.ones_like(parameter, dtype=torch.bool)
    return keep
