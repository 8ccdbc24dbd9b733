"""Where the time and the memory of a run went: seconds by phase, and resident bytes over time."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from ace_cli.core import memory


class Clock:
    """Adds up seconds by phase name. A phase entered inside another interrupts it, so the phases add up to the whole.

    ``synchronise`` waits for the device, so that work counts where it began.
    """

    def __init__(self, synchronise: Callable[[], None] = lambda: None) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.synchronise = synchronise
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._switch()
        self._open.append(phase)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def _switch(self) -> None:
        """Give the time since the last switch to the phase that is open now."""
        self.synchronise()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


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
