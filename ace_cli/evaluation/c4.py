"""C4 validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.data.documents import c4_documents, consecutive_windows, load_tokenizer
from ace_cli.evaluation.base import Evaluation

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.model.files import Checkpoint


@register("eval", "c4")
@dataclass
class C4(Evaluation):
    """The first 1,100 documents of the first validation shard, joined by spaces; Wanda's protocol uses 256 windows."""

    max_windows: int | None = 256
    dataset = "allenai/c4 en validation 00000-of-00008, first 1100 documents"

    def cut(self, checkpoint: Checkpoint, device: str) -> Tensor:
        text = " ".join(c4_documents("validation")[:1100])
        return consecutive_windows(text, load_tokenizer(checkpoint), self.seq_len)
