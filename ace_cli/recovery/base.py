"""What a recovery is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.workers import ONE, Workers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from ace_cli.core.stage import Progress
    from ace_cli.model.files import Checkpoint
    from ace_cli.model.streamed import Batch, StreamedModel


@dataclass(frozen=True)
class RecoveryFacts:
    """What training a block, or the model, did: the error on held-out windows before and after, the epochs kept.

    0 epochs: it did not get better, and keeps the weights it had.
    """

    before: float
    after: float
    epochs: int


@dataclass
class Recovery:
    """Trains the weights that pruning kept; pruned positions stay exactly zero."""

    #: False for one that does nothing.
    acts = True
    #: Whether each block is trained in the stream, when it is pruned.
    in_stream = True
    #: Whether the whole model is trained, when all blocks are pruned.
    whole = False
    #: Tokens of one training step.
    batch = 512
    #: Whether targets are the dense model's own hidden states, which then have to be carried along.
    carries_dense = False

    def faults(self) -> list[str]:
        """What is wrong with the knobs, one line each; empty when all is well."""
        return []

    def forwards(self) -> float:
        """What it costs beside pruning, in forwards of all calibration tokens through the model."""
        return 0.0

    def bytes_per_weight(self) -> int:
        """Bytes beside each weight of the block that is trained: its copies, gradient and moments."""
        return 0

    def recover(
        self, model: StreamedModel, index: int, batches: Sequence[Batch | None], targets: Sequence[Tensor | None],
        keep: Mapping[str, Tensor], workers: Workers = ONE,
    ) -> RecoveryFacts:  # fmt: skip
        """Train the loaded block ``index`` in place until it makes ``targets`` (B, L, H) of ``batches``.

        ``keep``: name inside the block of every parameter that is trained -> bool of its shape, what may change.
        ``workers``: all train it, each on its windows of every step; None where it has none.
        """
        raise NotImplementedError

    def whole_bytes(self, parameters: int, trained: int) -> int:
        """Of a recovery of the whole model: the memory it takes where it computes, of so many weights."""
        return 0

    def recover_model(
        self, dense: StreamedModel, pruned: Checkpoint, windows_NL: Tensor, target: Path, progress: Progress,
        workers: Workers = ONE,
    ) -> RecoveryFacts:  # fmt: skip
        """Train the whole model of the finished folder ``pruned``; its weight files, anew, in the folder ``target``.

        ``windows_NL``: token ids, int64. What an interrupted training left in ``target`` is continued.
        ``workers``: all train it, each on its windows of every step; the first one writes.
        """
        raise NotImplementedError
