"""The user's own text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.data.calibration.base import Calibration
from ace_cli.data.documents import load_tokenizer, local_documents, local_file_fault, random_windows

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.model.files import Checkpoint


@register("calib", "text")
@dataclass
class Text(Calibration):
    """Random windows of the documents of a local file; ``field`` is the column that holds the text."""

    path: str | None = None
    field: str = "text"

    def faults(self) -> list[str]:
        fault = local_file_fault(self.path, "calib.path")
        return super().faults() + ([fault] if fault else [])

    def draw(self, checkpoint: Checkpoint, device: str) -> Tensor:
        documents = local_documents(str(self.path), self.field)
        ids_NL = random_windows(documents, load_tokenizer(checkpoint), self.n_samples, self.seq_len, self.seed)
        return self.begin(ids_NL, checkpoint)
