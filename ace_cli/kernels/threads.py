"""A large matrix, some rows at a time: what is made of a piece stays in a core's cache, and every core has its own.

Whole-matrix temporaries cost far more than the arithmetic on them: each is a pass through memory, on fresh pages.
Rows do not depend on each other, so neither the size of a piece nor the number of threads changes a bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

#: A torch tensor or a numpy array.
Matrix = TypeVar("Matrix", bound=Any)

#: Elements of a piece: their values, scores and flags fit a core's own cache, and calling torch costs little beside.
PIECE = 1 << 17

#: The same where several threads work, at most and at least: Python's lock changes hands at every call, and to wake who
#: waits for it can take as long as 100,000 elements (on two virtual cores, 2.9 ns a weight with PIECE, 1.4 with these).
LARGEST_PIECE, _LEAST_SHARED = 1 << 20, 1 << 18

#: Where an element takes as long as so many of those that pieces are meant for: multiply ``width`` by it.
HEAVY = 8


def each_piece(count: int, width: int, work: Callable[[slice], None]) -> None:
    """Call ``work`` with slices that cover ``count`` rows of ``width`` elements, on as many threads as torch has.

    Inside ``work`` torch is in inference mode and has one thread. Raises the first fault that ``work`` raised.
    """
    import torch

    threads = torch.get_num_threads()
    pooled = threads > 1 and count * width >= 2 * _LEAST_SHARED
    elements = min(LARGEST_PIECE, max(_LEAST_SHARED, count * width // threads)) if pooled else PIECE
    step = max(1, elements // max(1, width))
    slices = iter([slice(start, min(start + step, count)) for start in range(0, count, step)])

    def run() -> None:
        if pooled and torch.get_num_threads() != 1:  # its libraries ask for the process's number one after the other
            torch.set_num_threads(1)
        with torch.inference_mode():
            for rows in slices:  # shared: who is done takes the next
                work(rows)

    if not pooled:
        run()
        return
    try:
        for done in [_pool(threads).submit(run) for _ in range(threads)]:
            done.result()
    finally:
        torch.set_num_threads(threads)


def filled(target: Matrix, piece: Callable[[slice], Any]) -> Matrix:
    """``target`` (torch's or numpy's, two axes), its rows set to ``piece`` of their slices; as ``each_piece``."""

    def work(rows: slice) -> None:
        target[rows] = piece(rows)

    each_piece(target.shape[0], target.shape[1], work)
    return target


#: Columns of a piece, 256 to 511: of fewer than a few vectors torch adds the rows up in another order.
_COLUMNS = 256


def each_columns(rows: int, columns: int, work: Callable[[slice], None]) -> None:
    """Call ``work`` with slices that cover ``columns``, for what is summed over many ``rows``; as ``each_piece`` else.

    The slices are the same for any number of threads, so the bits of every sum are, too.
    """
    count = max(1, columns // _COLUMNS)

    def some(blocks: slice) -> None:
        for block in range(blocks.start, blocks.stop):
            work(slice(block * _COLUMNS, columns if block == count - 1 else (block + 1) * _COLUMNS))

    each_piece(count, rows * _COLUMNS, some)


@lru_cache(maxsize=2)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that share the cores one each: with torch's own in every one of them they would wait for each other."""
    import torch

    started = threading.Barrier(threads + 1)

    def alone() -> None:
        torch.set_num_threads(1)  # of this thread, and of those that have not asked yet ...
        torch.get_num_threads()
        started.wait()

    pool = ThreadPoolExecutor(threads, "piece", alone)
    for _ in range(threads):
        pool.submit(lambda: None)
    started.wait()
    torch.set_num_threads(threads)  # ... which get back what they had
    return pool
