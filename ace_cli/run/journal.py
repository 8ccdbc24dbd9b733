"""An unfinished run on disk, so that no finished block is ever computed twice.

``output_dir`` holds, until the report is written, ``progress.jsonl``: what is being done (its identity) and a line for
every block whose weights are safely in ``checkpoint.partial``. A run of the same identity continues there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ace_cli.core.errors import AceError
from ace_cli.core.json_reader import read_object
from ace_cli.core.locks import is_locked
from ace_cli.model.pruned import MANIFEST
from ace_cli.pruning.diagnostics import ActivationFacts, OutputChange
from ace_cli.pruning.facts import BlockFacts, SlotFacts
from ace_cli.recovery.base import RecoveryFacts

_JOURNAL = "progress.jsonl"


class Work:
    """The folders and the journal of one run. ``finished`` are the blocks done by it or by an interrupted run before.

    ``news`` says, for the user, why something is continued or begun anew; empty for a plain start.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.final = folder / "checkpoint"
        self.partial = folder / "checkpoint.partial"
        self._old = folder / "checkpoint.old"
        self.identity = identity
        self.finished: list[BlockFacts] = []
        self.resumed = False
        self.news = ""
        if self.final.exists() and not (self.final / MANIFEST).is_file():
            raise AceError(f"{self.final} exists and was not made by ace-prune.", "Choose another output_dir.")
        self._resume()

    @property
    def digest(self) -> str:
        """The identity in short, as the finished checkpoint keeps it."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def complete(self) -> bool:
        """This run's checkpoint was renamed into place; only evaluation and report are missing."""
        if self.partial.exists() or not (self.final / MANIFEST).is_file():
            return False
        return bool(self.finished) and read_object(self.final / MANIFEST).get("identity") == self.digest

    @property
    def kept(self) -> str:
        """What becomes of an interrupted run, for the user."""
        if self.finished:
            return "Repeat the command to continue: finished blocks are kept."
        return ""

    def record(self, block: BlockFacts) -> None:
        """Note, durably, that a block's weights are on disk."""
        with open(self.folder / _JOURNAL, "a", encoding="utf-8") as journal:
            journal.write(json.dumps(dataclasses.asdict(block)) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def publish(self) -> None:
        """Rename the whole checkpoint into place; the reports of an older one go with it."""
        for name in ("report.json", "report.md", "report.html"):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self._old, ignore_errors=True)
        if self.final.exists():
            os.rename(self.final, self._old)
        os.rename(self.partial, self.final)
        shutil.rmtree(self._old, ignore_errors=True)

    def close(self) -> None:
        """The report is written: there is nothing left to continue, or of an older checkpoint if a stop left it."""
        (self.folder / _JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(self._old, ignore_errors=True)

    def discard(self) -> None:
        """Drop what cannot be continued: the journal first, so that it never tells of blocks that are gone."""
        (self.folder / _JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(self.partial, ignore_errors=True)
        shutil.rmtree(self.folder / "checkpoint.training", ignore_errors=True)

    def _resume(self) -> None:
        identity, blocks = _read_journal(self.folder)
        if identity is not None and identity != self.identity:
            changed = [key for key in self.identity if identity.get(key) != self.identity[key]]
            self.news = f"An unfinished run lies in {self.folder}, but {', '.join(changed)} changed: starting anew."
        elif identity is not None:
            self.finished = blocks
            if self.complete or self.partial.is_dir():
                self.resumed = bool(blocks)
                if blocks:
                    self.news = f"Continuing in {self.folder}: {len(blocks)} blocks are done."
                return
        self.restart()

    def restart(self) -> None:
        """Begin with nothing done."""
        self.finished, self.resumed = [], False
        self.discard()
        self.partial.mkdir()
        with open(self.folder / _JOURNAL, "w", encoding="utf-8") as journal:
            journal.write(json.dumps(self.identity) + "\n")


def find_unfinished(parent: Path, identity: dict[str, Any]) -> Path | None:
    """A folder in ``parent`` with an unfinished run of this identity that no other process works on."""
    for journal in sorted(parent.glob(f"*/{_JOURNAL}")):
        if _read_journal(journal.parent)[0] == identity and not is_locked(journal.parent):
            return journal.parent
    return None


def _slot(entry: dict[str, Any]) -> SlotFacts:
    activations = entry.pop("activations", None)
    seen = ActivationFacts.from_dict(activations) if activations else None
    return SlotFacts(**{**entry, "shape": tuple(entry["shape"]), "activations": seen})


def _read_journal(folder: Path) -> tuple[dict[str, Any] | None, list[BlockFacts]]:
    """The identity and the finished blocks; a line cut off by a crash ends the list."""
    try:
        first, *lines = (folder / _JOURNAL).read_text(encoding="utf-8").splitlines()
        identity = json.loads(first)
    except (OSError, ValueError):
        return None, []
    blocks: list[BlockFacts] = []
    for line in lines:
        try:
            entry = json.loads(line)
            slots = [_slot(slot) for slot in entry.pop("slots")]
            output, recovery = entry.pop("output", None), entry.pop("recovery", None)
            block = BlockFacts(
                slots=slots, output=output and OutputChange(**output), recovery=recovery and RecoveryFacts(**recovery),
                **entry,
            )  # fmt: skip
        except (ValueError, TypeError, KeyError):
            break
        if block.index != len(blocks):
            break
        blocks.append(block)
    return identity, blocks
