"""DLP (Chen et al. 2025, arXiv 2505.23807)."""

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


@register("allocation", "dlp")
@dataclass
class Dlp(Allocation):
    """Blocks whose median score is larger lose more: p_l = p - 2 alpha (r_l - mean r).

    U_l = median of A_ij = |W_ij| sqrt(E[x_j^2]) over all slots of the dense block ("unimportance"); its relative
    importance 1 - U_l / sum U is mapped linearly on r_l in [0, 1], which leaves r_l = (max U - U_l) / (max U - min U).
    Source: the authors' code (alpha = 0.15). Departures: as for OWL, the mean is weighted by parameters and blocks
    that do not differ are pruned alike. Of an even number of scores the median is the lower middle one, as in torch.
    """

    alpha: float = 0.15

    def faults(self) -> list[str]:
        return [] if 0 <= self.alpha < 0.5 else [f"allocation.alpha={self.alpha:g}: must lie in [0, 0.5)"]

    def needs(self) -> tuple[Statistic, ...]:
        return (SecondMoment(),)

    def measure(self, weights: Sequence[Tensor], seen: Sequence[Seen]) -> float:
        """U_l. All scores of the block are in memory together."""
        import torch

        scores = [input_weighted(weight_OI, s).view(-1) for weight_OI, s in zip(weights, seen, strict=True)]
        return float(torch.cat(scores).median())

    def span(self, p: float) -> float:
        return 2 * self.alpha

    def sparsities(self, p: float, sizes: Sequence[int], measures: Sequence[float]) -> list[float]:
        return centred([2 * self.alpha * u for u in between_zero_and_one(measures)], sizes, p)
