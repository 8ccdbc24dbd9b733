"""What the next block sees."""

from __future__ import annotations

from enum import Enum


class Propagate(Enum):
    """How pruning one block changes the calibration inputs of the next."""

    block = "block"  # observe the whole dense block, prune it, run it again: Wanda's protocol
    dense = (
        "dense"  # the next block sees what the dense model computes: one forward, errors do not add up in the inputs
    )
