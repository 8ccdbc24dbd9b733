"""What a rounding is, and how it goes together with every repair.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from ace_cli.methods.grids import SMALLEST_HALF, Grid
from ace_cli.methods.repair.base import Repair, Repaired
from ace_cli.methods.repair.least_squares import factors_of, finish
from ace_cli.methods.repair.sparsegpt import Damping, SparseGPT
from ace_cli.methods.statistics import Gram

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.patterns import Pattern
    from ace_cli.methods.statistics import Seen, Statistic


class Rounding(Enum):
    """Which errors are passed on to the weights that are rounded later."""

    joint = "joint"  # those of pruning and of rounding, in one sweep
    after = "after"  # those of rounding alone: first all is pruned and repaired
    nearest = "nearest"  # none: every weight goes to the nearest point


class Quantize:
    """Keeps weights as whole numbers of few bits and a scale for each group."""

    #: False for one that leaves them as they are.
    acts = False
    #: Whether its bits are those that a target of size leaves room for.
    of_target = False
    #: Of a code.
    bits = 0
    group: int | None = None

    def faults(self) -> list[str]:
        """What is wrong with the knobs, one line each; empty when all is well."""
        return []

    def grid(self, half: bool = False) -> Grid:
        """What weights are rounded to. ``half``: they are stored as float16, whose small numbers are coarse."""
        raise NotImplementedError

    def around(self, repair: Repair, half: bool = False) -> Repair:
        """``repair``, ending on the grid."""
        return repair

    def bits_per_weight(self, columns: int) -> float:
        """Of a weight with so many inputs, its share of the scale included."""
        return self.bits + 16 / (self.group or columns)


@dataclass
class Quantised(Repair):
    """``inner``, then a sweep over its mask that rounds (GPTQ, Frantar et al., arXiv 2210.17323).

    Column by column from left to right, the error of rounding w_j is passed on to the columns not yet rounded, as
    SparseGPT passes on that of pruning (its section 3.5 joins the two); pruned weights stay 0. What is swept over:

    - joint, repair=sparsegpt without refit_steps: one sweep that prunes (may choose, too) and rounds, damped as this
      one is (the published 0.01 of the mean lets 4 bits over-fit few tokens);
    - joint, repair=none: the dense weights with the mask given, so that both errors are passed on;
    - joint with any other repair, and after: the repaired, masked weights. Where the repair ends at the least squares
      of its mask nothing is lost by that: what it leaves is orthogonal to all that kept weights say.

    A group's scale is chosen when the sweep comes to it, for its weights as updated by then.
    """

    inner: Repair
    grid: Grid
    rounding: Rounding
    damping: float | None

    def needs(self) -> tuple[Statistic, ...]:
        own = () if self.rounding is Rounding.nearest else (Gram(),)
        return tuple(dict.fromkeys((*self.inner.needs(), *own)))

    def repairs_rows(self, pattern: Pattern) -> bool:
        return self.inner.repairs_rows(pattern)

    def keeps_mask(self) -> bool:
        return self.inner.keeps_mask()

    @property
    def _sweep(self) -> SparseGPT:
        return SparseGPT(damping=self.damping, damping_of=Damping.unit)

    def flops(self, rows: int, columns: int) -> int:
        own = 0 if self.rounding is Rounding.nearest or self._in_one else self._sweep.flops(rows, columns)
        return self.inner.flops(rows, columns) + own

    def nbytes(self, rows: int, columns: int) -> int:
        own = 16 * rows * columns if self.rounding is Rounding.nearest else self._sweep.nbytes(rows, columns)
        return max(self.inner.nbytes(rows, columns), own)

    @property
    def _in_one(self) -> bool:
        """Whether the inner repair's own sweep rounds, too."""
        joint = self.rounding is Rounding.joint
        return joint and isinstance(self.inner, SparseGPT) and not self.inner.refit_steps

    def repair(self, weight_OI: Tensor, keep_OI: Tensor, seen: Seen, pattern: Pattern) -> Repaired:
        """As the inner repair; all weights end on the grid. Raises ArithmeticError as SparseGPT does."""
        if self._in_one:
            assert isinstance(self.inner, SparseGPT)
            sweep = replace(self.inner, damping=self.damping, damping_of=Damping.unit)
            return sweep.repair(weight_OI, keep_OI, seen, pattern, self.grid)
        repaired = self.inner.repair(weight_OI, keep_OI, seen, pattern)
        kept_OI = repaired.keep_OI
        masked_OI = repaired.weight_OI.masked_fill(~kept_OI, 0.0)
        if self.rounding is Rounding.nearest:
            new_OI = self.grid.rounded(masked_OI, self.grid.scales(masked_OI))
            return replace(repaired, weight_OI=new_OI, loss_after=None)
        factors = factors_of(seen[Gram()])
        dense = self.rounding is Rounding.joint and not self.inner.acts
        new_OI, _ = self._sweep.swept(weight_OI if dense else masked_OI, kept_OI, factors, pattern, self.grid)
        notes = list(dict.fromkeys([*repaired.notes, *factors.all_notes()]))
        done = finish(weight_OI, new_OI, kept_OI, keep_OI, factors.gram_II, notes)
        return replace(done, swapped=repaired.swapped)


@dataclass
class Integer(Quantize):
    """Codes of a number of bits: what all ``quantize=intN`` share. See ``Quantised`` for the method.

    ``damping`` of the sweep is relative to each input's own size; None takes inputs / tokens (`Factors.noise`).
    """

    acts = True
    group: int | None = 64
    rounding: Rounding = Rounding.joint
    damping: float | None = None

    def faults(self) -> list[str]:
        """Every field out of range, in words."""
        found = []
        if self.group is not None and (self.group < 16 or self.group % 8):
            found.append(
                f"quantize.group is {self.group}: give a multiple of 8 from 16 on, such as 64, or null for a row"
            )
        if self.damping is not None and not 0 <= self.damping <= 1e9:
            found.append(f"quantize.damping is {self.damping}: give 0 up to 1e9, such as 0.01, or null")
        return found

    def grid(self, half: bool = False) -> Grid:
        return Grid(self.bits, self.group, SMALLEST_HALF) if half else Grid(self.bits, self.group)

    def around(self, repair: Repair, half: bool = False) -> Repair:
        return Quantised(repair, self.grid(half), self.rounding, self.damping)
