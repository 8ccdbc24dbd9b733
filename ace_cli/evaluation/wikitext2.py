"""WikiText-2, the usual perplexity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.data.documents import consecutive_windows, load_tokenizer, wikitext2_documents
from ace_cli.evaluation.base import Evaluation

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.model.files import Checkpoint


@register("eval", "wikitext2")
@dataclass
class WikiText2(Evaluation):
    """The raw test split, lines joined by two line breaks."""

    dataset = "Salesforce/wikitext wikitext-2-raw-v1 test"

    def cut(self, checkpoint: Checkpoint, device: str) -> Tensor:
        text = "\n\n".join(wikitext2_documents("test"))
        return consecutive_windows(text, load_tokenizer(checkpoint), self.seq_len)
