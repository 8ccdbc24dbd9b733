"""What a repair is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.patterns import Pattern
    from ace_cli.methods.statistics import Seen, Statistic


@dataclass
class Repaired:
    """A slot after its repair; ``notes`` tells of every fallback taken (damping raised, dead columns, ...).

    The losses are ||(W - W') X||_F^2 on the observed inputs, of the mask alone and after the repair; ``swapped`` is how
    many weights stay that the first mask did not keep.
    """

    weight_OI: Tensor
    keep_OI: Tensor
    notes: list[str] = field(default_factory=list)
    loss_before: float | None = None
    loss_after: float | None = None
    swapped: int | None = None


@dataclass
class Repair:
    """Refits, or re-chooses, the weights that stay so that the slot's output stays close."""

    #: False for one that leaves both as they are.
    acts = True

    def needs(self) -> tuple[Statistic, ...]:
        """The statistics ``repair`` reads."""
        return ()

    def faults(self) -> list[str]:
        """What is wrong with the knobs, one line each; empty when all is well."""
        return []

    def flops(self, rows: int, columns: int) -> int:
        """What ``repair`` costs for a weight (rows, columns), in operations of large matrix products; roughly."""
        return 0

    def repair(self, weight_OI: Tensor, keep_OI: Tensor, seen: Seen, pattern: Pattern) -> Repaired:
        """``weight_OI`` float32 (O, I) dense, ``keep_OI`` bool (O, I) -> new weights, read only where kept."""
        raise NotImplementedError
