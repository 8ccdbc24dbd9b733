"""The cache of imports: a model in another form is converted once, and found again while its files are what they were.

A folder under ``imports`` is whole or absent: it is made beside its place, and renamed. Whoever makes one holds a lock
on it, so that one without a lock was left by a process that was killed; the next import removes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from ace_cli.core.cache import cache_folder
from ace_cli.core.errors import AceError, TransientError
from ace_cli.core.json_reader import read_object
from ace_cli.core.locks import locked_new_folder, remove_unlocked
from ace_cli.core.typed_json import typed
from ace_cli.model.files import Stamps, stamps_of

#: In every import: its files and their sizes.
_RECORD = ".import.json"
_BEGUN = re.compile(r".+-[0-9a-f]{16}\..+")


def imported(name: str, files: Mapping[str, Path], options: str, make: Callable[[Path], None]) -> Path:
    """The folder that ``make`` fills from ``files``, from the cache if it is there and whole.

    Raises AceError where that cannot be done, or one of the files changes meanwhile.
    """
    before = stamps_of(files)
    final = cache_folder() / "imports" / _key(name, files, before, options)
    if _is_whole(final):
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    for folder in final.parent.iterdir():
        if _BEGUN.fullmatch(folder.name):
            remove_unlocked(folder)
    with locked_new_folder(final.parent, f"{final.name}.") as work:
        make(work)
        if changed := [name for name, stamp in stamps_of(files).items() if stamp != before[name]]:
            raise TransientError(f"{files[changed[0]]} was changed while it was imported.", "Repeat the command.")
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
        found = read_object(folder / _RECORD)
        sizes = {name: typed(int, size, name) for name, size in found.items()}
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (AceError, ValueError, OSError):
        return False
