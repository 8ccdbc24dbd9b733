"""Magnitude pruning: the weights alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.methods.metrics.base import Metric

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.metrics.base import RowScores
    from ace_cli.methods.statistics import Seen


@register("metric", "magnitude")
@dataclass
class Magnitude(Metric):
    """S_ij = |W_ij|. Needs no calibration."""

    def scores_of_rows(self, weight_OI: Tensor, seen: Seen) -> RowScores:
        return lambda rows_RI, _: rows_RI.abs()
