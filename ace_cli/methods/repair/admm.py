"""ADMM refit (Boza, arXiv 2401.02938): the least-squares weights for a mask, and a mask chosen while fitting.

Shapes: I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.methods.repair.base import Repair, Repaired
from ace_cli.methods.repair.least_squares import (
    COPIES,
    INVERSE_BYTES,
    MOST_STEPS,
    factor_flops,
    factors_of,
    finish,
    pull_faults,
    refit,
    refit_flops,
    row_errors,
)
from ace_cli.methods.statistics import Gram

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.patterns import Pattern
    from ace_cli.methods.statistics import Seen, Statistic


@register("repair", "admm")
@dataclass
class Admm(Repair):
    """Alternating directions on min ||(W - Z) X||^2 with Z sparse, in unit coordinates V = W s, A = R + shrinkage * I.

    With dual U = 0 at the start, V' = V, and K = (A + rho I)^{-1} (algorithm 1 of the paper, transposed):

        Z = (V' + U) * keep,    U = U + V' - Z,    V' = (V A + rho (Z - U)) K.

    In the first `mask_iterations` rounds keep is chosen from |V' + U|, which in round one is Wanda's score, and the
    pruned share grows as 1 - (1 - t / mask_iterations)^3. With mask_iterations = 0 the given mask stays; otherwise the
    score that made it is not looked at again.

    A stands on both sides of the equation (V A, not V R), so shrinkage pulls towards the *original* weights: the error
    minimised is ||(W - W') X||^2 + shrinkage * ||(W - W') s||^2. The paper's 0.1 of the mean diagonal, taken after its
    scaling by s, is shrinkage 0.1. None takes inputs / tokens (`Factors.noise`).

    Departures: `polish` steps of masked conjugate gradients follow, and start in each row from the better of Z and the
    masked weights. So the error never exceeds that of the masked weights, which ADMM alone does not promise; where its
    own mask ends worse than the masked weights, the first mask is refitted instead, with a note. For a given mask,
    conjugate gradients alone (iterations = 0) cost no more than ADMM and end closer to the same optimum.
    """

    units = True
    shrinkage: float | None = None
    rho: float = 1.0
    iterations: int = 0
    mask_iterations: int = 0
    polish: int = 30
    tolerance: float = 0.01

    def faults(self) -> list[str]:
        """Every field out of range, in words."""
        found = pull_faults("shrinkage", self.shrinkage, self.tolerance)
        if not 0 < self.rho < float("inf"):
            found.append(f"repair.rho is {self.rho}: give a positive number, such as 1")
        if not 0 <= self.mask_iterations <= self.iterations:
            found.append(
                f"repair.mask_iterations is {self.mask_iterations}: give 0 to repair.iterations ({self.iterations})"
            )
        if self.iterations > MOST_STEPS:
            found.append(f"repair.iterations is {self.iterations}: give 0 up to {MOST_STEPS:,}")
        if not 0 <= self.polish <= MOST_STEPS:
            found.append(f"repair.polish is {self.polish}: give 0 up to {MOST_STEPS:,}, such as 30")
        if self.iterations + self.polish < 1:
            found.append("repair.iterations and repair.polish are both 0: raise one, or use repair=none")
        return found

    def keeps_mask(self) -> bool:
        return self.mask_iterations == 0

    def repairs_rows(self, pattern: Pattern) -> bool:
        return self.mask_iterations == 0  # else all rows together decide whether its own masks are better

    def needs(self) -> tuple[Statistic, ...]:
        return (Gram(),)

    def flops(self, rows: int, columns: int) -> int:
        rounds = factor_flops(columns) + 2 * (self.iterations + 1) * rows * columns**2 if self.iterations else 0
        return rounds + refit_flops(rows, columns, self.polish)

    def nbytes(self, rows: int, columns: int) -> int:
        return (6 + (INVERSE_BYTES if self.iterations else 0)) * columns**2 + COPIES * rows * columns

    def repair(self, weight_OI: Tensor, keep_OI: Tensor, seen: Seen, pattern: Pattern) -> Repaired:
        """Refit the kept weights of (O, I); with mask_iterations also choose them, by the pattern.

        Args as in SparseGPT.repair. Raises ArithmeticError where (A + rho I) has no Cholesky factor: NaN or Inf in G.
        """
        shared = factors_of(seen[Gram()])
        unit_OI = weight_OI.float() * shared.scale_I
        shrinkage = shared.noise() if self.shrinkage is None else self.shrinkage
        damped_II = shared.damped(shrinkage)
        kept_OI, start_OI = keep_OI, None
        if self.iterations:
            inverse_II = shared.inverse(shrinkage + self.rho)
            kept_OI, start_OI = self._alternate(unit_OI, keep_OI, damped_II, inverse_II, pattern)
        notes = shared.all_notes()
        if self.polish:
            start_OI = refit(unit_OI, kept_OI, damped_II, self.polish, self.tolerance, start_OI)
            if self.mask_iterations and _worse(unit_OI, start_OI, keep_OI, damped_II):
                kept_OI, notes = (
                    keep_OI,
                    [*notes, "the rounds of ADMM found no better mask: the first one was refitted"],
                )
                start_OI = refit(unit_OI, keep_OI, damped_II, self.polish, self.tolerance)
        new_OI = unit_OI if start_OI is None else start_OI
        return finish(weight_OI, new_OI / shared.scale_I, kept_OI, keep_OI, shared.gram_II, notes)

    def _alternate(
        self, unit_OI: Tensor, keep_OI: Tensor, damped_II: Tensor, inverse_II: Tensor, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """The rounds of ADMM: (mask, weights in unit coordinates)."""
        target_OI = unit_OI @ damped_II
        free_OI, dual_OI, kept_OI = unit_OI, unit_OI * 0.0, keep_OI
        for t in range(self.iterations):
            sum_OI = free_OI + dual_OI
            if t < self.mask_iterations:
                share = 1 - (1 - (t + 1) / self.mask_iterations) ** 3
                kept_OI = keep_share(sum_OI.abs(), pattern, share)
            sparse_OI = sum_OI.masked_fill(~kept_OI, 0.0)
            dual_OI = sum_OI - sparse_OI
            free_OI = (target_OI + self.rho * (sparse_OI - dual_OI)) @ inverse_II
        return kept_OI, (free_OI + dual_OI).masked_fill(~kept_OI, 0.0)


def _worse(unit_OI: Tensor, new_OI: Tensor, keep_OI: Tensor, damped_II: Tensor) -> bool:
    """Whether the new weights err more than the original ones under the first mask, all rows together."""
    masked_OI = unit_OI.masked_fill(keep_OI, 0.0)
    return bool(row_errors(unit_OI - new_OI, damped_II).sum() > row_errors(masked_OI, damped_II).sum())


def keep_share(score_OI: Tensor, pattern: Pattern, share: float) -> Tensor:
    """The pattern's mask with only the lowest `share` of each row's pruned weights pruned yet; (O, I) bool.

    Row i prunes floor(share * k_i) of its k_i, the first in stable ascending order of (score, column).
    """
    import torch

    keep_OI = pattern.keep(score_OI)
    if share >= 1:
        return keep_OI
    order_OI = score_OI.masked_fill(keep_OI, float("inf")).argsort(dim=1, stable=True)
    count_O = ((~keep_OI).sum(1) * share + 1e-9).floor()
    pruned_OI = torch.arange(score_OI.shape[1], device=score_OI.device) < count_O[:, None]
    return torch.zeros_like(keep_OI).scatter(1, order_OI, pruned_OI).logical_not()
