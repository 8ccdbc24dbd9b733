"""An unfinished run on disk, so that no finished block is ever computed twice.

``output_dir`` holds, until the report is written, ``progress.jsonl``: what is being done, of which files, into which
files; and a line for every block whose weights are safely in ``checkpoint.partial``. A run of the same identity
continues there, from the first block on that is not as the journal says: neither the source, nor what was made of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ace_cli.core.errors import AceError
from ace_cli.core.json_reader import parse_object, read_object
from ace_cli.core.locks import is_locked
from ace_cli.core.own_files import check_ours, remove
from ace_cli.core.typed_json import typed
from ace_cli.model.files import Checkpoint, CheckpointWriter
from ace_cli.model.pruned import MANIFEST, RECOVERED, checkpoint_files, read_manifest
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.facts import BlockFacts

_JOURNAL = "progress.jsonl"
#: In ``checkpoint.training``, once all is trained: from then on its files take the place of the pruned ones.
TRAINED = "done.json"
REPORTS = ("report.json", "report.md", "report.html")


@dataclass(frozen=True)
class Head:
    """The journal's first line. ``stamps`` are of the source's files, ``files`` what the new checkpoint will hold.

    ``keep``: the checkpoint stays when the run is done.
    """

    identity: dict[str, Any]
    stamps: dict[str, list[int]]
    files: list[str]
    keep: bool


@dataclass(frozen=True)
class Done:
    """A finished block. ``source``: the hashes of all that was read since the block before, its own tensors among it.

    ``written``: those of what was written for its tensors; ``moved``: those that have another name in the new files, or
    an empty one because they are gone.
    """

    block: BlockFacts
    source: dict[str, str]
    written: dict[str, str]
    moved: dict[str, str] = field(default_factory=dict)


@dataclass
class Journal:
    """What was read of a journal; lines from the first on that make no sense are left out."""

    head: Head
    done: list[Done] = field(default_factory=list)


class Work:
    """The folders and the journal of one run. ``finished`` are the blocks done by it or by an interrupted run before.

    ``news`` says, for the user, why something is continued or begun anew; empty for a plain start. Raises AceError
    where something would have to give way that this run, or one that was replaced by it, did not make.
    """

    def __init__(
        self, folder: Path, identity: dict[str, Any], model: StreamedModel, keep: bool = True, more: Iterable[str] = ()
    ) -> None:
        """``more``: files of the checkpoint beside those that it has whatever is pruned."""
        self._name(folder, identity, model)
        self._head = Head(identity, model.checkpoint.stamps, [*checkpoint_files(model.checkpoint), *more], keep)
        journal = read_journal(folder)
        self._check_ours(journal)
        remove(self._old, _files_of(self._old), last=MANIFEST)  # a stop left it
        self._resume(journal)

    def _name(self, folder: Path, identity: dict[str, Any], model: StreamedModel) -> None:
        self.folder = folder
        self.final = folder / "checkpoint"
        self.partial = folder / "checkpoint.partial"
        self._old = folder / "checkpoint.old"
        #: Of a whole-model recovery: what has been trained, until it is whole and takes the pruned weights' place.
        self.training = folder / "checkpoint.training"
        self.identity = identity
        self.finished: list[BlockFacts] = []
        self.resumed = False
        self.news = ""
        self._model = model
        self._noted: set[str] = set()  # tensors whose hash the journal has

    @property
    def digest(self) -> str:
        """The identity in short, as the finished checkpoint keeps it."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def complete(self) -> bool:
        """This run's checkpoint was renamed into place; only evaluation and report are missing."""
        return len(self.finished) == len(self._model.blocks) > 0 and self._in_place

    @property
    def _in_place(self) -> bool:
        if self.partial.exists() or not (self.final / MANIFEST).is_file():
            return False
        return read_manifest(self.final).identity == self.digest

    @property
    def kept(self) -> str:
        """What becomes of an interrupted run, for the user."""
        if self.finished:
            return "Repeat the command to continue: finished blocks are kept."
        return ""

    def record(self, block: BlockFacts, writer: CheckpointWriter) -> None:
        """Note, durably, that a block's weights are on disk."""
        read = {name: h for name, h in dict(self._model.checkpoint.digests).items() if name not in self._noted}
        self._noted |= read.keys()
        names = self._model.blocks[block.index].files
        written = {new: writer.digests[new] for name in names if (new := writer.name_of(name))}
        moved = {name: writer.moved[name] for name in names if name in writer.moved}
        done = Done(block, read, written, moved)
        with open(self.folder / _JOURNAL, "a", encoding="utf-8") as journal:
            journal.write(_line(done))
            journal.flush()
            os.fsync(journal.fileno())

    def publish(self) -> str:
        """Rename the whole checkpoint into place; the reports of an older one go with it.

        Gives a warning where a file that others put into the older one has to stay behind.
        """
        for name in REPORTS:
            (self.folder / name).unlink(missing_ok=True)
        old, number = self._old, 0
        while self.final.exists() and old.exists():
            number += 1
            old = self._old.with_name(f"{self._old.name}.{number}")
        if self.final.exists():
            os.rename(self.final, old)
        os.rename(self.partial, self.final)
        left = remove(old, _files_of(old), last=MANIFEST)
        return f"{old} keeps {', '.join(left)}, which ace-prune did not write." if left else ""

    def close(self) -> str:
        """The report is written: there is nothing left to continue. Drops the checkpoint if it is not to be kept.

        Gives a warning where a file of others stays in its folder.
        """
        left = [] if self._head.keep else remove(self.final, self._head.files, last=MANIFEST)
        (self.folder / _JOURNAL).unlink(missing_ok=True)
        return f"{self.final} keeps {', '.join(left)}, which ace-prune did not write." if left else ""

    def discard(self) -> None:
        """Drop what cannot be continued. The journal goes last: it knows which files are ours."""
        journal = read_journal(self.folder)
        remove(self.partial, {*self._head.files, *(journal.head.files if journal else ())})
        (self.folder / _JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(self.training, ignore_errors=True)

    def restart(self) -> None:
        """Begin with nothing done."""
        self.finished, self.resumed = [], False
        self.discard()
        self.partial.mkdir()
        self._write_journal([])

    def _check_ours(self, journal: Journal | None) -> None:
        """AceError if anything is in the way that is not this tool's, or that it was told to keep."""
        if self.final.exists() and not (self.final / MANIFEST).is_file():
            raise AceError(f"{self.final} exists and was not made by ace-prune.", "Choose another output_dir.")
        for folder in (self.final, self._old):
            check_ours(folder, _files_of(folder))
        check_ours(self.partial, journal.head.files if journal else _files_of(self.partial))
        if self.final.exists() and not self._head.keep and (journal is None or journal.head.keep):
            raise AceError(
                f"{self.final} is the result of an earlier run that was told to keep it: keep_checkpoint=false would "
                "replace and then drop it.", "Choose another output_dir.",
            )  # fmt: skip
        if journal is None and not self.final.exists() and not (self.folder / "report.json").is_file():
            for name in REPORTS:
                if (self.folder / name).exists():
                    raise AceError(f"{self.folder / name} is of no run of ace-prune.", "Choose another output_dir.")

    def _resume(self, journal: Journal | None) -> None:
        if journal is None:
            return self.restart()
        keys = {**self.identity, **journal.head.identity}
        if changed := [key for key in keys if journal.head.identity.get(key) != self.identity.get(key)]:
            self.news = f"An unfinished run lies in {self.folder}, but {', '.join(changed)} changed: starting anew."
            return self.restart()
        done = self._unchanged(journal)
        if not done:
            return self.restart()
        self.finished, self.resumed = [each.block for each in done], True
        self.news = self.news or f"Continuing in {self.folder}: {len(done)} blocks are done."
        for each in done:
            self._model.checkpoint.digests.update(each.source)
            self._noted |= each.source.keys()
        return self._write_journal(done)

    def _unchanged(self, journal: Journal) -> list[Done]:
        """The finished blocks, up to the first whose source or result is not what the journal says."""
        done = _fitting(journal.done, self._model)
        source = self._model.checkpoint
        known = {name: digest for each in done for name, digest in each.source.items()}
        if source.stamps != journal.head.stamps and (name := source.differing(known)):
            file = source.tensors[name].file if name in source.tensors else source.folder
            self.news = f"{file} is another one than when the run in {self.folder} was interrupted: starting anew."
            return []
        if self.is_trained:
            return done
        try:
            made = Checkpoint(self.final if self._in_place else self.partial, bare=True)
        except AceError:
            made = None
        for place, each in enumerate(done):
            if made is None or made.differing(each.written):
                self.news = f"What an interrupted run left in {self.partial} is not as it was from block {place} on."
                return done[:place]
        return done

    @property
    def is_trained(self) -> bool:
        """Whether weights on disk may be later ones than those that were pruned: the whole model was trained."""
        folder = self.final if self._in_place else self.partial
        recovered = (folder / MANIFEST).is_file() and RECOVERED in read_object(folder / MANIFEST)
        return recovered or (self.training / TRAINED).is_file()

    def _write_journal(self, done: list[Done]) -> None:
        partial = self.folder / f"{_JOURNAL}.partial"
        partial.write_text("".join([_line(self._head), *map(_line, done)]), encoding="utf-8")
        partial.replace(self.folder / _JOURNAL)


class Followed(Work):
    """The same of a worker that is not the first one: it computes, and leaves the disk alone."""

    def __init__(self, folder: Path, identity: dict[str, Any], model: StreamedModel) -> None:
        self._name(folder, identity, model)

    def record(self, block: BlockFacts, writer: CheckpointWriter) -> None:
        """Nothing: the first worker notes it."""


def find_unfinished(parent: Path, identity: dict[str, Any]) -> Path | None:
    """A folder in ``parent`` with an unfinished run of this identity that no other process works on."""
    for file in sorted(parent.glob(f"*/{_JOURNAL}")):
        journal = read_journal(file.parent)
        if journal is not None and journal.head.identity == identity and not is_locked(file.parent):
            return file.parent
    return None


def read_journal(folder: Path) -> Journal | None:
    """The journal in ``folder``; None where there is none of this version. What was cut off by a crash is left out."""
    try:
        first, *lines = (folder / _JOURNAL).read_bytes().splitlines()
        journal = Journal(typed(Head, parse_object(first, _JOURNAL), "line 1"))
    except (OSError, ValueError, AceError):
        return None
    for number, line in enumerate(lines):
        try:
            done = typed(Done, parse_object(line, _JOURNAL), f"line {number + 2}")
        except (ValueError, AceError):
            break
        journal.done.append(done)
    return journal


def _fitting(done: list[Done], model: StreamedModel) -> list[Done]:
    """The blocks of the journal, up to the first that is not the model's next one."""
    found: list[Done] = []
    read: set[str] = set()
    for each, block in zip(done, model.blocks, strict=False):  # a journal may claim more blocks than there are
        names = set(block.files)
        read |= each.source.keys()
        same = (each.block.index, each.block.name) == (len(found), block.name)
        same &= {slot.name: slot.shape for slot in each.block.slots} == {slot.name: slot.shape for slot in block.slots}
        written = {new for name in names if (new := each.moved.get(name, name))}
        if not same or not names <= read or each.written.keys() != written:
            break
        found.append(each)
    return found


def _line(part: Head | Done) -> str:
    return json.dumps(dataclasses.asdict(part)) + "\n"


def _files_of(folder: Path) -> list[str]:
    """What was written into a finished checkpoint, by its own list; nothing where there is no checkpoint."""
    if not (folder / MANIFEST).is_file():
        return []
    files = read_manifest(folder).files
    if files is None:
        raise AceError(
            f"{folder} was made by an older version of ace-prune, which kept no list of what it wrote.",
            "Move or delete it, or choose another output_dir.",
        )
    return files
