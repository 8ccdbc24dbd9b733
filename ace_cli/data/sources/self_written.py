"""Text the dense model writes itself: no data at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.core.steps import NOBODY, Steps
from ace_cli.data.generation import CALIBRATION, EVALUATION, TRAINING, sample_windows
from ace_cli.data.sources.base import TextSource

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.model.files import Checkpoint


@register("source", "self")
@dataclass
class SelfWritten(TextSource):
    """Sampled at temperature 1 from the dense model's start token; what is evaluated is sampled apart from what
    calibrates. Its perplexity compares a pruned model with its dense one; it says nothing beside other texts."""

    seed: int = 0

    defaults = {"eval": {"seq_len": 128, "max_windows": 32}}
    endless = True
    dataset = "text sampled from the dense model"

    def faults(self, group: str) -> list[str]:
        return [f"{group}.seed={self.seed}: must not be negative"] if self.seed < 0 else []

    def draw(
        self, checkpoint: Checkpoint, count: int, length: int, seed: int, device: str, steps: Steps = NOBODY,
        further: int = 0,
    ) -> Tensor:  # fmt: skip
        import torch

        ids_NL = sample_windows(checkpoint, count, length, seed, CALIBRATION, device, steps)
        if not further:
            return ids_NL
        return torch.cat([ids_NL, sample_windows(checkpoint, further, length, seed, TRAINING, device, steps)])

    def begin(self, ids_NL: Tensor, checkpoint: Checkpoint) -> Tensor:
        """As they are: the start token is what they were sampled from."""
        return ids_NL

    def cut(self, checkpoint: Checkpoint, length: int, most: int | None, device: str, steps: Steps = NOBODY) -> Tensor:
        return sample_windows(checkpoint, most or 0, length, self.seed, EVALUATION, device, steps)
