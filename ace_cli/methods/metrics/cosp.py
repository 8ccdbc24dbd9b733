"""CosP, the angle of outputs (first version of ACE, arXiv 2505.21987v1)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.methods.metrics.base import Metric
from ace_cli.methods.statistics import CosineTerm, SecondMoment

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.metrics.base import RowScores
    from ace_cli.methods.statistics import Seen, Statistic


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
