"""Blocks first, then the whole: a start of one block at a time, and predictions where it ends.

Each block is trained as ``recover=blocks`` does, right after it is pruned; the finished model as ``recover=distill``
does. That one follows the other is our choice; their sources are named there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.core.workers import ONE, Workers
from ace_cli.recovery.base import Recovery, RecoveryFacts
from ace_cli.recovery.blocks import Blocks
from ace_cli.recovery.distill import Distill
from ace_cli.recovery.training import training_faults

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from ace_cli.core.stage import Progress
    from ace_cli.model.files import Checkpoint
    from ace_cli.model.streamed import Batch, StreamedModel


@register("recover", "both")
@dataclass
class Both(Recovery):
    """``blocks`` for ``block_epochs`` at ``block_lr``, then ``distill``, which the others are for."""

    epochs: int = 2
    lr: float = 1.5e-3
    block_epochs: int = 4
    block_lr: float = 5e-3
    batch: int = 512
    held_out: float = 0.1
    seed: int = 0
    windows: int | None = None
    spread: bool = False

    whole = True

    @property
    def _blocks(self) -> Blocks:
        return Blocks(self.block_epochs, self.block_lr, self.batch, held_out=self.held_out, seed=self.seed)

    @property
    def _distill(self) -> Distill:
        return Distill(self.epochs, self.lr, self.batch, self.held_out, self.seed, self.windows, self.spread)

    def faults(self) -> list[str]:
        faults = self._distill.faults()
        of_blocks = training_faults(self.block_epochs, self.block_lr, 1, 0.5, 0)
        return faults + [each.replace("recover.", "recover.block_", 1) for each in of_blocks]

    @property
    def insists(self) -> bool:
        return self._distill.insists

    def trained_on(self, windows: int) -> tuple[int, int]:
        return self._distill.trained_on(windows)

    def forwards(self, share: float = 1.0) -> float:
        return self._blocks.forwards() + self._distill.forwards(share)

    def bytes_per_weight(self) -> int:
        return self._blocks.bytes_per_weight()

    def whole_bytes(self, parameters: int, trained: int, shapes: Collection[tuple[int, int]]) -> int:
        return self._distill.whole_bytes(parameters, trained, shapes)

    def disk_bytes(self, trained: int, shapes: Collection[tuple[int, int]]) -> int:
        return self._distill.disk_bytes(trained, shapes)

    def recover(
        self, model: StreamedModel, index: int, batches: Sequence[Batch | None], targets: Sequence[Tensor | None],
        keep: Mapping[str, Tensor], workers: Workers = ONE,
    ) -> RecoveryFacts:  # fmt: skip
        return self._blocks.recover(model, index, batches, targets, keep, workers)

    def recover_model(
        self, dense: StreamedModel, pruned: Checkpoint, windows_NL: Tensor, held_NL: Tensor, target: Path,
        progress: Progress, workers: Workers = ONE,
    ) -> RecoveryFacts:  # fmt: skip
        return self._distill.recover_model(dense, pruned, windows_NL, held_NL, target, progress, workers)
