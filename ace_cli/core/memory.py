"""Memory of this process: its resident size, its peak, and giving back what is held but not used."""

from __future__ import annotations

import ctypes
import gc
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ace_cli.core import control_group
from ace_cli.core.errors import TransientError
from ace_cli.core.torch_api import lacks_memory

#: From so many bytes on an allocation is a mapping of its own, fresh whenever it is made: weights, not activations.
MAPPED = 64 << 20

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # M_... of malloc.h


def resident() -> int:
    """Resident bytes now; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def reset_peak() -> None:
    """Start a new peak for ``peak`` (Linux; elsewhere the peak is the whole process's)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Peak resident bytes since the last reset."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def free() -> int:
    """Bytes that the system, and this process's control groups, still give."""
    import psutil

    return max(0, int(min(psutil.virtual_memory().available, control_group.room())))


def available() -> int:
    """Bytes this process may take in all: what it has, and what is still free."""
    return resident() + free()


@contextmanager
def lack_in_one_line(hint: str) -> Iterator[None]:
    """What fails inside for want of memory, a device's or the host's, is a TransientError that says ``hint``."""
    try:
        yield
    except (MemoryError, RuntimeError) as fault:
        if not lacks_memory(fault):
            raise
        where = "The GPU" if "CUDA" in str(fault) else "This machine"
        asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(fault), re.IGNORECASE)
        more = f": {asked[1]} more were asked for" if asked else ""
        raise TransientError(f"{where} has no memory left{more}.", hint) from fault


class Trimmer:
    """Called after each block, returns freed memory to the system once it has grown by more than ``SLACK``.

    glibc keeps freed memory for later; as blocks come and go it fragments, and the process would grow with the depth.
    """

    #: Growth that is tolerated from one block to the next: giving pages back and taking them again costs time.
    SLACK = 16 << 20

    def __init__(self) -> None:
        trim()
        self._floor: int | None = None  # what a block needs, and leaves behind for the next one

    def __call__(self) -> None:
        """Give memory back if it grew by more than the slack since the first call."""
        if self._floor is None:
            self._floor = resident()
        elif resident() > self._floor + self.SLACK:
            trim()
            self._floor = max(self._floor, resident())


def one_heap() -> None:
    """Make all threads allocate from one heap (glibc), which reuses what was freed.

    By default each thread has a heap of its own, and ``trim`` cannot return what those keep. Reuse is faster, too: the
    first write to a fresh page costs more than two passes over a used one.
    """
    _mallopt(_ARENA_MAX, 1)
    _mallopt(_MMAP_THRESHOLD, MAPPED)
    _mallopt(_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def off_the_heap() -> Iterator[None]:
    """Inside, allocations of 128 KB and more get memory of their own from the system instead of a place on the heap.

    For phases that allocate large buffers, free them soon, and keep many small objects (opening a model does). On the
    heap the small objects would lie between the freed buffers, and the holes would be too small for the tensors that
    come later. Works with glibc; elsewhere nothing happens.
    """
    _mallopt(_MMAP_THRESHOLD, 128 << 10)  # what glibc itself begins with
    try:
        yield
    finally:
        _mallopt(_MMAP_THRESHOLD, MAPPED)


def _mallopt(option: int, value: int) -> None:
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(option, value)


def trim() -> None:
    """Return free heap pages to the system (glibc; elsewhere nothing happens)."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def lasting(module: str) -> Iterator[None]:
    """Around the import of ``module``: the garbage collector never looks again at the objects that were made inside.

    Modules are half a million objects that live as long as the process; looking at them at every collection takes
    seconds in all. Only imports belong inside, because a cycle of objects that is frozen is never freed. Where the
    module is there already nothing happens, so the later jobs of a sweep freeze nothing of the earlier ones.
    """
    if module in sys.modules:
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if module in sys.modules:
            gc.freeze()
        gc.enable()
