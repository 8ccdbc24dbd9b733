"""C4, the calibration set of the literature."""

from __future__ import annotations

from dataclasses import dataclass

from ace_cli.core.registry import register
from ace_cli.data.documents import c4_documents
from ace_cli.data.sources.base import DocumentSource


@register("source", "c4")
@dataclass
class C4(DocumentSource):
    """English ``allenai/c4``. Calibration draws from the first training shard; evaluation measures the first 1,100
    documents of the first validation shard, joined by spaces, of which Wanda's protocol uses 256 windows."""

    defaults = {"eval": {"max_windows": 256}}
    dataset = "allenai/c4 en validation 00000-of-00008, first 1100 documents"

    def documents(self) -> list[str]:
        return c4_documents("train")

    def text(self) -> str:
        return " ".join(c4_documents("validation")[:1100])
