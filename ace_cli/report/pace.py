"""How much longer: of a bar by the steps it has made, of a run by its forecast, corrected by what has passed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ace_cli.core.steps import Steps

Span = tuple[float, float]

#: A bar never shows a step as done before it is.
_NEARLY = 0.95


class Pace(Steps):
    """The steps of one bar: ``total`` of them (None: nobody knows yet), ``done`` before it began.

    ``expected``: seconds of all steps that are left, at least and at most, as forecast before; None if nobody tried.
    """

    def __init__(
        self, total: int | None, done: int = 0, expected: Span | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.total, self.done = total, done
        self._expected, self._clock = expected, clock
        self._first = done
        self._start = self._begun = self._last = clock()

    @property
    def elapsed(self) -> float:
        """Seconds since the bar began."""
        return self._clock() - self._start

    def of(self, total: int) -> None:
        """Now somebody knows how many: the bar begins anew."""
        self.total, self.done, self._first = total, 0, 0
        self._begun = self._last = self._clock()

    def __call__(self) -> None:
        """One more step is done."""
        self.done += 1
        self._last = self._clock()

    def shown(self) -> float:
        """Steps done, with as much of the present one as has probably passed: a bar of long steps moves, too."""
        if self.total is None or self.done >= self.total or not (a_step := self._a_step()):
            return self.done
        return self.done + min(_NEARLY, (self._clock() - self._last) / a_step)

    def left(self) -> Span | None:
        """Seconds that are left of this bar; None where nothing is known yet."""
        waited = self._clock() - self._last
        steps = 1 if self.total is None else max(0, self.total - self.done)
        if (made := self.done - self._first) > 0:
            a_step = (self._last - self._begun) / made
            seconds = max(a_step * steps - waited, a_step * (steps - 1), 0.0)
            return seconds, seconds
        if self._expected is None:
            return None
        low, high = (max(0.0, each - waited) for each in self._expected)
        return low, max(high, waited * (steps - 1))  # the first step alone has taken so long

    def _a_step(self) -> float:
        if (made := self.done - self._first) > 0:
            return (self._last - self._begun) / made
        steps = 1 if self.total is None else max(1, self.total - self.done)
        return sum(self._expected) / 2 / steps if self._expected else 0.0


@dataclass
class Remaining:
    """What a run has before it: the name of each bar -> its forecast in seconds, in the order of the bars."""

    spans: dict[str, Span] = field(default_factory=dict)

    def begin(self, bar: str) -> Span | None:
        """``bar`` begins: its forecast, if there is one. What stood before it is over, as it is itself from now on."""
        if bar not in self.spans:
            return None
        names = list(self.spans)
        span = self.spans[bar]
        self.spans = {name: self.spans[name] for name in names[names.index(bar) + 1 :]}
        return span

    def with_later(self, left: Span | None) -> Span | None:
        """Seconds that are left of the run, where ``left`` are of the present bar; None where that is unknown."""
        if left is None:
            return None
        low, high = (left[end] + sum(span[end] for span in self.spans.values()) for end in (0, 1))
        return low, high


def expecting(spans: Mapping[str, Span]) -> Remaining:
    """A run of these bars."""
    return Remaining(dict(spans))


def duration(seconds: float) -> str:
    """About so long, for people: "0.4 s", "24 s", "12 min", "3.5 h"."""
    number, unit = _in_unit(seconds, _unit(seconds))
    return f"{number} {unit}"


def durations(span: Span) -> str:
    """ "40 to 90 s", "50 s to 2 min", "12 min"; what rounds to the same is one number."""
    (low, unit), (high, greater) = (_in_unit(each, _unit(each)) for each in span)
    if unit != greater:
        return f"{low} {unit} to {high} {greater}"
    return f"{high} {greater}" if low == high else f"{low} to {high} {greater}"


def _unit(seconds: float) -> tuple[str, float]:
    return ("s", 1.0) if seconds < 100 else ("min", 60.0) if seconds < 6000 else ("h", 3600.0)


def _in_unit(seconds: float, unit: tuple[str, float]) -> tuple[str, str]:
    name, size = unit
    number = seconds / size
    return (f"{number:.1f}" if name == "h" and number < 20 else f"{number:,.0f}"), name
