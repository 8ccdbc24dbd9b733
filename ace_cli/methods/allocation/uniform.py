"""The same pattern everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ace_cli.core.registry import register
from ace_cli.methods.allocation.base import Allocation
from ace_cli.methods.patterns import Pattern


@register("allocation", "uniform")
@dataclass
class Uniform(Allocation):
    """Every slot loses the same share: the protocol of Wanda, RIA and ACE."""

    surveys = False

    def refusal(self, pattern: Pattern) -> str | None:
        return None

    def sparsities(self, p: float, sizes: Sequence[int], measures: Sequence[float]) -> list[float]:
        return [p] * len(sizes)

    def patterns(
        self, pattern: Pattern, blocks: Sequence[Mapping[str, tuple[int, int]]], measures: Sequence[float]
    ) -> dict[str, Pattern]:
        return {name: pattern for block in blocks for name in block}
