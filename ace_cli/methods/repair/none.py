"""No repair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.methods.repair.base import Repair, Repaired

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.patterns import Pattern
    from ace_cli.methods.statistics import Seen


@register("repair", "none")
@dataclass
class NoRepair(Repair):
    """The kept weights stay as they are."""

    acts = False
    units = True
    ranks = True
    blocks = True

    def repair(self, weight_OI: Tensor, keep_OI: Tensor, seen: Seen, pattern: Pattern) -> Repaired:
        return Repaired(weight_OI, keep_OI)
