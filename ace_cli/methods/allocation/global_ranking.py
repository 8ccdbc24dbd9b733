"""Units of all blocks ranked together by their scores as they are: SoBP's first step (EMNLP 2024, main.775)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ace_cli.core.registry import register
from ace_cli.methods.allocation.base import bounded
from ace_cli.methods.allocation.ranked import Ranked

if TYPE_CHECKING:
    from torch import Tensor


@register("allocation", "global")
@dataclass
class GlobalRanking(Ranked):
    """A block loses the share of its units that lie among the p of all that score lowest, but ``most`` of them at most.

    All units are of one kind and cost the same, so this is the greedy answer to the knapsack of the best importance for
    the parameters. For scores that mean the same in every block, such as what the model's loss says (``metric=sobp``);
    ``allocation=flap`` standardises them first.
    """

    most: float = 0.9

    def faults(self) -> list[str]:
        return [] if 0 < self.most < 1 else [f"allocation.most={self.most:g}: must lie between 0 and 1"]

    def measure_units(self, score_U: Tensor) -> Any:
        return score_U.double().tolist()

    def shares(self, p: float, sizes: Sequence[int], measures: Sequence[Any], high: float) -> list[float]:
        return bounded(self.sparsities(p, sizes, measures), sizes, p, 0.0, max(p, min(high, self.most)))
