"""WikiText-2, for studies that calibrate on the text they evaluate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.data.calibration.base import Calibration
from ace_cli.data.documents import load_tokenizer, random_windows, wikitext2_documents

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.model.files import Checkpoint


@register("calib", "wikitext2")
@dataclass
class WikiText2(Calibration):
    """Random windows of the training split, its lines joined into one document (as SparseGPT's loader does)."""

    def draw(self, checkpoint: Checkpoint, device: str) -> Tensor:
        document = " ".join(wikitext2_documents("train"))
        ids_NL = random_windows([document], load_tokenizer(checkpoint), self.n_samples, self.seq_len, self.seed)
        return self.begin(ids_NL, checkpoint)
