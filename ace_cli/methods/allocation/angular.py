"""CFSP's coarse importance of blocks (Wang et al., COLING 2025, arXiv 2409.13199)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.methods.allocation.base import Allocation, weighted_mean
from ace_cli.methods.angles import angular_distance

if TYPE_CHECKING:
    from torch import Tensor

#: The authors divide a sum over 128 x 1024 tokens by 1e4: so much for a mean over tokens.
_SCALE = 128 * 1024 / 1e4


class Full(Enum):
    """What becomes of blocks that would keep more than they have."""

    draw = "draw"
    keep = "keep"


@register("allocation", "angular")
@dataclass
class Angular(Allocation):
    """Blocks that turn the hidden states further keep more: 1 - p_l = (1 - p) s_l / mean s.

    s_l = sigmoid(a z_l), z_l = 13.1 (I_l - mean I), I_l the mean over tokens of the angle between the states that go
    into the dense block and those that come out, as a share of pi (Equation 2 and the authors' code, whose sum over
    128 x 1024 tokens is made a mean here). Means are weighted by parameters. Where a block would keep more than all:
    with ``full=draw`` s is drawn to its mean until the most important one keeps 1 / 1.05 of that (the code's rule),
    with ``full=keep`` such a block keeps all, and the others lose as much less.
    """

    of_states = True
    a: float = 1.0
    full: Full = Full.keep

    def faults(self) -> list[str]:
        return [] if 0 < self.a <= 100 else [f"allocation.a={self.a:g}: must lie in (0, 100]"]

    def measure_states(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
        """I_l."""
        return angular_distance(before, after)

    def span(self, p: float) -> float:
        return 1 - p

    def sparsities(self, p: float, sizes: Sequence[int], measures: Sequence[float]) -> list[float]:
        s = self.importances(sizes, measures)
        mean = weighted_mean(s, sizes)
        if self.full is Full.draw and (1 - p) * max(s) / mean >= 1:
            drawn = mean * (1 / (1 - p) - 1) / (max(s) - mean) / 1.05
            s = [mean + (each - mean) * drawn for each in s]
        return [1 - (1 - p) * each / mean for each in s]

    def importances(self, sizes: Sequence[int], measures: Sequence[float]) -> list[float]:
        """s_l of every block, between 0 and 1."""
        middle = weighted_mean(measures, sizes)
        return [1 / (1 + math.exp(-self.a * _SCALE * (measure - middle))) for measure in measures]
