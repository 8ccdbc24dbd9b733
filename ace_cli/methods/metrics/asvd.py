"""ASVD's truncation after scaling (Yuan et al., arXiv 2312.05821)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.methods.low_rank import Factorisation, truncated
from ace_cli.methods.statistics import Size

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.statistics import Seen, Statistic


@register("metric", "asvd")
@dataclass
class ASVD(Factorisation):
    """W diag(d) = U diag(s) V^T, d_j = E[|x_j|]^alpha: W ~ [U_r s_r^(1/2)] [s_r^(1/2) V_r^T diag(d)^-1].

    Departures: the exact decomposition, where the authors' code draws a random one that differs from device to device;
    the mean over tokens, theirs is a sum over sequences, which scales d and changes nothing. An input of size 0 counts
    as a millionth of the mean one.
    """

    alpha: float = 0.5

    def faults(self) -> list[str]:
        return [] if 0 <= self.alpha <= 2 else [f"metric.alpha={self.alpha:g}: must lie between 0 and 2"]

    def needs(self) -> tuple[Statistic, ...]:
        return (Size(),)

    def factors(self, weight_OI: Tensor, seen: Seen, rank: int) -> tuple[Tensor, Tensor, list[str]]:
        mean_I = seen[Size()].mean_I
        d_I = mean_I.clamp(min=max(1e-6 * float(mean_I.mean()), 1e-30)).pow(self.alpha)
        up_OR, right_RI = truncated(weight_OI * d_I, rank)
        return up_OR, right_RI / d_I, []
