"""REAP's importance of experts (Lasby et al., arXiv 2510.13999)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.methods.metrics.base import Metric

if TYPE_CHECKING:
    from torch import Tensor


@register("metric", "reap")
@dataclass
class REAP(Metric):
    """S_e = mean over the tokens routed to e of g_e(x) ||f_e(x)||_2: what it adds where it is asked (Equation 9).

    g is the weight that the layer multiplies the expert's output by, as the router made it. An expert that no token was
    routed to has 0.
    """

    units = False
    weights = False
    experts = True
    of_states = True
    reads_outputs = True

    def of_routed(self, gate_T: Tensor, output_TH: Tensor) -> float:
        size_T = output_TH.float().norm(dim=1) * gate_T.float()
        return float(size_T.double().sum())

    def score_experts(self, total_E: Tensor, tokens_E: Tensor, index: int) -> Tensor:
        return total_E / tokens_E.clamp(min=1)
