"""Bytes at any place of a file, through the page cache or around it: the same, and never beside."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ace_cli.model import disk
from ace_cli.model.disk import PAGE, Reader

SIZE = 5 * PAGE + 700
PLACES = [
    (0, SIZE),
    (0, 1),
    (1, PAGE),
    (PAGE, PAGE),
    (PAGE - 1, 2),
    (700, 3 * PAGE),
    (2 * PAGE, 3 * PAGE + 700),
    (9, 0),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "bytes"
    path.write_bytes(random.Random(0).randbytes(SIZE))
    return path


def read(file: Path, start: int, count: int) -> Tensor:
    reader = Reader(file, around=True)
    try:
        return reader.read(start, count)
    finally:
        reader.close()


@pytest.mark.parametrize(("start", "count"), PLACES)
def test_what_is_read(file: Path, start: int, count: int) -> None:
    assert bytes(read(file, start, count).tolist()) == file.read_bytes()[start : start + count]


@pytest.mark.parametrize("start", [0, 17, PAGE])
def test_a_file_that_ends_before(file: Path, start: int) -> None:
    with pytest.raises(EOFError):
        read(file, start, SIZE + 1 - start)
    os.truncate(file, 2 * PAGE)
    with pytest.raises(EOFError):
        read(file, start, 2 * PAGE + 1)


@pytest.mark.parametrize(("start", "count"), PLACES)
@pytest.mark.parametrize("shift", [0, 1, 64], ids=["at a page of memory", "beside", "at a line"])
@pytest.mark.parametrize("piece", [PAGE, 2 * PAGE, 8 << 20])
def test_what_is_written(
    file: Path, monkeypatch: pytest.MonkeyPatch, start: int, count: int, shift: int, piece: int
) -> None:
    monkeypatch.setattr(disk, "_PIECE", piece)
    room = torch.zeros(count + 2 * PAGE, dtype=torch.uint8)
    data = room[(-room.data_ptr()) % PAGE + shift :][:count]
    data.random_(0, 256, generator=torch.Generator().manual_seed(1))
    before = file.read_bytes()
    disk.write(file, start, memoryview(data.numpy()), around=True)
    assert file.read_bytes() == before[:start] + bytes(data.tolist()) + before[start + count :]


def refusing(call: Callable[..., Any], after: int, number: int) -> Callable[..., Any]:
    """``call``, which the system refuses from its ``after``-th time on."""
    times = iter(range(1000))

    def refused(*args: Any) -> Any:
        if next(times) >= after:
            raise OSError(number, os.strerror(number))
        return call(*args)

    return refused


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_system_that_wants_larger_pages(file: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    before, data = file.read_bytes(), random.Random(1).randbytes(4 * PAGE)
    monkeypatch.setattr(disk, "_PIECE", PAGE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refusing(os.pwrite, after, errno.EINVAL))
        disk.write(file, 5, memoryview(data), around=True)
    assert file.read_bytes() == before[:5] + data + before[5 + len(data) :]
    preadv = os.preadv

    def preadv_of_cached(file: int, *rest: Any) -> int:
        if fcntl.fcntl(file, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "")
        return preadv(file, *rest)

    monkeypatch.setattr(os, "preadv", preadv_of_cached)
    assert bytes(read(file, 5, 4 * PAGE).tolist()) == data


def test_a_system_without(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    disk.write(file, PAGE, memoryview(b"x" * PAGE), around=True)
    assert bytes(read(file, PAGE, PAGE).tolist()) == b"x" * PAGE


def test_a_full_disk_is_not_taken_for_that(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", refusing(os.pwrite, 0, errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        disk.write(file, 0, memoryview(b"x" * PAGE), around=True)
