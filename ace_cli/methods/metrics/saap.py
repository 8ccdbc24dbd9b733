"""SAAP's importance of coupled structures (arXiv 2412.15127): two scores fused, and how steady they are.

Shapes: B windows, I inputs of the weight that reads the units, U units.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.methods.gradients import Salience, Source, seed_faults
from ace_cli.methods.metrics.base import Metric

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.statistics import Seen, Statistic
    from ace_cli.methods.units import Units


class Fuse(Enum):
    """How the two scores of a unit become one."""

    group = "group"
    geometric = "geometric"


class Select(Enum):
    """What units are ranked by."""

    importance = "importance"
    asi = "asi"
    rank_sum = "rank_sum"


@register("metric", "saap")
@dataclass
class SAAP(Metric):
    """Of each window, with s = W g - 1/2 W^2 g^2 of every weight of a unit (columns that read it, rows that make it):

        I_v = sum over its vectors of |sum s|      I_e = sum of |s|          the paper's coarse and fine importance

    Fused by homoscedastic uncertainty, I = I_v / (2 a^2) + I_e / (2 b^2) + log(a b) with learned noises a and b. The
    paper does not say how they are learned, so this is a reading: the minimum over one pair for all units of a block is
    a^2 = mean I_v, b^2 = mean I_e (``fuse=group``; the rest is constant); over a pair for each unit it ranks as
    sqrt(I_v I_e) does (``fuse=geometric``).

    Units whose importance fluctuates most go (the paper's idea, its formula is not known; a reading): M = standard
    deviation over mean of I over the windows, ASI = (M - mean M) / std M over the block's units. ``select=importance``
    keeps the largest mean of I, ``asi`` the steadiest, ``rank_sum`` the largest sum of both ranks, equal ones by
    importance. With half of SmolLM2's channels gone, perplexity is 193 by importance, 461 by the sum of ranks, 1.2e5 by
    steadiness alone, which keeps channels that hardly speak: importance is the default.

    ``source=model``: g is of the whole model's loss, as in the paper; ``source=block`` (a reading, for models of any
    size): of one block's error, against targets that ``seed`` draws around its output.
    """

    fuse: Fuse = Fuse.group
    select: Select = Select.importance
    source: Source = Source.block
    seed: int = 0
    units = True
    weights = False

    def faults(self) -> list[str]:
        return seed_faults(self.seed)

    def needs(self) -> tuple[Statistic, ...]:
        return (Salience(self.source, self.seed),)

    def score_units(self, weight_OI: Tensor, seen: Seen, units: Units) -> Tensor:
        import torch

        wanted = Salience(self.source, self.seed)
        whole_BI, parts_BI = torch.cat(seen[wanted].columns_BI), torch.cat(seen[wanted].column_parts_BI)
        for made, rows_I in units.makers():
            whole_BI = whole_BI + torch.cat(made[wanted].rows_BO)[:, rows_I]
            parts_BI = parts_BI + torch.cat(made[wanted].row_parts_BO)[:, rows_I]
        whole_BU, parts_BU = (
            torch.stack([units.summed(each_I) for each_I in each_BI.double()]) for each_BI in (whole_BI, parts_BI)
        )
        importance_BU = fused(whole_BU, parts_BU, self.fuse)
        importance_U = importance_BU.mean(0)
        if self.select is Select.importance:
            return importance_U
        asi_U = instability(importance_BU)
        if self.select is Select.asi:
            return asi_U.max() - asi_U
        rank_U = _rank(importance_U)
        return rank_U + _rank(-asi_U) + rank_U / (2 * len(rank_U))


def fused(whole_BU: Tensor, parts_BU: Tensor, fuse: Fuse) -> Tensor:
    """I of every window and unit, (B, U), up to what is the same for all."""
    if fuse is Fuse.geometric:
        return (whole_BU * parts_BU).sqrt()
    return (whole_BU / whole_BU.mean().clamp(min=1e-300) + parts_BU / parts_BU.mean().clamp(min=1e-300)) / 2


def instability(importance_BU: Tensor) -> Tensor:
    """ASI, (U,): how far a unit's coefficient of variation is above the mean one, in standard deviations."""
    variation_U = importance_BU.std(0, correction=0) / importance_BU.mean(0).clamp(min=1e-300)
    centred_U = variation_U - variation_U.mean()
    return centred_U / variation_U.std(correction=0).clamp(min=1e-300)


def _rank(values_U: Tensor) -> Tensor:
    """How many are smaller, float64 (U,)."""
    import torch

    return torch.searchsorted(values_U.sort().values, values_U).double()
