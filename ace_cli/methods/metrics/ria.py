"""RIA, relative importance and activations (Zhang et al., ICLR 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.methods.metrics.base import Metric, spread
from ace_cli.methods.metrics.relative import RelativeWeight, power_faults
from ace_cli.methods.statistics import SecondMoment

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.metrics.base import RowScores
    from ace_cli.methods.statistics import Seen, Statistic


@register("metric", "ria")
@dataclass
class RIA(Metric):
    """S_ij = ( |W_ij| / sum|W_*j| + |W_ij| / sum|W_i*| ) ||X_j||_2^alpha (Equation 4).

    ||X_j||_2 is taken as sqrt(E[x_j^2]): the factor T^(alpha/2) ranks nothing. ``scope`` decides what is compared:
    rows (our default, as Wanda) or the whole layer (the authors' code).
    """

    alpha: float = 0.5

    def needs(self) -> tuple[Statistic, ...]:
        return (SecondMoment(),)

    def faults(self) -> list[str]:
        return power_faults(self.alpha)

    def scores_of_rows(self, weight_OI: Tensor, seen: Seen) -> RowScores:
        relative, norm_I = RelativeWeight(weight_OI), seen[SecondMoment()].mean_I.pow(self.alpha / 2).float()
        return lambda rows_RI, _: relative(rows_RI).mul_(norm_I)

    def diagnose(self, seen: Seen) -> dict[str, Tensor | float]:
        return {"spread": spread(seen[SecondMoment()].mean_I.pow(self.alpha / 2))}
