"""C4, the calibration set of the literature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.data.calibration.base import Calibration
from ace_cli.data.documents import c4_documents, load_tokenizer, random_windows

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.model.files import Checkpoint


@register("calib", "c4")
@dataclass
class C4(Calibration):
    """Random windows of the first training shard of ``allenai/c4`` (English)."""

    def draw(self, checkpoint: Checkpoint, device: str) -> Tensor:
        documents = c4_documents("train")
        ids_NL = random_windows(documents, load_tokenizer(checkpoint), self.n_samples, self.seq_len, self.seed)
        return self.begin(ids_NL, checkpoint)
