"""FLAP's importance of units (An et al., AAAI 2024, arXiv 2312.11983)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.methods.metrics.base import Metric
from ace_cli.methods.statistics import Mean, SecondMoment

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.statistics import Seen, Statistic
    from ace_cli.methods.units import Units


@register("metric", "flap")
@dataclass
class FLAP(Metric):
    """S_i = Var[x_i] sum_o W_oi^2 (WIFV): how much the output fluctuates with input i, summed over a unit's inputs.

    Departures: the variance is over all tokens; the authors' code updates its mean in place and divides by sequences.
    What the constant part of a removed input gave is not added to a bias, which most families have not: repair=lstsq
    makes up for more than that with the weights that stay.
    """

    units = True
    weights = False

    def needs(self) -> tuple[Statistic, ...]:
        return (SecondMoment(), Mean())

    def score_units(self, weight_OI: Tensor, seen: Seen, units: Units) -> Tensor:
        variance_I = seen[SecondMoment()].mean_I - seen[Mean()].mean_I.square()
        return units.summed(variance_I.clamp(min=0) * weight_OI.square().sum(0).double())
