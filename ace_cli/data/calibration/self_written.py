"""Windows the model writes itself: no data at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.data.calibration.base import Calibration
from ace_cli.data.generation import CALIBRATION, sample_windows

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.model.files import Checkpoint


@register("calib", "self")
@dataclass
class SelfWritten(Calibration):
    """Sampled at temperature 1 from the model's start token."""

    def draw(self, checkpoint: Checkpoint, device: str) -> Tensor:
        return sample_windows(checkpoint, self.n_samples, self.seq_len, self.seed, CALIBRATION, device)
