"""Heads of attention."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.pruning.units.base import Unit

if TYPE_CHECKING:
    from ace_cli.model.links import Link, LinkFinder


class Heads(Enum):
    """What a unit is."""

    query = "query"
    group = "group"


@register("unit", "head", metric="wanda", repair="obs")
@dataclass
class Head(Unit):
    """``of=query``: query heads, as many of every group that shares a key-value head; where nothing is shared, a head
    with its keys and values. ``of=group``: whole groups, which shrinks the cache of keys and values as well, and costs
    more: of SmolLM2's three groups one, perplexity 61; one query head of each, 38.
    """

    splits_windows = True
    of: Heads = Heads.query
    multiple: int = 1

    def links(self, finder: LinkFinder, index: int) -> list[Link]:
        """One link for the output weight, proven by putting heads in another order."""
        from ace_cli.model.head_links import group_links, query_links

        return query_links(finder, index) if self.of is Heads.query else group_links(finder, index)
