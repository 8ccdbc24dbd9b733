"""Folders that are replaced or dropped: only files that we wrote are ever removed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ace_cli.core.errors import AceError


def others(folder: Path, ours: Iterable[str]) -> list[str]:
    """Files in and below ``folder``, by their paths in it, that are not among ``ours``."""
    found = (file for file in folder.rglob("*") if file.is_symlink() or not file.is_dir())
    return sorted({file.relative_to(folder).as_posix() for file in found} - set(ours))


def check_ours(folder: Path, ours: Iterable[str]) -> None:
    """AceError if ``folder``, which is to be replaced, is a link or holds a file that is not among ``ours``."""
    if folder.is_symlink():
        raise AceError(f"{folder} is a link, and would be replaced.", "Choose another output_dir.")
    if found := others(folder, ours):
        more = f" and {len(found) - 1} more files" if len(found) > 1 else ""
        raise AceError(
            f"{folder} would be replaced, but holds {found[0]}{more}, not written by ace-prune.",
            "Move that, or choose another output_dir.",
        )


def remove(folder: Path, ours: Iterable[str], last: str = "") -> list[str]:
    """Remove what is ours of ``folder``, the file ``last`` at the end, and the folder if that leaves nothing in it.

    Gives the files of others, which stay.
    """
    if not folder.is_dir() or folder.is_symlink():
        return []
    for name in sorted(ours, key=lambda name: name == last):
        (folder / name).unlink(missing_ok=True)
    left = others(folder, ())
    if not left:
        for inner in sorted(folder.rglob("*"), reverse=True):
            inner.rmdir()
        folder.rmdir()
    return left
