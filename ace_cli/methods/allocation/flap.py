"""FLAP's global rule (An et al., AAAI 2024, arXiv 2312.11983)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ace_cli.core.registry import register
from ace_cli.methods.allocation.ranked import Ranked

if TYPE_CHECKING:
    from torch import Tensor


@register("allocation", "flap")
@dataclass
class Flap(Ranked):
    """Units of all blocks are ranked together, each block's scores brought to mean 0 and standard deviation 1 (AL-AM).

    A block loses the share of its units that lie among the p of all that are lowest. Scores are the metric's, of the
    dense model. Departure: where several kinds of units are cut, the authors weigh a head by its parameters; here one
    kind is cut at a time.
    """

    def measure_units(self, score_U: Tensor) -> Any:
        score_U = score_U.double()
        return ((score_U - score_U.mean()) / score_U.std().clamp(min=1e-300)).tolist()
