"""The phases of a run: how long each took and how much memory it needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from ace_cli import memory
from ace_cli.clock import Clock


@dataclasses.dataclass
class Phases:
    """Wall seconds and peak memory of the run's phases."""

    clock: Clock
    memory: dict[str, int] = dataclasses.field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        memory.trim()
        memory.reset_peak()
        with self.clock(name):
            yield
        self.memory[name] = max(self.memory.get(name, 0), memory.peak())
