"""Experts by lot: what every other choice must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.methods.metrics.base import Metric

if TYPE_CHECKING:
    from torch import Tensor


@register("metric", "random")
@dataclass
class Random(Metric):
    """S_e uniform in [0, 1), another draw for each layer and ``seed``."""

    seed: int = 0
    units = False
    weights = False
    experts = True

    def faults(self) -> list[str]:
        return [] if 0 <= self.seed < 2**31 else [f"metric.seed={self.seed}: must lie in [0, 2^31)"]

    def score_experts(self, total_E: Tensor, tokens_E: Tensor, index: int) -> Tensor:
        import torch

        generator = torch.Generator().manual_seed((self.seed << 16) + index)
        return torch.rand(len(total_E), generator=generator, dtype=torch.float64)
