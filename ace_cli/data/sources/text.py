"""The user's own text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ace_cli.core.registry import register
from ace_cli.data.sources.base import DocumentSource
from ace_cli.data.text_files import local_documents, local_file_fault


@register("source", "text")
@dataclass
class Text(DocumentSource):
    """The documents of a local file; ``field`` is the column that holds the text. Evaluation joins them by two line
    breaks."""

    path: str | None = None
    field: str = "text"

    @property
    def dataset(self) -> str:
        """The file's name."""
        return Path(str(self.path)).name

    def faults(self, group: str) -> list[str]:
        fault = local_file_fault(self.path, f"{group}.path")
        return [fault] if fault else []

    def documents(self) -> list[str]:
        return local_documents(str(self.path), self.field)

    def text(self) -> str:
        return "\n\n".join(self.documents())
