"""The residual stream: its width, between the blocks and before every norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.pruning.units.base import Unit

if TYPE_CHECKING:
    from ace_cli.methods.metrics.base import Metric
    from ace_cli.methods.repair.base import Repair


@register("unit", "hidden", metric="slicegpt", repair="none")
@dataclass
class Hidden(Unit):
    """Directions of the residual stream, of which the most used stay: as many everywhere, a multiple of ``multiple``.

    Every norm has a basis of its own, so the stream changes its basis on the way (``shortcut`` parameters); the folder
    carries a modelling file, and transformers needs trust_remote_code to load it.
    """

    cuts = False
    slices = True
    multiple: int = 8

    def refusals(self, metric: Metric, repair: Repair) -> list[str]:
        found = [] if metric.hidden else ["metric: it does not look at the residual stream"]
        return found + (["repair: it refits single weights or units"] if repair.acts else [])
