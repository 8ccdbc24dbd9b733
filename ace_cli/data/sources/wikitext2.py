"""WikiText-2: the usual perplexity; calibration for studies that calibrate on the text they evaluate."""

from __future__ import annotations

from dataclasses import dataclass

from ace_cli.core.registry import register
from ace_cli.data.documents import wikitext2_documents
from ace_cli.data.sources.base import DocumentSource


@register("source", "wikitext2")
@dataclass
class WikiText2(DocumentSource):
    """Calibration draws from the training split, its lines joined into one document (as SparseGPT's loader does);
    evaluation measures the raw test split, lines joined by two line breaks."""

    dataset = "Salesforce/wikitext wikitext-2-raw-v1 test"

    def documents(self) -> list[str]:
        return [" ".join(wikitext2_documents("train"))]

    def text(self) -> str:
        return "\n\n".join(wikitext2_documents("test"))
