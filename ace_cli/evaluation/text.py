"""The user's own text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.data.documents import consecutive_windows, load_tokenizer, local_documents, local_file_fault
from ace_cli.evaluation.base import Evaluation

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.model.files import Checkpoint


@register("eval", "text")
@dataclass
class Text(Evaluation):
    """The documents of a local file joined by two line breaks; ``field`` is the column that holds the text."""

    path: str | None = None
    field: str = "text"

    @property
    def dataset(self) -> str:  # type: ignore[override]
        """The file's name."""
        return Path(str(self.path)).name

    def faults(self) -> list[str]:
        fault = local_file_fault(self.path, "eval.path")
        return super().faults() + ([fault] if fault else [])

    def cut(self, checkpoint: Checkpoint, device: str) -> Tensor:
        text = "\n\n".join(local_documents(str(self.path), self.field))
        return consecutive_windows(text, load_tokenizer(checkpoint), self.seq_len)
