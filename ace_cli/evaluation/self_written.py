"""Text the dense model writes itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.data.generation import EVALUATION, sample_windows
from ace_cli.evaluation.base import Evaluation

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.model.files import Checkpoint


@register("eval", "self")
@dataclass
class SelfWritten(Evaluation):
    """Sampled at temperature 1 by the dense model, apart from what calibration samples.

    Its perplexity compares a pruned model with its dense one; it says nothing beside other texts.
    """

    seq_len: int = 128
    max_windows: int | None = 32
    seed: int = 0
    dataset = "sampled from the dense model"

    def faults(self) -> list[str]:
        faults = super().faults()
        if self.max_windows is None:
            faults.append("eval.max_windows=null: eval=self writes as many windows as it is told; give a number")
        if self.seed < 0:
            faults.append(f"eval.seed={self.seed}: must not be negative")
        return faults

    def cut(self, checkpoint: Checkpoint, device: str) -> Tensor:
        return sample_windows(checkpoint, self.max_windows or 0, self.seq_len, self.seed, EVALUATION, device)
