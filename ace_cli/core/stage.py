"""What a stage is: folder in, folder out. Pruning is the first; recovery of a whole model and exports come after it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Protocol

#: In a stage's folder: what made it and what it found, so that it can be recognised and replaced.
RECORD = "stage.json"


class Progress(Protocol):
    """Shows a bar of ``total`` steps; gives a function to call after each."""

    def __call__(self, what: str, total: int, done: int = 0) -> AbstractContextManager[Callable[[], None]]:
        """Begin the bar."""


class Stage:
    """Makes the folder ``name`` beside the checkpoint from a finished folder of the same run.

    A stage never changes what it reads. It writes into an empty folder that is renamed when it is whole, so whatever
    has the final name is finished; a finished one of the same identity is not made again.
    """

    #: Name of the folder, of the bar and of the section in the report.
    name: ClassVar[str]

    def identity(self) -> dict[str, Any]:
        """What decides every byte of the result beside the folder that is read."""
        raise NotImplementedError

    def refusal(self, source: Path) -> str | None:
        """Why this cannot be done with a model like the one in ``source`` (the dense one), before work begins."""
        return None

    def disk_bytes(self, source_bytes: int) -> int:
        """Expected size of the result, of a source of ``source_bytes``."""
        return source_bytes

    def run(self, source: Path, target: Path, progress: Progress) -> dict[str, Any]:
        """Fill the empty folder ``target``; facts for the report. Raises AceError for what the user can mend."""
        raise NotImplementedError

    def summary(self, facts: dict[str, Any]) -> str:
        """What ``run`` found, in one sentence for people."""
        raise NotImplementedError

    def verify(self, source: Path, target: Path) -> None:
        """Read the result anew; AceError if it is not what it should be."""
        raise NotImplementedError
