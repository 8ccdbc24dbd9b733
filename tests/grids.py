"""Which cells of a grid of choices are tested: enough that any few choices meet, far fewer than the product."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any


def pairs(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Cells in which every two values of different axes meet at least once."""
    return covering(2, *axes)


def triples(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Cells in which every three values of different axes meet at least once."""
    return covering(3, *axes)


def covering(strength: int, *axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Begin each cell with choices that have not met yet; fill it up with what meets most that it has not met."""
    left = {
        tuple(zip(some, values, strict=True)): None
        for some in itertools.combinations(range(len(axes)), strength)
        for values in itertools.product(*(range(len(axes[axis])) for axis in some))
    }
    cells = []
    while left:
        cell = dict(next(iter(left)))
        for axis in set(range(len(axes))) - set(cell):
            values = range(len(axes[axis]))
            gains = [sum(met in left for met in _meetings(cell, axis, value, strength)) for value in values]
            turned = [(len(cells) + value) % len(values) for value in values]  # fair among equals
            cell[axis] = max(turned, key=gains.__getitem__)
        for met in itertools.combinations(sorted(cell.items()), strength):
            left.pop(met, None)
        cells.append(tuple(values[cell[axis]] for axis, values in enumerate(axes)))
    return cells


def _meetings(cell: dict[int, int], axis: int, value: int, strength: int) -> list[tuple[tuple[int, int], ...]]:
    """What would meet if ``value`` stood in ``axis`` of the unfinished ``cell``."""
    return [tuple(sorted((*some, (axis, value)))) for some in itertools.combinations(cell.items(), strength - 1)]
