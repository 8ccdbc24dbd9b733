"""How often experts are asked: the plainest measure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.methods.metrics.base import Metric

if TYPE_CHECKING:
    from torch import Tensor


@register("metric", "frequency")
@dataclass
class Frequency(Metric):
    """S_e = the number of tokens that the router sends to e."""

    units = False
    weights = False
    experts = True
    of_states = True

    def score_experts(self, total_E: Tensor, tokens_E: Tensor, index: int) -> Tensor:
        return tokens_E.double()
