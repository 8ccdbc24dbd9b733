"""What a repair is."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.patterns import Pattern
    from ace_cli.methods.statistics import Gram, Seen, Statistic
    from ace_cli.methods.units import Units


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

    @property
    def diagnosis(self) -> dict[str, float]:
        """The numbers that are known, by name."""
        known: dict[str, float] = {}
        if self.loss_before is not None and self.loss_after is not None:
            known |= {"loss_before": self.loss_before, "loss_after": self.loss_after}
        if self.swapped is not None:
            known["swapped"] = self.swapped
        return known


@dataclass
class Repair:
    """Refits, or re-chooses, the weights that stay so that the slot's output stays close."""

    #: False for one that leaves both as they are.
    acts = True
    #: Whether it is one for units inside a block, for single weights, for what is left when whole blocks go.
    units = False
    weights = True
    #: Whether it refits products of thinner weights.
    ranks = False
    blocks = False

    def needs(self) -> tuple[Statistic, ...]:
        """The statistics ``repair`` reads."""
        return ()

    def faults(self) -> list[str]:
        """What is wrong with the knobs, one line each; empty when all is well."""
        return []

    def flops(self, rows: int, columns: int) -> int:
        """What ``repair`` costs for a weight (rows, columns), in operations of large matrix products; roughly."""
        return 0

    def nbytes(self, rows: int, columns: int) -> int:
        """What ``repair`` holds at most of a weight (rows, columns), beside the statistics and the weight itself."""
        return 0

    def repair(self, weight_OI: Tensor, keep_OI: Tensor, seen: Seen, pattern: Pattern) -> Repaired:
        """``weight_OI`` float32 (O, I) dense, ``keep_OI`` bool (O, I) -> new weights, read only where kept."""
        raise NotImplementedError

    def refit_factors(self, weight_OI: Tensor, up_OR: Tensor, down_RI: Tensor, seen: Seen) -> Tensor:
        """``weight_OI`` float32 as it was, and the float64 product that takes its place -> a better up (O, R).

        Raises ArithmeticError, in words, where the statistics do not allow it.
        """
        return up_OR

    def repairs_rows(self, pattern: Pattern) -> bool:
        """Whether ``repair`` looks at one row at a time: then some rows of weight and mask can be given to it."""
        return not self.acts

    def keeps_mask(self) -> bool:
        """Whether, with these knobs, what was kept stays kept: then it can follow a cut of whole units."""
        return True

    def repair_units(self, weight_OI: Tensor, keep_U: Tensor, seen: Seen, units: Units) -> Repaired:
        """``repair`` of the weight that reads ``units``, of which ``keep_U`` stay: all rows keep the same inputs.

        One that chooses units itself keeps as many in every region.
        """
        from ace_cli.methods.patterns import Ratio

        keep_OI = units.inputs(keep_U, weight_OI.shape[1]).expand(weight_OI.shape).contiguous()
        pruned = Fraction(int((~keep_OI[0]).sum()), keep_OI.shape[1])
        return self.repair(weight_OI, keep_OI, seen, Ratio(pruned))

    def follow(self, weight_OI: Tensor, cross_OI: Tensor, energy: float, gram: Gram) -> Repaired:
        """A weight, float32 (O, I), whose output is to become y + d: ``cross_OI`` = sum over tokens of d_t x_t^T.

        ``energy`` = sum of ||d_t||^2; ``gram`` is of the inputs x_t. Nothing is pruned.
        """
        raise NotImplementedError
