"""The limit of a run: its arithmetic and its bytes at the rates that this machine shows in a short probe.

Pruning cannot be faster than one forward of the calibration tokens through the blocks, one read and one write of the
file. Reading and writing can go on while the blocks compute, so the limit is the longer of the two, not their sum.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ace_cli.kernels.selection import LARGE, Scaled, loops_for
from ace_cli.methods.patterns import Pattern
from ace_cli.methods.row_pruning import prune_rows
from ace_cli.model import disk
from ace_cli.model.files import Checkpoint

_PROBE_SECONDS = 0.1
_PIECE = 4 << 20
_LARGEST_PRODUCT = 8192
#: Repetitions on a quiet machine agree to a few per cent; of work shorter than this, the clock's own noise says more.
_BUSY, _SHORT = 1.5, 1e-3


@dataclass(frozen=True)
class Rates:
    """Per second: operations in matrix products, bytes from and to the disk (or its cache), bytes copied in memory.

    ``float32``: operations in the products that statistics are summed by, as fast as ``matmul`` if 0. For a forecast,
    of a CPU: ``fresh``, bytes of memory taken anew and filled; ``prune``, weights pruned by rows and checked;
    ``threads`` that compute. ``spread``: how many times longer than the fastest the slowest repetition of one piece of
    work took.
    """

    matmul: float
    read: float
    write: float
    memory: float
    float32: float = 0.0
    fresh: float = math.inf
    prune: float = math.inf
    threads: int = 1
    spread: float = 1.0

    @property
    def busy(self) -> bool:
        """Whether something else ran meanwhile: the rates are then too low, and so is the limit's speed."""
        return self.spread > _BUSY


@dataclass(frozen=True)
class Limit:
    """``flops`` of one forward through the blocks; bytes of the file in and out. ``method_flops`` come on top: the
    matrix products of the chosen statistics, at most (inputs that several weights share are observed once), and about
    what refining and repairing cost, in such operations.
    """

    flops: int
    method_flops: int
    bytes_read: int
    bytes_written: int
    rates: Rates

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of each part by itself."""
        return {
            "compute": self.flops / self.rates.matmul,
            "read": self.bytes_read / self.rates.read,
            "write": self.bytes_written / self.rates.write,
            "memory": (self.bytes_read + self.bytes_written) / self.rates.memory,
            "method": self.method_flops / (self.rates.float32 or self.rates.matmul),
        }

    @property
    def seconds(self) -> float:
        """The limit: computing, the disk and the memory work at the same time. Without the method's own products."""
        parts = self.parts
        return max(parts["compute"], parts["read"] + parts["write"], parts["memory"])

    def shown(self, seconds: float, computing: float = math.inf) -> Limit:
        """The same, no rate below what the run itself showed: it did all this in ``seconds``, its forward in
        ``computing``. So nothing that was measured is faster than the limit.
        """
        parts, rates = self.parts, self.rates
        files = max(1.0, (parts["read"] + parts["write"]) / seconds)
        matmul = max(rates.matmul, self.flops / min(seconds, computing))
        memory = rates.memory * max(1.0, parts["memory"] / seconds)
        return replace(self, rates=replace(
            rates, matmul=matmul, read=rates.read * files, write=rates.write * files, memory=memory
        ))  # fmt: skip

    def efficiency(self, measured: float, computing: float = math.inf) -> dict[str, Any]:
        """For the report: the limit beside ``measured`` seconds, with everything it was made of."""
        return self.shown(measured, computing)._efficiency(measured) | {"probed": _finite(self.rates)}

    def _efficiency(self, measured: float) -> dict[str, Any]:
        return {
            "limit_seconds": self.seconds,
            "measured_seconds": measured,
            "efficiency": min(1.0, self.seconds / measured),  # but for rounding, it is
            "flops": self.flops,
            "method_flops": self.method_flops,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "rates": _finite(self.rates),
            "parts_seconds": self.parts,
        }


def _finite(rates: Rates) -> dict[str, float]:
    return {name: rate for name, rate in vars(rates).items() if math.isfinite(rate)}


def probe(
    device: torch.device, dtype: torch.dtype, source: Checkpoint, folder: Path, pattern: Pattern, largest: int = 0
) -> Rates:  # fmt: skip
    """Measure, in about half a second. ``folder`` need not exist: nothing is left in it or its parents.

    OSError when the disk cannot be written.
    """
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    matmul, spread = _matmul(device, dtype, wait)
    float32 = 0.0 if dtype is torch.float32 else _matmul(device, torch.float32, wait)[0]
    rates = (
        matmul,
        _read(source),
        _write(existing(folder), source.around_cache),
        _memory(device, wait),
        float32,
    )
    if device.type != "cpu":
        return Rates(*rates, spread=spread)
    return Rates(*rates, _fresh(), _prune(dtype, pattern, largest), torch.get_num_threads(), spread)


def existing(folder: Path) -> Path:
    """``folder`` or the nearest of its parents that is there."""
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


def _matmul(device: torch.device, dtype: torch.dtype, wait: Callable[[], None]) -> tuple[float, float]:
    """The best square product in 0.1 s, of growing size while they are quick: small ones do not fill every unit.

    And how far repetitions of the largest are apart.
    """
    size, best, deadline = 256, 0.0, time.perf_counter() + _PROBE_SECONDS
    by_size: dict[int, list[float]] = {}
    while not best or time.perf_counter() < deadline:  # once at least, however long nobody gave it a turn
        a = torch.ones(size, size, device=device, dtype=dtype)
        seconds = _repeated(partial(torch.mm, a, a), wait)
        by_size.setdefault(size, []).extend(seconds[1:])  # the first one woke threads
        best = max(best, 2 * size**3 / min(seconds))
        if 8 * min(seconds) < _PROBE_SECONDS / 2 and size < _LARGEST_PRODUCT:
            size *= 2
    return best, _spread(by_size[max(by_size)])


def _spread(seconds: list[float]) -> float:
    return max(seconds) / min(seconds) if min(seconds) > _SHORT else 1.0


def _memory(device: torch.device, wait: Callable[[], None]) -> float:
    source = torch.ones(4 * _PIECE, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * source.nbytes / min(_shortest(lambda: target.copy_(source), wait) for _ in range(2))


def _fresh() -> float:
    size = 64 << 20
    return size / _shortest(lambda: torch.empty(size, dtype=torch.uint8).fill_(1), lambda: None)


def _prune(dtype: torch.dtype, pattern: Pattern, largest: int) -> float:
    """With the run's pattern and the simplest of scores, on random weights; a whole layer is compared row by row."""
    columns = 4096 // max(1, pattern.group_width) * max(1, pattern.group_width) or pattern.group_width
    rows = max(1, min(max(largest, 1 << 21), LARGE) // columns)
    weight_OI = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    copies = iter([weight_OI.clone() for _ in range(3)])

    def work() -> None:
        copy_OI = next(copies)
        prune_rows(copy_OI, Scaled(torch.ones(columns)), pattern, "random weights")
        pattern.check(copy_OI, loops=loops_for(copy_OI.numel()))

    return weight_OI.numel() / _shortest(work, lambda: None)


def _shortest(work: Callable[[], object], wait: Callable[[], None]) -> float:
    return min(_repeated(work, wait))


def _repeated(work: Callable[[], object], wait: Callable[[], None]) -> list[float]:
    """Seconds of each of three: the first ones wake threads and clocks."""
    seconds = []
    for _ in range(3):
        wait()
        start = time.perf_counter()
        work()
        wait()
        seconds.append(max(time.perf_counter() - start, 1e-9))
    return seconds


def _read(source: Checkpoint) -> float:
    """Pieces from all over the files, as warm or cold as they are; other ones each time, or it would warm its own."""
    entries, pieces, done = list(source.tensors.values()), 16, 0
    first = time.time_ns() // 1000 % len(entries)
    start = time.perf_counter()
    for number in range(pieces):
        entry = entries[(first + number * len(entries) // pieces) % len(entries)]
        with closing(disk.Reader(entry.file, source.around_cache)) as file:
            done += len(file.read(entry.start, min(_PIECE, entry.nbytes)))
        if time.perf_counter() - start > _PROBE_SECONDS:
            break
    return max(done, 1) / (time.perf_counter() - start)


@contextmanager
def _unnamed(folder: Path) -> Iterator[tuple[int, Path]]:
    """The number and a path of a file in ``folder`` of which a killed process leaves nothing.

    It has a name only where nothing else can be opened a second time.
    """
    nameless = Path("/proc/self/fd").is_dir()
    with tempfile.TemporaryFile(dir=folder) if nameless else tempfile.NamedTemporaryFile(dir=folder) as file:
        yield file.fileno(), Path(f"/proc/self/fd/{file.fileno()}" if nameless else file.name)


def _write(folder: Path, around: bool) -> float:
    """Forced to disk, as every finished block is; ``around`` the page cache where the run goes, too."""
    piece, done = memoryview(b"\x55" * _PIECE), 0
    with _unnamed(folder) as (number, path):
        start = time.perf_counter()
        while not done or (done < 12 * _PIECE and time.perf_counter() - start < _PROBE_SECONDS / 2):
            for _ in range(4):
                disk.write(path, done, piece, around)
                done += len(piece)
            os.fsync(number)
        return done / (time.perf_counter() - start)
