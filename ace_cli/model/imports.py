"""The cache of imports: a model in another form is converted once, and found again while its files are what they were.

A folder under ``imports`` is whole or absent: it is made beside its place, and renamed. Whoever makes one holds a lock
on it, so that one without a lock was left by a process that was killed; the next import removes it. So it does with an
import that can never be found again, because its files were changed, moved or removed, once it was unused for a day (a
run may still read it).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from ace_cli.core.cache import cache_folder
from ace_cli.core.errors import AceError, TransientError
from ace_cli.core.json_reader import read_object
from ace_cli.core.locks import locked_new_folder, remove_unlocked
from ace_cli.core.typed_json import typed
from ace_cli.model.files import Stamps, stamps_of

#: In every import: its files and their sizes. When it was last used is its time of change.
_RECORD = ".import.json"
#: And what it was made from. A file of its own: an older version of this program takes a record for what it knows.
_SOURCES = ".sources.json"
_UNUSED_SECONDS = 24 * 3600
_FINISHED = re.compile(r".+-[0-9a-f]{16}")
_BEGUN = re.compile(r".+-[0-9a-f]{16}\..+")


def imported(name: str, files: Mapping[str, Path], options: str, make: Callable[[Path], None]) -> Path:
    """The folder that ``make`` fills from ``files``, from the cache if it is there and whole.

    Raises AceError where that cannot be done, or one of the files changes meanwhile.
    """
    before = stamps_of(files)
    final = cache_folder() / "imports" / _key(name, files, before, options)
    if _is_whole(final):
        with contextlib.suppress(OSError):  # a cache that others made, and only they may write
            os.utime(final / _RECORD)
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    _tidy(final.parent)
    with locked_new_folder(final.parent, f"{final.name}.") as work:
        make(work)
        if changed := [name for name, stamp in stamps_of(files).items() if stamp != before[name]]:
            raise TransientError(f"{files[changed[0]]} was changed while it was imported.", "Repeat the command.")
        sources = {str(file.resolve()): before[name] for name, file in files.items()}
        (work / _SOURCES).write_text(json.dumps(sources), encoding="utf-8")
        sizes = {file.relative_to(work).as_posix(): file.stat().st_size for file in work.rglob("*") if file.is_file()}
        (work / _RECORD).write_text(json.dumps(sizes), encoding="utf-8")
        if final.is_dir() and not _is_whole(final):
            shutil.rmtree(final)
        with contextlib.suppress(OSError):  # another process may have finished the same import first
            os.rename(work, final)
    if not _is_whole(final):
        raise AceError(f"{final} cannot be written.", "Is there room, and may files be made there?")
    return final


def _key(name: str, files: Mapping[str, Path], stamps: Stamps, options: str) -> str:
    """Of size, time of change and place on the disk of every file; a chmod changes none of them."""
    facts = [(str(files[inner].resolve()), *stamp[:2], *stamp[3:]) for inner, stamp in sorted(stamps.items())]
    return f"{name}-{hashlib.sha256(repr((facts, options)).encode()).hexdigest()[:16]}"


def _is_whole(folder: Path) -> bool:
    """Whether an import has all its files, in their sizes."""
    try:
        sizes = typed(dict[str, int], read_object(folder / _RECORD), _RECORD)
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (AceError, ValueError, OSError):
        return False


def _tidy(imports: Path) -> None:
    """Remove what a killed import left, and what was made from files that are no longer what they were."""
    for folder in imports.iterdir():
        if _BEGUN.fullmatch(folder.name):
            remove_unlocked(folder)
        elif _FINISHED.fullmatch(folder.name) and _is_stale(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_stale(folder: Path) -> bool:
    try:
        if time.time() - (folder / _RECORD).stat().st_mtime < _UNUSED_SECONDS:
            return False
        sources = typed(dict[str, list[int]], read_object(folder / _SOURCES), _SOURCES)
    except (AceError, ValueError, OSError):  # not one of ours
        return False
    return stamps_of({name: Path(name) for name in sources}) != sources
