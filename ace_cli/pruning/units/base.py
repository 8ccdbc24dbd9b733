"""What a unit is: the thing that is taken out of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ace_cli.methods.metrics.base import Metric
    from ace_cli.methods.repair.base import Repair
    from ace_cli.model.expert_links import ExpertLink
    from ace_cli.model.links import Link, LinkFinder
    from ace_cli.model.streamed import StreamedModel
    from ace_cli.pruning.cutting import Cutting


@dataclass
class Unit:
    """Single weights are zeroed; every other unit is cut out, so that the model gets smaller.

    A subclass says where its units lie in a block (``links``).
    """

    #: False if weights become zeros, and no tensor gets smaller.
    cuts = True
    #: True if weights become products of two thinner ones.
    ranks = False
    #: True if the residual stream gets narrower.
    slices = False
    #: Whether a recovery trains single blocks that it was cut out of.
    trains = True
    #: Whether workers may each have calibration windows of their own: statistics of all slots decide, and nothing else.
    splits_windows = False
    #: Whether what comes after may see the dense model.
    dense_inputs = True
    #: Whether weights may make up for what was lost before them; where units are cut inside blocks, that loses.
    catches_up = False
    #: Widths are multiples of ``multiple``; ``uneven``: blocks may keep different numbers.
    multiple = 1
    uneven = False

    def faults(self) -> list[str]:
        """What is wrong with the options, one line each; empty when all is well."""
        return [] if self.multiple >= 1 else [f"unit.multiple={self.multiple}: must be 1 or more"]

    def refusals(self, metric: Metric, repair: Repair) -> list[str]:
        """Why these do not go with the unit: "metric: it scores ..."."""
        found = [] if metric.units else ["metric: it does not score units"]
        if not repair.units:
            found.append("repair: it refits no units")
        elif not repair.keeps_mask():
            found.append("repair: with its options it chooses single weights")
        return found

    def cutting(self, model: StreamedModel, name: str) -> Cutting:
        """What takes these units, called ``name`` by the user, out of ``model``. AceError if it has none."""
        from ace_cli.pruning.unit_cutting import UnitCutting

        return UnitCutting(model, self, name)

    def links(self, finder: LinkFinder, index: int) -> list[Link]:
        """The units of loaded block ``index``: one link for each weight that reads some, proven with its weights."""
        raise NotImplementedError

    def inside(self, finder: LinkFinder, index: int) -> list[ExpertLink]:
        """Those inside its experts, proven alike. AceError, by name, where they cannot be told."""
        return []
