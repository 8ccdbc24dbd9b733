"""Experts of a mixture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.pruning.units.base import Unit

if TYPE_CHECKING:
    from ace_cli.methods.metrics.base import Metric
    from ace_cli.methods.repair.base import Repair
    from ace_cli.model.streamed import StreamedModel
    from ace_cli.pruning.cutting import Cutting


@register("unit", "expert", metric="reap", repair="none")
@dataclass
class ExpertUnit(Unit):
    """An expert goes with its row of the router and all that the router remembers of it. Every layer with experts keeps
    the same number, and as many of each group that the router chooses from. Shared experts stay.
    """

    trains = False
    dense_inputs = False

    def refusals(self, metric: Metric, repair: Repair) -> list[str]:
        found = [] if metric.experts else ["metric: it scores no experts"]
        return found + (["repair: no weight of what stays is refitted"] if repair.acts else [])

    def cutting(self, model: StreamedModel, name: str) -> Cutting:
        from ace_cli.pruning.expert_cutting import ExpertCutting

        return ExpertCutting(model, self, name)
