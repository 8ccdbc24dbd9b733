"""Single weights: nothing gets smaller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.pruning.units.base import Unit

if TYPE_CHECKING:
    from ace_cli.methods.metrics.base import Metric
    from ace_cli.methods.repair.base import Repair


@register("unit", "weight")
@dataclass
class Weight(Unit):
    """Weights become zeros where they are; files keep their shapes and load everywhere."""

    cuts = False
    splits_windows = True
    catches_up = True

    def refusals(self, metric: Metric, repair: Repair) -> list[str]:
        found = [] if metric.weights else ["metric: it does not score single weights"]
        return found + ([] if repair.weights else ["repair: it refits no single weights"])
