"""Work on a large matrix some rows at a time, on several threads.

Some rows, and what is computed from them, fit into the cache of one core. Temporaries as large as the whole matrix
would each pass through main memory, which costs more than the arithmetic. Every row's result depends on that row
alone, so neither the number of rows in a piece nor the number of threads changes a bit of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

#: A torch tensor or a numpy array.
Matrix = TypeVar("Matrix", bound=Any)

#: Elements of a piece (rows times columns), on one thread: few enough that their values, scores and flags fit a core's
#: own cache, and enough that the time of the calls into torch does not matter.
PIECE = 1 << 17

#: The same on several threads, at most and at least. Pieces are larger here because threads wait for Python's lock at
#: every call, and waking a waiting thread can take as long as 100,000 elements (measured on two virtual cores: 2.9 ns a
#: weight with PIECE, 1.4 ns with these).
LARGEST_PIECE, _LEAST_SHARED = 1 << 20, 1 << 18

#: Factor on ``width`` for work that takes about eight times longer per element than comparing it: smaller pieces then
#: take as long as usual ones.
HEAVY = 8


def each_piece(count: int, width: int, work: Callable[[slice], None]) -> None:
    """Call ``work`` with slices that together cover ``count`` rows of ``width`` elements, each row once.

    As many threads as torch has share the slices; a small matrix is done on the calling thread. Inside ``work`` torch
    is in inference mode and has one thread. Raises the first error that ``work`` raised.
    """
    import torch

    threads = torch.get_num_threads()
    pooled = threads > 1 and count * width >= 2 * _LEAST_SHARED
    elements = min(LARGEST_PIECE, max(_LEAST_SHARED, count * width // threads)) if pooled else PIECE
    step = max(1, elements // max(1, width))
    slices = iter([slice(start, min(start + step, count)) for start in range(0, count, step)])

    def run() -> None:
        if pooled and torch.get_num_threads() != 1:  # torch's number of threads may be reset behind a worker's back
            torch.set_num_threads(1)
        with torch.inference_mode():
            for rows in slices:  # one iterator for all threads: whichever is done takes the next slice
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
    """Set ``target[rows] = piece(rows)`` for slices that cover all its rows, and return ``target``.

    ``target`` is a torch tensor or a numpy array of two axes; threads as in ``each_piece``.
    """

    def work(rows: slice) -> None:
        target[rows] = piece(rows)

    each_piece(target.shape[0], target.shape[1], work)
    return target


#: Columns of a piece: 256, up to 511 in the last one. With far fewer torch would add the rows up in another order.
_COLUMNS = 256


def each_columns(rows: int, columns: int, work: Callable[[slice], None]) -> None:
    """Call ``work`` with slices that together cover ``columns``, each column once: for sums over the rows.

    Threads as in ``each_piece``. The slices are the same for any number of threads, so the bits of the sums are, too.
    """
    count = max(1, columns // _COLUMNS)

    def some(blocks: slice) -> None:
        for block in range(blocks.start, blocks.stop):
            work(slice(block * _COLUMNS, columns if block == count - 1 else (block + 1) * _COLUMNS))

    each_piece(count, rows * _COLUMNS, some)


@lru_cache(maxsize=2)
def _pool(threads: int) -> ThreadPoolExecutor:
    """A pool whose threads each run torch on one core.

    A new thread would otherwise take torch's full number of threads, and ``threads`` times as many would compete for
    the cores.
    """
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
