"""The same pattern everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ace_cli.allocation.base import Allocation
from ace_cli.patterns import Pattern
from ace_cli.registry import register


@register("allocation", "uniform")
@dataclass
class Uniform(Allocation):
    """Every slot loses the same share: the protocol of Wanda, RIA and ACE."""

    def patterns(self, pattern: Pattern, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Pattern]:
        return dict.fromkeys(shapes, pattern)
