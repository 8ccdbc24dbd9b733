"""The angular distance of a block: how far it turns the hidden states (Gromov et al., arXiv 2403.17887)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.methods.angles import angular_distance
from ace_cli.methods.metrics.base import Metric

if TYPE_CHECKING:
    from torch import Tensor


@register("metric", "angular")
@dataclass
class AngularDistance(Metric):
    """S_l = mean over tokens of arccos(<x_l, y_l> / |x_l| |y_l|) / pi, x_l the states into block l and y_l out of it.

    Departure: the authors look at a run of blocks, at the last token of each sequence; here a block at a time, at all
    tokens, as ShortGPT does with 1 - cos (arXiv 2403.03853). Both put blocks in nearly the same order.
    """

    units = False
    weights = False
    blocks = True
    of_states = True

    def score_states(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
        return angular_distance(before, after)
