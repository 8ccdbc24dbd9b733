"""OWL (Yin et al. 2023, arXiv 2310.05175)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.methods.allocation.base import Allocation, between_zero_and_one, centred, input_weighted
from ace_cli.methods.statistics import SecondMoment

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.statistics import Seen, Statistic


@register("allocation", "owl")
@dataclass
class Owl(Allocation):
    """Blocks with more outliers lose less: p_l = p - 2 lam (d_l - mean d), d_l = (D_l - min D) / (max D - min D).

    D_l = 100 * the fraction of A_ij = |W_ij| sqrt(E[x_j^2]), over all slots of the dense block, above ``mo`` times
    their mean (Section 3.2; the scaling is that of the authors' code, whose README gives mo = 5 and lam = 0.08).
    Departures: the mean of d is weighted by parameters, so that the sparsity asked for is met where blocks differ in
    size; blocks that do not differ in D are pruned alike, where the code divides by zero. For N:M, ``lam`` stays a
    share of the weights; the code's is a number of weights per group.
    """

    mo: float = 5.0
    lam: float = 0.08

    def faults(self) -> list[str]:
        faults = [] if self.mo > 0 else [f"allocation.mo={self.mo:g}: must be positive"]
        return faults + ([] if 0 <= self.lam < 0.5 else [f"allocation.lam={self.lam:g}: must lie in [0, 0.5)"])

    def needs(self) -> tuple[Statistic, ...]:
        return (SecondMoment(),)

    def measure(self, weights: Sequence[Tensor], seen: Sequence[Seen]) -> float:
        """D_l, in percent."""
        scores = [input_weighted(weight_OI, s) for weight_OI, s in zip(weights, seen, strict=True)]
        entries = sum(score_OI.numel() for score_OI in scores)
        mean = sum(float(score_OI.double().sum()) for score_OI in scores) / entries
        return 100 * sum(int((score_OI > self.mo * mean).sum()) for score_OI in scores) / entries

    def span(self, p: float) -> float:
        return 2 * self.lam

    def sparsities(self, p: float, sizes: Sequence[int], measures: Sequence[float]) -> list[float]:
        return centred([-2 * self.lam * d for d in between_zero_and_one(measures)], sizes, p)
