"""SparseSwaps (arXiv 2512.10922): exchange a kept weight for a pruned one wherever the layer's output error falls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.methods.repair.base import Repair, Repaired
from ace_cli.methods.repair.exchange import exchange_bytes, exchange_flops, exchanged
from ace_cli.methods.repair.least_squares import COPIES, MOST_STEPS, factors_of, finish, pull_faults, refit, refit_flops
from ace_cli.methods.statistics import Gram

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.patterns import Pattern
    from ace_cli.methods.statistics import Seen, Statistic


@register("repair", "swaps")
@dataclass
class Swaps(Repair):
    """1-swaps within each row, or within its groups of M for N:M; kept weights move only if `refit_steps` > 0.

    The error is ||(W - W') X||^2 + shrinkage * ||(W - W') s||^2, s_j the size of input j; no error of a row ever rises.
    ``shrinkage=None`` is what noise alone would give with so many tokens (`exchange.exchanged`).

    Departure, for speed: the paper makes the best of all swaps of a row and starts again. Here a sweep goes through
    groups of inputs (those of N:M, or 16 dealt out anew each time) and makes the best swap of each: hundreds a sweep,
    with two matrix products where the paper needs one for every swap.
    """

    shrinkage: float | None = None
    sweeps: int = 16
    refit_steps: int = 0
    tolerance: float = 0.01

    def faults(self) -> list[str]:
        """Every field out of range, in words."""
        found = pull_faults("shrinkage", self.shrinkage, self.tolerance)
        for name, least in (("sweeps", 1), ("refit_steps", 0)):
            if not least <= getattr(self, name) <= MOST_STEPS:
                found.append(f"repair.{name} is {getattr(self, name)}: give {least} or more, up to {MOST_STEPS:,}")
        return found

    def needs(self) -> tuple[Statistic, ...]:
        return (Gram(),)

    def flops(self, rows: int, columns: int) -> int:
        return exchange_flops(rows, columns, self.sweeps) + refit_flops(rows, columns, self.refit_steps)

    def nbytes(self, rows: int, columns: int) -> int:
        return exchange_bytes(columns) + COPIES * rows * columns

    def repairs_rows(self, pattern: Pattern) -> bool:
        return True

    def repair(self, weight_OI: Tensor, keep_OI: Tensor, seen: Seen, pattern: Pattern) -> Repaired:
        """Better masks of the same counts, weights unchanged or refitted.

        Args as in SparseGPT.repair; raises ArithmeticError if the Gram matrix is not finite.
        """
        gram = seen[Gram()]
        kept_OI = exchanged(weight_OI, keep_OI, gram, pattern.group_width, self.sweeps, self.shrinkage)
        shared = factors_of(gram)
        new_OI = weight_OI.float()
        if self.refit_steps:
            damped_II = shared.damped(shared.edge() if self.shrinkage is None else self.shrinkage)
            unit_OI = new_OI * shared.scale_I
            new_OI = refit(unit_OI, kept_OI, damped_II, self.refit_steps, self.tolerance) / shared.scale_I
        repaired = finish(weight_OI, new_OI, kept_OI, keep_OI, shared.gram_II, shared.all_notes())
        repaired.swapped = int((kept_OI & ~keep_OI).sum())
        return repaired
