"""Blocks first, then the whole: a start of one block at a time, and predictions where it ends.

Each block is trained as ``recover=blocks`` does, right after it is pruned; the finished model as ``recover=distill``
does. That one follows the other is our choice; their sources are named there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.core.workers import ONE, Workers
from ace_cli.recovery.blocks import Blocks
from ace_cli.recovery.distill import Distill
from ace_cli.recovery.training import training_faults

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ace_cli.model.calls import Batch
    from ace_cli.model.streamed import StreamedModel
    from ace_cli.recovery.base import RecoveryFacts


@register("recover", "both")
@dataclass
class Both(Distill):
    """``blocks`` for ``block_epochs`` at ``block_lr``, then ``distill``, which the others are for."""

    block_epochs: int = 4
    block_lr: float = 5e-3

    in_stream = True

    @property
    def _blocks(self) -> Blocks:
        return Blocks(self.block_epochs, self.block_lr, self.batch, held_out=self.held_out, seed=self.seed)

    def faults(self) -> list[str]:
        of_blocks = training_faults(self.block_epochs, self.block_lr, 1, 0.5, 0)
        return super().faults() + [each.replace("recover.", "recover.block_", 1) for each in of_blocks]

    def forwards(self, share: float = 1.0) -> float:
        return self._blocks.forwards() + super().forwards(share)

    def bytes_per_weight(self) -> int:
        return self._blocks.bytes_per_weight()

    def recover(
        self, model: StreamedModel, index: int, batches: Sequence[Batch | None], targets: Sequence[Tensor | None],
        keep: Mapping[str, Tensor], workers: Workers = ONE,
    ) -> RecoveryFacts:  # fmt: skip
        return self._blocks.recover(model, index, batches, targets, keep, workers)
