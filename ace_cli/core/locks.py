"""Locks on folders between processes. A lock ends with the process that holds it, however that ends."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ace_cli.core.errors import BusyError

#: What the system says where another process holds the lock. Anything else: this place knows no such locks.
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_FILE = ".lock"


@contextmanager
def locked(folder: Path, name: str = _FILE) -> Iterator[bool]:
    """Hold ``folder``, or what the lock file ``name`` in it stands for. BusyError if another process holds it.

    Gives False where the system or the file system has no locks: then nothing is held, and nobody is kept out.
    """
    with open(folder / name, "a") as stream:
        state = try_lock(stream.fileno())
        if state is False:
            raise BusyError(f"Another run is working in {folder}.", "Wait for it, or choose another output_dir.")
        yield state is True  # the file stays: unlinking it would let two others lock two different files


def is_locked(folder: Path, name: str = _FILE) -> bool:
    """Whether another process holds ``folder``, or what the lock file ``name`` in it stands for."""
    if not (folder / name).exists():
        return False
    with open(folder / name, "a") as stream:
        return try_lock(stream.fileno()) is False


def try_lock(opened: int) -> bool | None:
    """Lock an open file or folder until it is closed. False if another holds it, None where there are no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as fault:
        return False if fault.errno in _HELD else None
    return True


@contextmanager
def in_turn(file: Path) -> Iterator[None]:
    """Hold the lock file ``file``; waits while another process does. Where there are no locks, nobody waits."""
    with open(file, "a") as stream:
        try:
            import fcntl

            fcntl.flock(stream.fileno(), fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        yield


def fresh_folder(wanted: Path) -> Path:
    """Make the folder ``wanted``, or where it exists the first of ``wanted``-2, -3, ... that does not."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    number, folder = 1, wanted
    while True:
        try:
            folder.mkdir()  # two processes cannot both succeed
        except FileExistsError:
            number += 1
            folder = wanted.with_name(f"{wanted.name}-{number}")
        else:
            return folder


@contextmanager
def locked_new_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in ``parent``, locked while this context lasts; then removed, if it was not renamed."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        opened = _opened(folder)
        if folder.is_dir() and (opened is None or try_lock(opened) is not False) and folder.is_dir():
            break
        if opened is not None:  # taken for abandoned, and removed, before it could be locked
            os.close(opened)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if opened is not None:
            os.close(opened)


def remove_unlocked(folder: Path) -> None:
    """Remove a folder of ``locked_new_folder`` that no process holds any more. Where there are no locks, it stays."""
    opened = _opened(folder)
    if opened is None:
        return
    try:
        if try_lock(opened) is True:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(opened)


def _opened(folder: Path) -> int | None:
    """None where the system opens no folders, or it is gone."""
    try:
        return os.open(folder, os.O_RDONLY)
    except OSError:
        return None
