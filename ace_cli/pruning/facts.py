"""What the engine tells of its work: one fact per slot and per block. The journal keeps them, the report shows them."""

from __future__ import annotations

from dataclasses import dataclass, field

from ace_cli.pruning.diagnostics import ActivationFacts, OutputChange
from ace_cli.recovery.base import RecoveryFacts


@dataclass(frozen=True)
class SlotFacts:
    """What became of one slot; ``tokens`` is what its statistics saw, ``seconds`` what scoring to masking took.

    ``error``: how far its outputs moved, relative to their size, where that was looked at.
    ``routed``: of an expert, how many of the calibration tokens the model sends to it. Of a weight whose units were
    cut, ``kept`` are those that stay and ``digests`` the hash of every tensor that got smaller, by name.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    tokens: int
    diagnosis: dict[str, float]
    notes: list[str]
    seconds: float
    routed: int | None = None
    activations: ActivationFacts | None = None
    kept: list[int] | None = None
    digests: dict[str, str] = field(default_factory=dict)
    error: float | None = None


@dataclass(frozen=True)
class BlockFacts:
    """One finished block; ``output`` is what pruning it did to what it puts out, ``recovery`` what training it did."""

    index: int
    name: str
    slots: list[SlotFacts]
    seconds: float
    output: OutputChange | None = None
    recovery: RecoveryFacts | None = None
