"""Pruner-Zero's best metric (Dong et al., ICML 2024, arXiv 2406.02924), found by symbolic search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.methods.gradients import Gradient, Source, seed_faults
from ace_cli.methods.metrics.base import Metric

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.metrics.base import RowScores
    from ace_cli.methods.statistics import Seen, Statistic


@register("metric", "pruner_zero")
@dataclass
class PrunerZero(Metric):
    """S_ij = W_ij^2 (G_ij - min G) / (max G - min G), G_ij = sqrt(sum over windows of g_ij^2).

    Minimum and maximum are the matrix's. The tree that the authors found (``best_tree.json``): |W| |W| mms(G).
    ``source=model``: g is the gradient of one window's loss, as published. ``source=block`` (our reading, for models of
    any size): of one block's relative error, with targets that ``seed`` draws; see `ace_cli.methods.gradients`. Per
    row, as the authors prune.

    Departures: no dropout while gradients are taken; G stays in float32, where theirs, in float16 and times 100, may
    overflow. Where all of G is equal, every weight counts by its square.
    """

    source: Source = Source.block
    seed: int = 0

    def faults(self) -> list[str]:
        return seed_faults(self.seed)

    def needs(self) -> tuple[Statistic, ...]:
        return (Gradient(self.source, self.seed, power=2),)

    def scores_of_rows(self, weight_OI: Tensor, seen: Seen) -> RowScores:
        total_OI = seen[Gradient(self.source, self.seed, power=2)].total_OI
        low, high = (each.sqrt() for each in total_OI.aminmax())  # tensors: a device is not waited for
        width = high - low

        def scores(weight_RI: Tensor, rows: slice) -> Tensor:
            share_RI = total_OI[rows].sqrt().sub_(low).clamp_(min=0).div_(width)
            return share_RI.masked_fill_(width == 0, 1.0).mul_(weight_RI.float().square())

        return scores
