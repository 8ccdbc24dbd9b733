"""The phases of a run: when each ran, how long it took and how much memory it needed."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from ace_cli import memory
from ace_cli.clock import Clock


class MemorySampler:
    """Resident memory of this process over time, from a thread of its own while inside the context.

    ``samples`` are (seconds since the start, bytes). A long run is sampled more rarely: never more than ``MOST`` are
    kept.
    """

    MOST = 400

    def __init__(self, interval: float = 0.25) -> None:
        self.samples: list[tuple[float, int]] = []
        self._interval = interval
        self._start = time.perf_counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def sample(self) -> None:
        """Look once."""
        self.samples.append((self.elapsed, memory.resident()))
        if len(self.samples) > self.MOST:
            self.samples, self._interval = self.samples[::2], self._interval * 2

    def _run(self) -> None:
        self.sample()
        while not self._stop.wait(self._interval):
            self.sample()


@dataclasses.dataclass
class Phases:
    """Wall seconds and peak memory of the run's phases, and when they ran."""

    clock: Clock
    sampler: MemorySampler
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    spans: list[tuple[str, float, float]] = dataclasses.field(default_factory=list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        memory.trim()
        memory.reset_peak()
        start = self.sampler.elapsed
        with self.clock(name):
            yield
        self.spans.append((name, start, self.sampler.elapsed))
        self.memory[name] = max(self.memory.get(name, 0), memory.peak())
