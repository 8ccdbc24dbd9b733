"""What a slot, and the next block, see of the pruning before them."""

from __future__ import annotations

from enum import Enum


class Propagate(Enum):
    """How pruning changes the calibration inputs of what comes after."""

    sublayer = "sublayer"  # each slot is pruned the moment its input is complete, in the same forward: one forward
    block = "block"  # observe the whole dense block, prune it, run it again: Wanda's protocol, two forwards
    dense = "dense"  # everything sees what the dense model computes: one forward
