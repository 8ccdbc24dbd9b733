"""SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774) as a method of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.methods.metrics.base import Metric
from ace_cli.methods.patterns import Scope
from ace_cli.methods.repair.least_squares import ROOT_BYTES, factors_of
from ace_cli.methods.repair.none import NoRepair
from ace_cli.methods.repair.sparsegpt import SparseGPT
from ace_cli.methods.statistics import Gram

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.repair.base import Repair
    from ace_cli.methods.statistics import Seen, Statistic


@register("metric", "sparsegpt")
@dataclass
class SparseGPTMetric(Metric):
    """S_ij = W_ij^2 / [H^-1]_jj, H = X^T X + 0.01 mean(diag) I (Equation 4 of SparseGPT, 9 of ACE).

    With repair=none or sparsegpt it is the published algorithm: the mask is chosen column block by column block from
    weights that the repair has already updated (this score, with the inverse of the columns still to come). A ratio
    compares all rows of a block of columns unless scope=row. With another repair it is this score, as it stands.
    """

    default_scope = Scope.layer

    def needs(self) -> tuple[Statistic, ...]:
        return (Gram(),)

    def score(self, weight_OI: Tensor, seen: Seen) -> Tensor:
        root_II = factors_of(seen[Gram()]).inverse_root(0.01, unit=False)
        return weight_OI.square() / root_II.square().sum(0)

    def nbytes(self, rows: int, columns: int) -> int:
        return ROOT_BYTES * columns**2

    def with_repair(self, repair: Repair) -> Repair:
        if isinstance(repair, NoRepair):
            return SparseGPT(adaptive=True)
        return replace(repair, adaptive=True) if isinstance(repair, SparseGPT) else repair
