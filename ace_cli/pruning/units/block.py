"""Whole decoder blocks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.pruning.units.base import Unit

if TYPE_CHECKING:
    from ace_cli.methods.metrics.base import Metric
    from ace_cli.methods.repair.base import Repair
    from ace_cli.model.streamed import StreamedModel
    from ace_cli.pruning.cutting import Cutting


class Choose(Enum):
    """When blocks are scored."""

    at_once = "at_once"
    one_by_one = "one_by_one"


@register("unit", "block", metric="angular", repair="lstsq")
@dataclass
class Depth(Unit):
    """A block that goes is gone, and those behind it move up. ``choose=at_once``: the blocks of lowest score in the
    dense model go. ``one_by_one``: the lowest goes, the others are scored again without it.
    """

    dense_inputs = False
    catches_up = True
    choose: Choose = Choose.at_once

    def refusals(self, metric: Metric, repair: Repair) -> list[str]:
        found = [] if metric.blocks else ["metric: it scores no whole blocks"]
        return found + ([] if repair.blocks else ["repair: it knows nothing of blocks that go"])

    def cutting(self, model: StreamedModel, name: str) -> Cutting:
        from ace_cli.pruning.depth import DepthCutting

        return DepthCutting(model, self, name)
