"""Which parameters share one tensor: what the class declares, as far as the files agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from ace_cli.model.files import Checkpoint


class Stored(Protocol):
    """What knows whether a parameter is stored."""

    def __contains__(self, name: str) -> bool: ...


#: Elements of two tensors that are compared at once.
_PIECE = 1 << 22


def resolved(declared: Mapping[str, str], stored: Stored, equal: Callable[[str, str], bool]) -> dict[str, str]:
    """``declared``: parameter -> the one whose tensor it shares. Returns the same of what is really shared.

    As transformers loads a folder: a parameter that is stored with other values stands by itself, and where only the
    one that should follow is stored, the other follows it. ``equal`` compares two that are stored.
    """
    ties: dict[str, str] = {}
    for source in dict.fromkeys(declared.values()):
        members = [source, *(name for name, of in declared.items() if of == source)]
        first = next((name for name in members if name in stored), source)
        for name in members:
            if name != first and (name not in stored or equal(name, first)):
                ties[name] = first
    return ties


def same_values(checkpoint: Checkpoint, one: str, other: str, dtype: torch.dtype) -> bool:
    """Whether two stored tensors are equal once they are in ``dtype``; NaN equals nothing. Reads them piecewise."""
    entry = checkpoint.tensors[one]
    if entry.shape != checkpoint.tensors[other].shape:
        return False
    with checkpoint.opened(one) as read, checkpoint.opened(other) as read_other:
        for first in range(0, entry.numel, _PIECE):
            count = min(_PIECE, entry.numel - first)
            if not torch.equal(read(first, count).to(dtype), read_other(first, count).to(dtype)):
                return False
    return True
