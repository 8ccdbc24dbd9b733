"""Several processes that work on one model: who they are, what each of them does, what they tell each other.

torchrun starts them, or whatever sets WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT. Each reads the files itself; the
first one writes and prints. What they exchange are bytes of tensors and JSON, in which floats keep all their digits:
nothing is unpickled. Without WORLD_SIZE there is one worker, and nothing here does anything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ace_cli.core.errors import AceError, TransientError, first_line

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

#: How long one worker may compute while another waits for what it has. One that ends is noticed at once: its
#: connections close.
PATIENCE = timedelta(hours=2)
#: How long the others wait while the first one works alone: writes, exports, trains.
ALONE = timedelta(days=30)
#: Rows of a weight go to workers in pieces of at least so many, and at most so many pieces, so that products of
#: matrices, whose rounding may depend on how many rows they have, are the same for any number of workers.
_LEAST_ROWS, _PIECES = 64, 32
_FAULT = "fault"


class LostWorker(TransientError):
    """Another worker has ended, or cannot be reached."""


class Split(Enum):
    """What several workers share of pruning."""

    rows = "rows"  # all see all calibration windows: the bytes of one worker
    windows = "windows"  # each sees some of them: forwards and states are shared, too, sums depend on how many they are


@dataclass(frozen=True)
class Workers:
    """Number ``rank`` of ``size`` workers; ``store`` is what they leave words in for each other.

    ``apart``: each sees calibration windows of its own; otherwise all see the same.
    """

    rank: int = 0
    size: int = 1
    store: Any = None
    apart: bool = False

    @property
    def first(self) -> bool:
        """Whether this one writes and prints."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    # --- who does what -------------------------------------------------------------------------------------------

    def dealt(self, count: int, rank: int | None = None) -> range:
        """Which of ``count`` things are for this worker, or for number ``rank``: every ``size``-th one."""
        return range(self.rank if rank is None else rank, count, self.size)

    def part(self, whole: range) -> range:
        """This worker's neighbours in ``whole``; none where there are fewer than workers."""
        bounds = [len(whole) * rank // self.size for rank in (self.rank, self.rank + 1)]
        return whole[slice(*bounds)]

    def pieces(self, rows: int, device: str) -> list[list[slice]]:
        """Rows 0 to ``rows`` in pieces, for each worker those that it computes: neighbours.

        On a CPU the pieces are the same for any number of workers. On another device, which is to be called rarely,
        there is one for each worker: what is rounded may differ with their number.
        """
        step = max(_LEAST_ROWS, -(-rows // (16 * _PIECES)) * 16) if device == "cpu" else -(-rows // self.size)
        pieces = [slice(first, min(first + step, rows)) for first in range(0, rows, step)]
        bounds = [len(pieces) * rank // self.size for rank in range(self.size + 1)]
        return [pieces[first:last] for first, last in pairwise(bounds)]

    # --- what they tell each other -------------------------------------------------------------------------------

    def told(self, value: T) -> list[T]:
        """What each worker gives, JSON, in the order of their numbers."""
        if not self.several:
            return [value]
        import torch
        from torch import distributed

        raw = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with _reachable():
            distributed.all_gather(sizes, torch.tensor([len(raw)]))
            room = int(torch.cat(sizes).max())
            texts = [torch.zeros(room, dtype=torch.uint8) for _ in range(self.size)]
            distributed.all_gather(texts, torch.nn.functional.pad(raw, (0, room - len(raw))))
        return [json.loads(text[: int(size)].numpy().tobytes()) for text, size in zip(texts, sizes, strict=True)]

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first worker makes, JSON; the others do not make it."""
        return self.told(make() if self.first else None)[0]  # type: ignore[return-value]

    def spread(self, parts: Sequence[tuple[Tensor, int]]) -> None:
        """Each tensor, contiguous, becomes what the worker of the number beside it has; of any dtype."""
        if not self.several:
            return
        import torch
        from torch import distributed

        with _reachable():
            works = [
                distributed.broadcast(part.view(-1).view(torch.uint8), rank, async_op=True)
                for part, rank in parts
                if part.numel()
            ]
            for work in works:
                work.wait()

    def add_up(self, parts: Sequence[Tensor]) -> None:
        """Each tensor becomes the sum of what all workers have in its place: the same bytes for everyone.

        In what order they are summed depends on how many workers there are.
        """
        if not self.several:
            return
        from torch import distributed

        with _reachable():
            for work in [distributed.all_reduce(part, async_op=True) for part in parts]:
                work.wait()

    def joined(self, mine: Tensor, join: Callable[[Tensor, Tensor], Tensor], of: Sequence[int]) -> Tensor:
        """What ``join``, element by element, makes of a tensor of each worker in ``of``: the same bytes for everyone.

        One after the other, in this order; ``join`` may change its first argument. All workers give a tensor of one
        shape and dtype, which may be overwritten; what those give that are not in ``of`` is not looked at. Each in
        ``of`` joins some elements of all, and sends them to the others.
        """
        import torch
        from torch import distributed

        flat = mine.contiguous().view(-1)
        bounds = [len(flat) * number // len(of) for number in range(len(of) + 1)]
        parts = dict(zip(of, [flat[first:last] for first, last in pairwise(bounds)], strict=True))
        given = self.rank in parts
        own = parts.get(self.rank, flat[:0])
        received = own.new_empty((len(of) if given else 0, len(own)))
        wide = flat.element_size()
        to = [len(parts[rank]) * wide if given and rank in parts else 0 for rank in range(self.size)]
        back = [len(own) * wide if rank in parts else 0 for rank in range(self.size)]
        sent = flat if given else flat[:0]
        with _reachable():
            distributed.all_to_all_single(
                received.view(-1).view(torch.uint8),
                sent.view(torch.uint8),
                output_split_sizes=back,
                input_split_sizes=to,
            )
        if given:
            own.copy_(reduce(join, received))
        self.spread([(part, rank) for rank, part in parts.items()])
        return flat.view(mine.shape)

    def agree(self, what: str, held: dict[str, Any]) -> None:
        """Raises TransientError unless every worker holds the same values under the same names."""
        if not self.several:
            return
        everyone = self.told(held)
        for rank, other in enumerate(everyone):
            if differing := [name for name in {**everyone[0], **other} if other.get(name) != everyone[0].get(name)]:
                raise TransientError(
                    f"Worker {rank} does not hold what worker 0 does {what}: {', '.join(differing)} differ.",
                    "Give all of them the same command, files, processors, threads and versions of libraries. "
                    "Finished blocks are kept.",
                )

    def done(self, what: str) -> None:
        """The first worker lets the others go on, who are in ``await_first``."""
        if self.several:
            with _reachable():
                self.store.set(what, "done")

    def await_first(self, what: str) -> None:
        """Wait, however long it takes, until the first worker says that this is done."""
        with _reachable():
            self.store.wait([what], ALONE)


#: One that is alone.
ONE = Workers()
#: The workers that this process has joined; there is one such group in a process.
_joined = ONE


def size() -> int:
    """How many workers there are to be."""
    return _number("WORLD_SIZE", 1)


def on_this_machine() -> tuple[int, int]:
    """This worker's number on its machine, and how many there are."""
    return _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)


def join(device: str) -> Workers:
    """Meet the others, if there are any; ``device``: cpu or cuda.

    Raises AceError where nothing says how, and LostWorker where they cannot be reached.
    """
    global _joined
    if size() == 1 or _joined.several:
        return _joined
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    try:
        found, rank, count = next(iter(rendezvous("env://")))
        # torchrun may keep the store when it starts the workers again: what those before left in it is not for these
        store = distributed.PrefixStore(f"attempt {_number('TORCHELASTIC_RESTART_COUNT', 0)}", found)  # type: ignore[attr-defined]
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
    except ValueError as fault:  # a variable is not set
        raise AceError(
            f"WORLD_SIZE={size()}, but how to meet the others is not said: {first_line(fault)}.",
            "Start with torchrun, or unset WORLD_SIZE.",
        ) from fault
    except RuntimeError as fault:
        raise LostWorker(f"The other workers cannot be met: {first_line(fault)}.", "Repeat the command.") from fault
    _joined = Workers(rank, count, store)
    return _joined


def leave() -> None:
    """Part from the others."""
    global _joined
    if _joined.several:
        from torch import distributed

        with suppress(RuntimeError):
            distributed.destroy_process_group()
        _joined = ONE


def speaks() -> bool:
    """Whether what ends this process is for it to say: the first worker that has something to say, says it for all."""
    if size() == 1:
        return True
    if not _joined.several:
        return _number("RANK", 0) == 0
    me = str(_joined.rank)
    try:
        return bool(_joined.store.compare_set(_FAULT, "", me).decode() == me)
    except RuntimeError:  # the store has gone, and with it whoever kept it
        return _joined.first


def another_spoke() -> bool:
    """Whether another worker has said what ends all of them."""
    try:
        return _joined.several and bool(_joined.store.check([_FAULT]))
    except RuntimeError:
        return False


# --- an end that no restart mends -----------------------------------------------------------------------------------


def remember_end(code: int) -> None:
    """torchrun would start the workers again, as often as it was told: what it starts next ends with this ``code``."""
    if file := _end_file():
        with suppress(OSError):
            file.write_text(str(code))


def ended() -> int | None:
    """The exit code of what cannot be mended by starting again; None if there was no such end."""
    file = _end_file()
    if file is None or not _number("TORCHELASTIC_RESTART_COUNT", 0) or not file.is_file():
        return None
    return int(file.read_text())


def _end_file() -> Path | None:
    """In the folder that torchrun made for the attempts of this one command (``.../attempt_0/RANK/error.json``)."""
    given = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if given is None or len(Path(given).parents) < 4 or not Path(given).parents[1].name.startswith("attempt_"):
        return None
    return Path(given).parents[2] / "ended"


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else otherwise


@contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except RuntimeError as fault:
        hours = PATIENCE.total_seconds() / 3600
        raise LostWorker(
            f"Another worker has ended, or was not heard of for {hours:g} hours.",
            "Repeat the command: finished blocks are kept.",
        ) from fault
