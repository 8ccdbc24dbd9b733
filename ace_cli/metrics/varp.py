"""VarP, activation variance (ACE, arXiv 2505.21987, Equations 1-8), with |W| or RIA's relative weight."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from ace_cli.metrics.base import Metric
from ace_cli.metrics.relative import relative_weight
from ace_cli.registry import register
from ace_cli.statistics import SquareMoments, TokenSquares

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.statistics import Seen, Statistic


class Norm(Enum):
    """The normalised square v_tj that the paper assumes below 1 but never defines."""

    raw = "raw"  # v = x^2
    rms = "rms"  # v = x^2 / mean over tokens and inputs of x^2
    token = "token"  # v = x^2 / (lam + ||x_t||^2), lam = 0.01 mean_t ||x_t||^2: the only form Equation 10 implies
    max = "max"  # v = 0.999 x^2 / max x^2


class Form(Enum):
    """The function of v that multiplies the weight."""

    poly = "poly"  # E[v^2] + E[v] + 1, Equation 5
    series = "series"  # E[1 / (1 - min(v, 0.99))], Equation 7; the clamp keeps it from its pole at v = 1


def variance_factor(norm: Norm, form: Form, seen: Seen) -> Tensor:
    """f_j, float64 (I,): how much the activations of input j raise the importance of its weights."""
    if form is Form.poly and norm is not Norm.token:
        moments = seen[SquareMoments()]
        first_I, second_I = moments.first_I / moments.tokens, moments.second_I / moments.tokens
        scales = {Norm.raw: first_I.new_ones(()), Norm.rms: first_I.mean(), Norm.max: moments.largest.double() / 0.999}
        scale = scales[norm]
        return second_I / scale**2 + first_I / scale + 1
    v_TI = seen[TokenSquares()].squares_TI
    if norm is Norm.rms:
        v_TI = v_TI / v_TI.mean()
    elif norm is Norm.token:
        size_T1 = v_TI.sum(1, keepdim=True)
        v_TI = v_TI / (size_T1 + 0.01 * size_T1.mean())
    elif norm is Norm.max:
        v_TI = v_TI * (0.999 / v_TI.max())
    if form is Form.series:
        return (1 / (1 - v_TI.clamp(max=0.99))).double().mean(0)
    return v_TI.square().double().mean(0) + v_TI.double().mean(0) + 1


def variance_needs(norm: Norm, form: Form) -> tuple[Statistic, ...]:
    """The statistics ``variance_factor`` reads."""
    return (SquareMoments() if form is Form.poly and norm is not Norm.token else TokenSquares(),)


@register("metric", "varp")
@dataclass
class VarP(Metric):
    """S_ij = |W_ij|^wpow f_j, f_j = E[v_j^2] + E[v_j] + 1 = h + Var[v_j] (Equation 5 = Equations 1-3, exactly).

    ``norm`` and ``form`` are the paper's open points; raw + poly + wpow 1 is Equation 5, raw + series Equation 7,
    wpow 2 Equation 23. More variance makes a weight *more* important: the formulas and Figure 1 say so, the prose
    of the introduction says the opposite.
    """

    norm: Norm = Norm.raw
    form: Form = Form.poly
    wpow: int = 1

    def needs(self) -> tuple[Statistic, ...]:
        return variance_needs(self.norm, self.form)

    def faults(self) -> list[str]:
        return [] if self.wpow in (1, 2) else [f"metric.wpow={self.wpow}: must be 1 or 2"]

    def score(self, weight_OI: Tensor, seen: Seen) -> Tensor:
        return weight_OI.abs() ** self.wpow * variance_factor(self.norm, self.form, seen).float()


@register("metric", "ria_varp")
@dataclass
class RIAVarP(Metric):
    """S_ij = ( |W_ij| / sum|W_*j| + |W_ij| / sum|W_i*| ) f_j (Equation 8): VarP's f_j replaces RIA's norm."""

    norm: Norm = Norm.raw
    form: Form = Form.poly

    def needs(self) -> tuple[Statistic, ...]:
        return variance_needs(self.norm, self.form)

    def score(self, weight_OI: Tensor, seen: Seen) -> Tensor:
        return relative_weight(weight_OI) * variance_factor(self.norm, self.form, seen).float()
