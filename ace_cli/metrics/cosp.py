"""CosP, the angle of outputs (first version of ACE, arXiv 2505.21987v1), and ACE itself: CosP and VarP together."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from ace_cli.metrics.base import Metric
from ace_cli.metrics.relative import RelativeWeight
from ace_cli.metrics.varp import Form, Norm, variance_factor, variance_needs
from ace_cli.registry import register
from ace_cli.repair.exchange import exchange_flops, exchanged
from ace_cli.statistics import CosineTerm, Gram, SecondMoment

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.metrics.base import RowScores
    from ace_cli.patterns import Pattern
    from ace_cli.statistics import Seen, Statistic


class Mode(Enum):
    """How the loss of cosine similarity caused by one weight is measured; a = W x + b, A = ||a||^2."""

    paper = "paper"  # L = |W_ij| |E[a_i x_j / A]|, the digest's formula; S = |W_ij| ||X_j|| L
    paper_abs = "paper_abs"  # L = |W_ij| E[|a_i| |x_j| / A]: the same without cancellation between tokens
    exact2 = "exact2"  # S = |W_ij| sqrt(E[(A - a_i^2) x_j^2 / A^2]), the square root of twice the second-order loss
    exact = "exact"  # S = sqrt(E[1 - cos]) itself, element by element: slow, for reference
    tokwanda = "tokwanda"  # S = |W_ij| sqrt(E[x_j^2 / A]), the limit A >> a_i^2: Wanda on token-normalised inputs


_TERM = {
    Mode.paper: "signed",
    Mode.paper_abs: "absolute",
    Mode.exact2: "second",
    Mode.exact: "exact",
    Mode.tokwanda: "token",
}


def cosine_needs(mode: Mode) -> tuple[Statistic, ...]:
    """The statistics ``cosine_score`` reads."""
    norm = (SecondMoment(),) if mode in (Mode.paper, Mode.paper_abs) else ()
    return (CosineTerm(_TERM[mode]), *norm)


def cosine_loss(mode: Mode, weight_OI: Tensor, seen: Seen, rows: slice = slice(None)) -> Tensor:
    """float32, (O, I): the loss term alone, linear in |W| for every mode (a square root for the second-order ones).

    ``weight_OI``, like the result, is these ``rows`` of the slot's.
    """
    term = seen[CosineTerm(_TERM[mode])]
    assert term.total_OI is not None
    mean_OI = (term.total_OI if mode is Mode.tokwanda else term.total_OI[rows]) / term.tokens
    if mode is Mode.exact:
        return mean_OI.sqrt().float()
    if mode in (Mode.paper, Mode.paper_abs):
        return weight_OI.abs() * mean_OI.abs().float()
    return weight_OI.abs() * mean_OI.sqrt().float()


def cosine_score(mode: Mode, weight_OI: Tensor, seen: Seen, rows: slice = slice(None)) -> Tensor:
    """The CosP score, float32 (O, I); the paper's modes multiply the loss by Wanda's |W_ij| ||X_j||."""
    loss_OI = cosine_loss(mode, weight_OI, seen, rows)
    if mode in (Mode.paper, Mode.paper_abs):
        return weight_OI.abs() * seen[SecondMoment()].mean_I.sqrt().float() * loss_OI
    return loss_OI


@register("metric", "cosp")
@dataclass
class CosP(Metric):
    """S_ij = how far removing W_ij turns the slot's output (digest of v1, Mechanism 1).

    The paper's formula (``mode=paper``) is the first-order change of the projection a.a'/||a||^2; the first-order
    change of the cosine itself is zero. ``mode=exact2`` is the second-order change, exact to O(delta^3). Evidence:
    README, What we found about ACE.
    """

    mode: Mode = Mode.exact2

    def needs(self) -> tuple[Statistic, ...]:
        return cosine_needs(self.mode)

    def scores_of_rows(self, weight_OI: Tensor, seen: Seen) -> RowScores:
        return lambda rows_RI, rows: cosine_score(self.mode, rows_RI, seen, rows)


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
       (``ace_cli.repair.exchange``); ``shrinkage`` draws the form to its diagonal, the sum of single weights. Of 16
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

    def faults(self) -> list[str]:
        found = [] if self.sweeps >= 0 else [f"metric.sweeps={self.sweeps}: must be 0 or more"]
        if self.shrinkage is not None and not 0 <= self.shrinkage < float("inf"):
            found.append(f"metric.shrinkage={self.shrinkage}: must be 0 or more, or null for what the tokens ask for")
        return found

    def needs(self) -> tuple[Statistic, ...]:
        gram = (Gram(unit_tokens=True),) if self.sweeps else ()
        return (*cosine_needs(self.mode), *variance_needs(self.norm, self.form), *gram)

    def score(self, weight_OI: Tensor, seen: Seen) -> Tensor:
        variance_OI = weight_OI.abs() * variance_factor(self.norm, self.form, seen).float()
        if self.relative:
            variance_OI = variance_OI * RelativeWeight(weight_OI).scale(weight_OI)
        cosine = cosine_score if self.combine is Combine.product else cosine_loss
        return variance_OI * cosine(self.mode, weight_OI, seen)

    def refine(self, weight_OI: Tensor, keep_OI: Tensor, seen: Seen, pattern: Pattern) -> Tensor:
        if not self.sweeps:
            return keep_OI
        gram = seen[Gram(unit_tokens=True)]
        return exchanged(weight_OI, keep_OI, gram, pattern.group_width, self.sweeps, self.shrinkage)

    def flops(self, rows: int, columns: int) -> int:
        return exchange_flops(rows, columns, self.sweeps) if self.sweeps else 0
