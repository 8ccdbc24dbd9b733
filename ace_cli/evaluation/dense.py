"""What was measured of dense models by this process: a sweep measures each model once under each protocol."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ace_cli.evaluation.fidelity import DenseStates
from ace_cli.evaluation.samples import Continuations

#: Bytes of states that are kept; the oldest models are forgotten, and measured again when they return.
CACHE_BYTES = 1 << 30


@dataclass
class Dense:
    """A dense model's loss on each window, and its last states on the windows that fidelity looks at."""

    losses: list[float]
    states: DenseStates


@dataclass
class DenseCache:
    """By model and protocol: what windows of text gave, the scores on tasks, and what prompts were written on to."""

    windows: dict[tuple[str, ...], Dense] = field(default_factory=dict)
    tasks: dict[Any, Any] = field(default_factory=dict)
    samples: dict[tuple[str, ...], Continuations] = field(default_factory=dict)

    def remember(self, key: tuple[str, ...], dense: Dense) -> None:
        """Keep ``dense``, and no more bytes than allowed."""
        self.windows[key] = dense
        while len(self.windows) > 1 and sum(kept.states.nbytes for kept in self.windows.values()) > CACHE_BYTES:
            del self.windows[next(iter(self.windows))]
