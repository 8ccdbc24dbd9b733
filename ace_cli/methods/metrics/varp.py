"""VarP, activation variance (ACE, arXiv 2505.21987, Equations 1-8), with |W| or RIA's relative weight."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.kernels.selection import Scaled
from ace_cli.methods.metrics.base import Metric, spread
from ace_cli.methods.metrics.relative import RelativeWeight, power_faults
from ace_cli.methods.statistics import ShareMoments, SquareMoments, TokenSquares

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.metrics.base import RowScores
    from ace_cli.methods.statistics import Seen, Statistic


class Norm(Enum):
    """The normalised square v_tj that the paper assumes below 1 but never defines."""

    share = "share"  # v = x^2 / ||x_t||^2: the share of an input in the size of its token, below 1 by construction
    raw = "raw"  # v = x^2
    rms = "rms"  # v = x^2 / mean over tokens and inputs of x^2
    token = "token"  # v = x^2 / (lam + ||x_t||^2), lam = 0.01 mean_t ||x_t||^2: the form that Equation 10 implies
    max = "max"  # v = 0.999 x^2 / max x^2


class Form(Enum):
    """The function of v that multiplies the weight."""

    norms = "norms"  # E[v]^(1/2) (1 + Var[v] / E[v]^2)^(1/8): between the 2-norm and the 4-norm of the activations
    poly = "poly"  # E[v^2] + E[v] + 1, Equation 5
    series = "series"  # E[1 / (1 - min(v, 0.99))], Equation 7; the clamp keeps it from its pole at v = 1


def variance_factor(norm: Norm, form: Form, seen: Seen) -> Tensor:
    """f_j, float64 (I,): how much the activations of input j raise the importance of its weights."""
    if form is Form.series or norm is Norm.token:
        v_TI = _normalised(norm, seen[TokenSquares()].squares_TI)
        if form is Form.series:
            return (1 / (1 - v_TI.clamp(max=0.99))).double().mean(0)
        first_I, second_I = v_TI.double().mean(0), v_TI.square().double().mean(0)
    elif norm is Norm.share:
        shares = seen[ShareMoments()]
        first_I, second_I = shares.first_I / shares.tokens, shares.second_I / shares.tokens
    else:
        moments = seen[SquareMoments()]
        first_I, second_I = moments.first_I / moments.tokens, moments.second_I / moments.tokens
        scales = {Norm.raw: first_I.new_ones(()), Norm.rms: first_I.mean(), Norm.max: moments.largest.double() / 0.999}
        first_I, second_I = first_I / scales[norm], second_I / scales[norm] ** 2
    if form is Form.norms:
        return first_I.sqrt().sqrt() * second_I.sqrt().sqrt().sqrt()
    return second_I + first_I + 1


def variance_needs(norm: Norm, form: Form) -> tuple[Statistic, ...]:
    """The statistics ``variance_factor`` reads."""
    if form is Form.series or norm is Norm.token:
        return (TokenSquares(),)
    return (ShareMoments() if norm is Norm.share else SquareMoments(),)


def _normalised(norm: Norm, v_TI: Tensor) -> Tensor:
    """x^2 (T, I) -> v (T, I)."""
    if norm is Norm.rms:
        return v_TI / v_TI.mean()
    if norm is Norm.max:
        return v_TI * (0.999 / v_TI.max())
    if norm is Norm.raw:
        return v_TI
    size_T1 = v_TI.sum(1, keepdim=True)
    lam = 0.01 * size_T1.mean() if norm is Norm.token else 0.0
    return v_TI / (size_T1 + lam).clamp(min=1e-30)


def diagnosis(norm: Norm, form: Form, seen: Seen, alpha: float = 1.0) -> dict[str, Tensor | float]:
    """``spread`` of f_j^alpha; ``above_one``: share of |x| >= 1."""
    facts: dict[str, Tensor | float] = {"spread": spread(variance_factor(norm, form, seen).pow(alpha))}
    for statistic in seen:
        if isinstance(statistic, SquareMoments):
            facts["above_one"] = statistic.above_one / (statistic.tokens * len(statistic.first_I))
    return facts


@register("metric", "varp")
@dataclass
class VarP(Metric):
    """S_ij = |W_ij| f_j, f_j = E[u_j]^(1/2) (1 + Var[u_j] / E[u_j]^2)^(1/8), u_tj = x_tj^2 / ||x_t||^2.

    The paper's Equation 5 is S = |W| (E[x^4] + E[x^2] + 1) = |W| (h + Var[x^2]): ``norm=raw form=poly``; Equation 7 is
    ``norm=raw form=series``, Equation 23 ``wpow=2``. The paper assumes x^2 < 1 and so depends on the scale of the
    activations; with E[u^2] = E[u]^2 + Var[u] the default keeps what it is about, that variance makes a weight *more*
    important at an equal mean (its formulas and Figure 1; its prose says the opposite), and is free of scale: the
    geometric mean of the 2-norm and the 4-norm of the inputs, every token brought to size 1.
    """

    norm: Norm = Norm.share
    form: Form = Form.norms
    wpow: int = 1

    def needs(self) -> tuple[Statistic, ...]:
        return variance_needs(self.norm, self.form)

    def faults(self) -> list[str]:
        return [] if self.wpow in (1, 2) else [f"metric.wpow={self.wpow}: must be 1 or 2"]

    def scores_of_rows(self, weight_OI: Tensor, seen: Seen) -> RowScores:
        factor_I = variance_factor(self.norm, self.form, seen).float()
        return Scaled(factor_I) if self.wpow == 1 else lambda rows_RI, _: rows_RI.square().mul_(factor_I)

    def diagnose(self, seen: Seen) -> dict[str, Tensor | float]:
        return diagnosis(self.norm, self.form, seen)


@register("metric", "ria_varp")
@dataclass
class RIAVarP(Metric):
    """S_ij = ( |W_ij| / sum|W_*j| + |W_ij| / sum|W_i*| ) f_j^alpha (Equation 8): the variance replaces RIA's norm.

    By default f_j is VarP's own, damped by ``alpha`` as RIA damps its norm, but half as much: undamped, a model with
    massive activations (Qwen2.5) keeps fewer of its attention sinks; with RIA's 1/2, Gemma 3 gains nothing over RIA.
    The paper's f_j is ``norm=raw form=series alpha=1``. No scale of a slot's inputs changes the mask. Evidence: README.
    """

    norm: Norm = Norm.share
    form: Form = Form.norms
    alpha: float = 0.75

    def faults(self) -> list[str]:
        return power_faults(self.alpha)

    def needs(self) -> tuple[Statistic, ...]:
        return variance_needs(self.norm, self.form)

    def scores_of_rows(self, weight_OI: Tensor, seen: Seen) -> RowScores:
        relative = RelativeWeight(weight_OI)
        factor_I = variance_factor(self.norm, self.form, seen).pow(self.alpha).float()
        return lambda rows_RI, _: relative(rows_RI).mul_(factor_I)

    def diagnose(self, seen: Seen) -> dict[str, Tensor | float]:
        return diagnosis(self.norm, self.form, seen, self.alpha)
