"""A bar on the screen that moves, and says how much longer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Column
from rich.text import Text

from ace_cli.report.pace import Pace, Remaining, duration, durations


@contextmanager
def live(screen: Console, what: str, pace: Pace, remaining: Remaining) -> Iterator[Pace]:
    """A bar named ``what`` until the context is left; yields what is to be called after each step."""
    columns = (TextColumn("{task.description}", table_column=Column(no_wrap=True)), _Bar(pace), _Words(pace, remaining))
    with Progress(*columns, console=screen, transient=True, expand=True) as bar:
        bar.add_task(what, total=pace.total)
        yield pace


class _Bar(ProgressColumn):
    """What is done; it goes to and fro where nobody knows of how much."""

    max_refresh = None

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._pace = pace

    def render(self, task: Task) -> ProgressBar:
        total, done, now = self._pace.total, self._pace.shown(), task.get_time()
        return ProgressBar(total=total, completed=done, pulse=total is None, animation_time=now)


class _Words(ProgressColumn):
    """Steps, time, and what is left: of the run, where its forecast is known, else of the bar."""

    max_refresh = None

    def __init__(self, pace: Pace, remaining: Remaining) -> None:
        super().__init__(Column(no_wrap=True))
        self._pace, self._remaining = pace, remaining

    def render(self, task: Task) -> Text:
        pace, left = self._pace, self._remaining.with_later(self._pace.left())
        parts = [f"{pace.done}/{pace.total}"] if pace.total is not None else []
        parts.append(duration(pace.elapsed))
        if left is not None and pace.done != pace.total:
            parts.append(f"{durations(left)} left")
        return Text(", ".join(parts))
