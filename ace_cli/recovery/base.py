"""What a recovery is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.workers import ONE, Workers

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from ace_cli.core.stage import Progress
    from ace_cli.model.calls import Batch
    from ace_cli.model.files import Checkpoint
    from ace_cli.model.streamed import StreamedModel


@dataclass(frozen=True)
class RecoveryFacts:
    """What training a block, or the model, did: the error on held-out windows before and after, the epochs kept.

    0 epochs: training made it no better. Then it keeps the weights it had, or those that training was to start from.
    ``lowered``: how often it began again, with a lower learning rate.
    """

    before: float
    after: float
    epochs: int
    lowered: int = 0


@dataclass
class Recovery:
    """Trains the weights that pruning kept; pruned positions stay exactly zero."""

    #: False for one that does nothing.
    acts = True
    #: Whether each block is trained in the stream, when it is pruned.
    in_stream = True
    #: Whether the whole model is trained, when all blocks are pruned.
    whole = False
    #: Whether that one lies on all GPUs of this machine.
    spread = False
    #: Tokens of one training step.
    batch = 512
    #: Whether targets are the dense model's own hidden states, which then have to be carried along.
    carries_dense = False

    def faults(self) -> list[str]:
        """What is wrong with the knobs, one line each; empty when all is well."""
        return []

    @property
    def insists(self) -> bool:
        """Whether ``trained_on`` is what the user said: then a text that has fewer windows will not do."""
        return False

    def trained_on(self, windows: int) -> tuple[int, int]:
        """Where so many windows prune: how many the whole model is trained on, the same ones first, and how many that
        follow are held out."""
        return windows, 0

    def forwards(self, share: float = 1.0) -> float:
        """What it costs beside pruning, in forwards of all calibration tokens through the model.

        ``share``: how many times as many tokens train the whole model.
        """
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

    def misfits(self, cuts: bool, zeros: bool) -> list[str]:
        """Why it does not go with a result like this one, one line each: units are cut out, or weights become zeros."""
        return []

    def check_installed(self) -> None:
        """AceError if a package is missing that it needs."""

    @property
    def files(self) -> tuple[str, ...]:
        """What it may put into the checkpoint beside the weights, by the paths in it."""
        return ()

    def whole_bytes(self, parameters: int, trained: int, shapes: Collection[tuple[int, int]]) -> int:
        """Of a recovery of the whole model: the memory it takes where it computes, of so many weights.

        ``shapes``: (O, I) of every matrix that was pruned.
        """
        return 0

    def disk_bytes(self, trained: int, shapes: Collection[tuple[int, int]]) -> int:
        """Of a recovery of the whole model: what its state takes on the disk; arguments as for ``whole_bytes``."""
        return 0

    def recover_model(
        self, dense: StreamedModel, pruned: Checkpoint, windows_NL: Tensor, held_NL: Tensor, target: Path,
        progress: Progress, workers: Workers = ONE,
    ) -> RecoveryFacts:  # fmt: skip
        """Train the whole model of the finished folder ``pruned`` on some windows, watched on those held out.

        What takes the place of its weight files, or comes beside them, goes into the folder ``target``; nothing where
        nothing got better. Windows are token ids, int64. An interrupted training in ``target`` is continued.
        ``workers``: all train it, each on its windows of every step; the first one writes.
        """
        raise NotImplementedError
