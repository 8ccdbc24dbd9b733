"""What several workers do of one block, each its share, and how all of them get the whole: rows of a slot, experts.

Every worker ends with the same bytes, from the same statistics whatever their number. Shapes: O outputs, I inputs, R
rows of a piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ace_cli.core.workers import ONE, Workers
from ace_cli.methods.repair.base import Repaired
from ace_cli.methods.statistics import ROWS, SHARED_TOKENS
from ace_cli.model.files import hash_of_tensor
from ace_cli.model.slots import Slot

if TYPE_CHECKING:
    from ace_cli.model.calls import Batch

#: What a piece tells beside its weights: both losses, how many were swapped, notes; JSON.
_Told = tuple[float | None, float | None, int | None, list[str]]


def by_pieces(workers: Workers, new_OI: Tensor, work: Callable[[slice], tuple[Tensor, Repaired]]) -> Repaired:
    """Fill ``new_OI``, contiguous: ``work(rows)`` gives some rows of it, and what their repair told.

    Each worker makes its pieces and gets those of the others. Returns what all repairs together told, without weights.
    """
    shares = workers.pieces(len(new_OI), new_OI.device.type)
    told: list[_Told] = []
    for rows in shares[workers.rank]:
        new_OI[rows], repaired = work(rows)
        told.append((repaired.loss_before, repaired.loss_after, repaired.swapped, repaired.notes))
    workers.spread([(new_OI[pieces[0].start : pieces[-1].stop], rank) for rank, pieces in enumerate(shares) if pieces])
    every = [each for of_worker in workers.told(told) for each in of_worker]
    before, after, swapped = (_sum([each[place] for each in every]) for place in range(3))
    notes = list(dict.fromkeys(note for each in every for note in each[3]))
    nothing = new_OI.new_empty(0)
    return Repaired(nothing, nothing, notes, before, after, None if swapped is None else int(swapped))


def outputs(workers: Workers, slot: Slot, x: Tensor) -> Tensor:
    """What ``slot`` makes of x (..., I): (..., O). ``workers`` read the same x; each computes some rows of the weight.

    On a CPU products have ``ROWS`` rows for any number of them, and from ``SHARED_TOKENS`` on they send each other what
    they made: T O numbers, for T O I multiplications that they share. A GPU computes that sooner. Workers that are
    apart read other inputs each, and compute all rows.
    """
    count, tokens, device = slot.shape[0], x.numel() // x.shape[-1], x.device.type
    step = ROWS if device == "cpu" else count
    pieces = [slice(first, min(first + step, count)) for first in range(0, count, step)]
    together = workers if len(pieces) > 1 and tokens >= SHARED_TOKENS and not workers.apart else ONE
    owners = [number * together.size // len(pieces) for number in range(len(pieces))]
    parts = [
        slot.output(x, rows)
        if owner == together.rank
        else x.new_empty((*x.shape[:-1], rows.stop - rows.start), dtype=slot.weight_OI.dtype)
        for rows, owner in zip(pieces, owners, strict=True)
    ]
    together.spread(list(zip(parts, owners, strict=True)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _sum(numbers: Sequence[float | str | list[str] | None]) -> float | None:
    """Exact, but for one rounding: the order does not count. None where a number is not known."""
    known = [number for number in numbers if isinstance(number, int | float)]
    return math.fsum(known) if known and len(known) == len(numbers) else None


def held(weights: dict[str, Tensor], batches: Sequence[Batch]) -> dict[str, str]:
    """Hashes of what all workers must hold alike after a block: its new tensors, on the CPU, and the hidden states."""
    found = {name: hash_of_tensor(weight) for name, weight in weights.items()}
    states = "".join(hash_of_tensor(batch.hidden_BLH.cpu()) for batch in batches)
    return {**found, "the hidden states": hash_of_tensor(torch.tensor(list(states.encode()), dtype=torch.uint8))}
