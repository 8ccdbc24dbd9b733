"""CFSP's fine-grained importance of channels (Wang et al., COLING 2025, arXiv 2409.13199)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.methods.metrics.base import Metric
from ace_cli.methods.statistics import SecondMoment

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.statistics import Seen, Statistic
    from ace_cli.methods.units import Units


class Form(Enum):
    """What is computed."""

    code = "code"
    eq8 = "eq8"


@register("metric", "cfsp")
@dataclass
class CFSP(Metric):
    """``form=code``: F_i = n_i = sqrt(E[x_i^2]) of the input i of the reading weight, what the authors' code ranks by.

    There every term of the sum over weights adds up to 1 over a channel, so that the weights cancel. ``form=eq8``
    normalises each term over the channels that compete, for each hidden dimension j (a reading of Equation 8):

        F_i = sum_j |Wd_ji| n_i / sum_i' |Wd_ji'| n_i' + sum over the producers, gate and up, of
              sum_j |W_ij| / sum_i' |W_i'j|.

    On SmolLM2 it is far worse than n_i. Units of several inputs take the sum over them (of squares, for the code's).
    """

    form: Form = Form.code
    units = True
    weights = False

    def needs(self) -> tuple[Statistic, ...]:
        return (SecondMoment(),)

    def score_units(self, weight_OI: Tensor, seen: Seen, units: Units) -> Tensor:
        if self.form is Form.code:
            return units.summed(seen[SecondMoment()].mean_I).sqrt()
        size_OI = weight_OI.abs() * seen[SecondMoment()].mean_I.sqrt().float()
        score_I = _shares(size_OI).sum(0)
        for rows_IH in units.producers():
            score_I = score_I + _shares(rows_IH.abs().T).sum(0)
        return units.summed(score_I)


def _shares(size_OI: Tensor) -> Tensor:
    """Each row brought to a sum of 1."""
    return size_OI / size_OI.sum(1, keepdim=True).clamp(min=1e-30)
