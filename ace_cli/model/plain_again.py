"""The way there and back of folders that hold the same values stored otherwise: packed, quantised."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ace_cli.core.errors import AceError
from ace_cli.core.stage import RECORD
from ace_cli.core.steps import NOBODY, Steps
from ace_cli.model.files import Checkpoint, CheckpointWriter, write_index
from ace_cli.model.folder import copy_other_files

#: Where the plain checkpoint's card lies in the other folder, whose own tells how to read it.
PLAIN_CARD = "README.plain.md"


def copy_beside(source: Path, target: Path) -> None:
    """What lies beside the weights, with the plain checkpoint's card out of the way of the new one."""
    copy_other_files(source, target)
    if (card := target / "README.md").is_file():
        card.replace(target / PLAIN_CARD)


def check_reads_back(source: Checkpoint, written: Checkpoint) -> None:
    """Raises AceError, by name, for a tensor that does not read back bit for bit as it was."""
    import torch

    for name in source.tensors:
        again, once = (each.read(name).contiguous().view(-1).view(torch.uint8) for each in (written, source))
        if not torch.equal(again, once):
            raise AceError(f"{name} did not read back from {written.folder} as it was written.", "Is the disk sound?")


def write_plain(stored: Checkpoint, target: Path, own: Iterable[str], steps: Steps = NOBODY) -> None:
    """The plain checkpoint again, into a new folder, without the ``own`` files of its source. Memory is one tensor.

    A step is a tensor.
    """
    target.mkdir(parents=True, exist_ok=True)
    writer = CheckpointWriter(stored, target)
    steps.of(len(stored.tensors))
    for name in stored.tensors:
        writer.write(name, stored.read(name))
        steps()
    writer.finish()
    write_index(stored.tensors, target)
    copy_other_files(stored.folder, target)
    for name in (*own, "README.md", RECORD):
        (target / name).unlink(missing_ok=True)
    if (target / PLAIN_CARD).is_file():
        (target / PLAIN_CARD).replace(target / "README.md")
