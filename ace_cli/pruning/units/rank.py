"""Ranks: a weight becomes the product of two thinner ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.pruning.units.base import Unit

if TYPE_CHECKING:
    from ace_cli.methods.metrics.base import Metric
    from ace_cli.methods.repair.base import Repair


@register("unit", "rank", metric="svd_llm", repair="none")
@dataclass
class Rank(Unit):
    """W (O, I) ~ up (O, R) down (R, I); ``sparsity`` is the share of its parameters that the two have fewer.

    The checkpoint has the products in place of the weights: it loads everywhere and shows what quality is left, and is
    as large as it was. ``factors``: also the folder ``factors``, with up and down in their place and a modelling file:
    really smaller, and transformers needs trust_remote_code to load it.
    """

    cuts = False
    ranks = True
    factors: bool = False

    def refusals(self, metric: Metric, repair: Repair) -> list[str]:
        found = [] if metric.ranks else ["metric: it scores single weights or units, and finds no products"]
        return found + ([] if repair.ranks else ["repair: it refits single weights or units"])
