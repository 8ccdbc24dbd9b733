"""Bytes of a file at known offsets; those of large files around the page cache.

A model near the size of the memory does not stay in the page cache anyway. Going through it costs a core one copy of
every byte and fresh pages to hold it, and drives out what others have there; a direct transfer costs next to nothing.
It wants page-aligned places in the file and in memory: the rest, at both ends of a tensor, takes the usual way.
"""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PAGE = 4096
#: Bytes of one transfer: a call moves at most 2 GB, and what cannot go straight from memory is copied in such pieces.
_PIECE = 8 << 20


class Reader:
    """An open file; ``around`` the page cache if the system can. Calls may come from any thread."""

    def __init__(self, file: Path, around: bool) -> None:
        direct = _open(file, os.O_RDONLY) if around else None
        self._around = direct is not None
        self._file = os.open(file, os.O_RDONLY) if direct is None else direct

    def close(self) -> None:
        """No more reads."""
        os.close(self._file)

    def read(self, start: int, count: int) -> Tensor:
        """uint8 (count,), in memory of its own; EOFError if the file ends before."""
        import torch

        if not self._around:
            data = torch.empty(count, dtype=torch.uint8)
            self._fill(memoryview(data.numpy()), start, count)  # type: ignore[arg-type]
            return data
        before = start % PAGE
        data = torch.empty(-(-(before + count) // PAGE) * PAGE + PAGE, dtype=torch.uint8)
        first = -data.data_ptr() % PAGE
        self._fill(memoryview(data.numpy())[first : len(data) - PAGE + first], start - before, before + count)  # type: ignore[arg-type]
        return data[first + before : first + before + count]

    def _fill(self, room: memoryview, start: int, needed: int) -> None:
        done = 0
        while done < needed:
            got = os.preadv(self._file, [room[done : done + (1 << 30)]], start + done)
            if not got or (self._around and got % PAGE and done + got < needed):
                raise EOFError
            done += got


def write(file: Path, start: int, data: memoryview, around: bool) -> None:
    """Write ``data`` at byte ``start`` of a file that is there."""
    head = min(-start % PAGE, len(data))
    straight = _write_around(file, start + head, data[head:]) if around else 0
    with open(file, "r+b", buffering=0) as stream:
        for first, last in ((0, head), (head + straight, len(data))):
            stream.seek(start + first)
            while first < last:
                first += stream.write(data[first : min(last, first + (1 << 30))])


def _open(file: Path, flags: int) -> int | None:
    """For direct transfers; None where the operating system or the file system has none."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        opened = os.open(file, flags | os.O_DIRECT)
    except OSError as fault:
        if fault.errno == errno.EINVAL:
            return None
        raise
    if flags == os.O_RDONLY and not _reads(opened):
        os.close(opened)
        return None
    return opened


def _reads(opened: int) -> bool:
    """Some file systems open such a file and then want larger pages."""
    with mmap.mmap(-1, PAGE) as room:
        try:
            os.preadv(opened, [room], 0)
        except OSError as fault:
            if fault.errno != errno.EINVAL:
                raise
            return False
    return True


def _write_around(file: Path, start: int, data: memoryview) -> int:
    """The whole pages of ``data``, at a page; returns how many bytes the system took."""
    import numpy

    whole = len(data) // PAGE * PAGE
    target = _open(file, os.O_WRONLY) if whole else None
    if target is None:
        return 0
    source = numpy.frombuffer(data, numpy.uint8)
    aligned, done = source.ctypes.data % PAGE == 0, 0
    room = None if aligned else numpy.frombuffer(mmap.mmap(-1, _PIECE, mmap.MAP_PRIVATE), numpy.uint8)  # at a page
    try:
        while done < whole:
            piece = source[done : min(whole, done + _PIECE)]
            if room is not None:
                numpy.copyto(room[: len(piece)], piece)  # other threads go on: to copy a memoryview they would wait
                piece = room[: len(piece)]
            done += os.pwrite(target, memoryview(piece), start + done)  # type: ignore[arg-type]
    except OSError as fault:
        if fault.errno != errno.EINVAL:  # it wants larger pages
            raise
    finally:
        os.close(target)
    return done
