"""ACE (arXiv 2505.21987v1): CosP and VarP together."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.methods.metrics.base import Metric
from ace_cli.methods.metrics.cosp import Mode, cosine_loss, cosine_needs, cosine_score
from ace_cli.methods.metrics.relative import RelativeWeight
from ace_cli.methods.metrics.varp import Form, Norm, variance_factor, variance_needs
from ace_cli.methods.repair.exchange import exchange_bytes, exchange_flops, exchanged
from ace_cli.methods.repair.least_squares import MOST_STEPS
from ace_cli.methods.statistics import Gram

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.metrics.base import RowScores
    from ace_cli.methods.patterns import Pattern
    from ace_cli.methods.statistics import Seen, Statistic


class Combine(Enum):
    """How ACE joins its two scores."""

    product = "product"  # S_cos S_var, "multiplies both importance scores element-wise" (digest)
    replace = "replace"  # VarP's factor takes the place of the norm in CosP, as it does in Wanda+VarP


@register("metric", "ace")
@dataclass
class ACE(Metric):
    """S_ij = S_cos_ij S_var_ij, CosP times RIA+VarP; then the angle of all the weights that leave together.

    1. The score ("multiplies both importance scores element-wise", digest of v1). By default
       S_cos = |W_ij| sqrt(E[(A - a_i^2) x_j^2 / A^2]), A = ||a||^2, the angle to second order, and
       S_var = R_ij E[u_j]^(1/2) (1 + Var[u_j] / E[u_j]^2)^(1/8), R_ij RIA's relative weight: a product ranks as the
       geometric mean of the two.
    2. CosP is what one weight does to the angle, all others kept; half of them are not. To second order, and with
       ||a_t|| in proportion to ||x_t||, the set P of a row's pruned weights turns the output by
       E_t[(sum_P W_ij x_tj)^2 / ||x_t||^2], a quadratic form of the token-normalised Gram matrix. ``sweeps`` times
       (0: not at all), a pruned weight is exchanged for a kept one of its row or group where that lowers it
       (``methods/repair/exchange.py``); ``shrinkage`` draws the form to its diagonal, the sum of single weights. Of 16
       sweeps the last makes a twentieth of the first's exchanges.

    The paper's first version, with |W_ij| in both and without the second step: ``relative=false mode=paper_abs norm=raw
    form=poly sweeps=0``. No scale of the inputs changes the mask where the slot has no bias. Evidence: README.
    """

    mode: Mode = Mode.exact2
    combine: Combine = Combine.product
    relative: bool = True
    norm: Norm = Norm.share
    form: Form = Form.norms
    sweeps: int = 16
    shrinkage: float | None = None

    cheaper = "metric=varp, on small models with a perplexity 3 to 70 % higher"

    def faults(self) -> list[str]:
        most = f"metric.sweeps={self.sweeps}: must be 0 or more, up to {MOST_STEPS:,}"
        found = [] if 0 <= self.sweeps <= MOST_STEPS else [most]
        if self.shrinkage is not None and not 0 <= self.shrinkage <= 1e9:
            found.append(f"metric.shrinkage={self.shrinkage}: must be 0 up to 1e9, or null for what the tokens ask for")
        return found

    def needs(self) -> tuple[Statistic, ...]:
        gram = (Gram(unit_tokens=True),) if self.sweeps else ()
        return (*cosine_needs(self.mode), *variance_needs(self.norm, self.form), *gram)

    def scores_of_rows(self, weight_OI: Tensor, seen: Seen) -> RowScores:
        relative = RelativeWeight(weight_OI) if self.relative else None
        factor_I = variance_factor(self.norm, self.form, seen).float()
        cosine = cosine_score if self.combine is Combine.product else cosine_loss

        def scores(rows_RI: Tensor, rows: slice) -> Tensor:
            variance_RI = rows_RI.abs().mul_(factor_I)
            if relative is not None:
                variance_RI.mul_(relative.scale(rows_RI))
            return variance_RI.mul_(cosine(self.mode, rows_RI, seen, rows))

        return scores

    @property
    def by_rows(self) -> bool:
        return not self.sweeps

    @property
    def refines_rows(self) -> bool:
        return True

    def refine(self, weight_OI: Tensor, keep_OI: Tensor, seen: Seen, pattern: Pattern) -> Tensor:
        if not self.sweeps:
            return keep_OI
        gram = seen[Gram(unit_tokens=True)]
        return exchanged(weight_OI, keep_OI, gram, pattern.group_width, self.sweeps, self.shrinkage)

    def flops(self, rows: int, columns: int) -> int:
        return exchange_flops(rows, columns, self.sweeps) if self.sweeps else 0

    def nbytes(self, rows: int, columns: int) -> int:
        return exchange_bytes(columns) if self.sweeps else 0
