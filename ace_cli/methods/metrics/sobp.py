"""SoBP's importance of units (Wei et al., EMNLP 2024, main.775), from its abstract: no code is public.

Shapes: B windows, I inputs of the weight that reads the units, U units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.methods.gradients import Gates, Source, seed_faults
from ace_cli.methods.metrics.base import Metric

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.statistics import Seen, Statistic
    from ace_cli.methods.units import Units


@register("metric", "sobp")
@dataclass
class SoBP(Metric):
    """I_k = mean over windows of (dL / dz_k)^2, z_k = 1 a gate on unit k where the reading weight takes it in.

    The paper selects structures by global first-order information, refines the choice inside each module greedily, and
    ends with a reconstruction of each module. Our reading of its three steps: this score, ranked over all blocks
    (``allocation=global``: units of one kind cost the same, so the greedy knapsack of importance over cost takes the
    best); then, as many in each block, structured optimal brain surgery and least squares against the dense weight's
    outputs (``repair=obs``). With ``source=block`` (for models of any size) L is one block's error against targets that
    ``seed`` draws around its output: importance is then that to the block, and says less about which blocks matter.
    """

    source: Source = Source.model
    seed: int = 0
    units = True
    weights = False

    def faults(self) -> list[str]:
        return seed_faults(self.seed)

    def needs(self) -> tuple[Statistic, ...]:
        return (Gates(self.source, self.seed),)

    def score_units(self, weight_OI: Tensor, seen: Seen, units: Units) -> Tensor:
        import torch

        gates_BI = torch.cat(seen[Gates(self.source, self.seed)].gates_BI).double()
        return torch.stack([units.summed(gate_I) for gate_I in gates_BI]).square().mean(0)
