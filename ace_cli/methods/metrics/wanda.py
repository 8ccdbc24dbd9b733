"""Wanda (Sun et al. 2023, arXiv 2306.11695)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.kernels.selection import Scaled
from ace_cli.methods.metrics.base import Metric, spread
from ace_cli.methods.statistics import SecondMoment

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.metrics.base import RowScores
    from ace_cli.methods.statistics import Seen, Statistic


@register("metric", "wanda")
@dataclass
class Wanda(Metric):
    """S_ij = |W_ij| sqrt(E[x_j^2]), E over all calibration tokens (Equation 1 up to the factor sqrt(T))."""

    def needs(self) -> tuple[Statistic, ...]:
        return (SecondMoment(),)

    def scores_of_rows(self, weight_OI: Tensor, seen: Seen) -> RowScores:
        return Scaled(seen[SecondMoment()].mean_I.sqrt().float())

    def diagnose(self, seen: Seen) -> dict[str, Tensor | float]:
        return {"spread": spread(seen[SecondMoment()].mean_I.sqrt())}
