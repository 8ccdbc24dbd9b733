"""Channels of the multilayer perceptrons: the width between their first and their last weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.pruning.units.base import Unit

if TYPE_CHECKING:
    from ace_cli.model.expert_links import ExpertLink
    from ace_cli.model.links import Link, LinkFinder


@register("unit", "channel", metric="cfsp", repair="lstsq")
@dataclass
class Channel(Unit):
    """A channel is a row of gate and up, with their biases, and a column of down. Experts have channels, too: each
    chooses its own, and all keep equally many.

    ``multiple``: widths are multiples of it. ``uneven``: blocks may keep different numbers, as the allocation says; the
    folder then carries a modelling file, and transformers needs trust_remote_code to load it.
    """

    splits_windows = True
    multiple: int = 64
    uneven: bool = False

    def links(self, finder: LinkFinder, index: int) -> list[Link]:
        """Those in which any input can take any other's place: inside attention, they can do so within a head."""
        return finder.links(index, lambda link: link.channels_RWC.shape[0] == link.channels_RWC.shape[2] == 1)

    def inside(self, finder: LinkFinder, index: int) -> list[ExpertLink]:
        from ace_cli.model.expert_links import expert_links

        return expert_links(finder, index)
