"""ATP (Huang et al. 2025, arXiv 2502.14770)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ace_cli.core.registry import register
from ace_cli.methods.allocation.base import MOST, Allocation, centred
from ace_cli.methods.patterns import Pattern, Ratio


@register("allocation", "atp")
@dataclass
class Atp(Allocation):
    """Later blocks lose more, in equal steps: p_l = p + beta (l - (L - 1) / 2), l = 0 .. L - 1, L blocks.

    An error made early is carried, and grows, through all that follows. ``rise`` = beta (L - 1) is the sparsity of the
    last block minus that of the first, so that one value serves models of any depth; the authors choose beta anew for
    every model by perplexity, in steps of 0.002 up to rise = min(2 p, 2 (1 - p)). Departure: the middle (L - 1) / 2 is
    weighted by parameters, so that the sparsity asked for is met where blocks differ in size.
    """

    rise: float = 0.2
    surveys = False

    def faults(self) -> list[str]:
        return [] if 0 <= self.rise < 1 else [f"allocation.rise={self.rise:g}: must lie in [0, 1)"]

    def refusal(self, pattern: Pattern) -> str | None:
        reason = super().refusal(pattern)
        if reason is None and isinstance(pattern, Ratio):
            p = float(pattern.p)
            most = 2 * min(p, MOST - p)
            if self.rise > most + 1e-9:
                reason = f"allocation.rise={self.rise:g} leads out of [0, {MOST:g}] around sparsity={p:g}"
                reason += f": at most {most:.2g}"
        return reason

    def span(self, p: float) -> float:
        return self.rise

    def sparsities(self, p: float, sizes: Sequence[int], measures: Sequence[float]) -> list[float]:
        last = max(1, len(sizes) - 1)
        return centred([self.rise * index / last for index in range(len(sizes))], sizes, p)
