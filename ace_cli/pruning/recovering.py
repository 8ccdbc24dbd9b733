"""A block's recovery inside the stream: what went in, what the dense block made of it, and training in between.

Shapes: B windows, L tokens, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ace_cli.model.streamed import Batch, StreamedModel
from ace_cli.pruning.slot_pruner import SlotPruner
from ace_cli.recovery.base import Recovery, RecoveryFacts


class Recovering:
    """Trains each block of ``model`` after it is pruned.

    ``steps`` are the calibration windows as training takes them, in batches of their own, embedded; the engine's own
    batches hold the same windows in the same order. ``dense``: the same once more, to be carried through the dense
    model, where its states are the targets. Both are taken over.
    """

    def __init__(self, model: StreamedModel, recovery: Recovery, steps: list[Batch], dense: list[Batch]) -> None:
        self._model = model
        self._recovery = recovery
        self._steps = steps
        self._dense = dense
        self._inputs: list[Tensor] = []
        self._targets: list[Tensor] = []

    def before(self, index: int, batches: list[Batch]) -> None:
        """The loaded block is still dense; ``batches`` hold its inputs."""
        self._inputs = [batch.hidden_BLH for batch in batches]
        hidden = torch.split(torch.cat(self._inputs), [len(step.ids_BL) for step in self._steps])
        for step, hidden_BLH in zip(self._steps, hidden, strict=True):
            step.hidden_BLH = hidden_BLH
        if self._dense:
            self._model.advance(index, self._dense)
            self._targets = [batch.hidden_BLH for batch in self._dense]
        else:
            self._targets = [self._model.forward(index, step) for step in self._steps]

    def after(self, index: int, batches: list[Batch], pruner: SlotPruner) -> RecoveryFacts:
        """The loaded block is pruned: train it, and put its inputs back into ``batches``."""
        keep = trainable(self._model, index)
        facts = self._recovery.recover(self._model, index, self._steps, self._targets, keep)
        if facts.epochs:
            pruner.take_loaded(keep)
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
