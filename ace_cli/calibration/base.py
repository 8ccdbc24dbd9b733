"""What a calibration source is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.model.files import Checkpoint


@dataclass
class Calibration:
    """Yields ``n_samples`` token windows of ``seq_len``; the same seed gives the same windows."""

    n_samples: int = 128
    seq_len: int = 16
    seed: int = 0

    def faults(self) -> list[str]:
        """What is wrong with the knobs, one line each; empty when all is well."""
        faults = []
        if self.n_samples < 1:
            faults.append(f"calib.n_samples={self.n_samples}: must be at least 1")
        if self.seq_len < 2:
            faults.append(f"calib.seq_len={self.seq_len}: must be at least 2")
        if self.seed < 0:
            faults.append(f"calib.seed={self.seed}: must not be negative")
        return faults

    def windows(self, checkpoint: Checkpoint, device: str) -> Tensor:
        """Token ids, int64 (n_samples, seq_len), on the CPU. Raises AceError when the source cannot give them."""
        raise NotImplementedError
