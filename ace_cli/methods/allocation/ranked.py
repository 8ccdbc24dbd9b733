"""What rules share that rank the units of all blocks together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ace_cli.methods.allocation.base import Allocation


@dataclass
class Ranked(Allocation):
    """A block loses the share of its units that lie among the p of all whose measure (``measure_units``) is lowest."""

    units_only = True

    def span(self, p: float) -> float:
        return 1.0

    def sparsities(self, p: float, sizes: Sequence[int], measures: Sequence[Any]) -> list[float]:
        """``measures``: a number for each unit, of each block."""
        ranked = sorted(score for scores in measures for score in scores)
        limit = ranked[min(len(ranked) - 1, round(p * len(ranked)))]
        return [sum(score < limit for score in scores) / len(scores) for scores in measures]
