"""What a person sees: the plan, a live bar, the table, where the results are. Everything also goes to run.log."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ace_cli.core.console import unwritten
from ace_cli.core.steps import Steps
from ace_cli.report.bars import live
from ace_cli.report.card import loading
from ace_cli.report.fitting import fitting
from ace_cli.report.markdown import (
    fidelity_line,
    gigabytes,
    loops_line,
    perplexity_rows,
    protocol_line,
    recovery_line,
    share_name,
    stage_lines,
    target_line,
    windows_line,
)
from ace_cli.report.pace import Pace, Remaining, Span, durations, expecting
from ace_cli.report.speed import SPEED_HEAD, speed_lines, speed_rows
from ace_cli.report.verdict import advice, sentence, verdict_of
from ace_cli.report.zero_shot import (
    comparison_head,
    comparison_lines,
    comparison_rows,
    task_head,
    task_line,
    task_rows,
)

if TYPE_CHECKING:
    from ace_cli.report.collect import Group
    from ace_cli.report.facts import Comparison, Report, Speed, ZeroShot
    from ace_cli.run.plan import Plan

#: Numbers of many runs that a narrow screen does without, the first one first.
DROPPED = (
    "peak GB", "total s", "dense tasks", "dense", "zeros", "KL", "same top-1", "fewer", "ratio", "prune s",
)  # fmt: skip
#: Seconds that nobody needs a line for.
_SHORT = 2.0
#: Letters in a line of the log, and of standard output where that is no screen.
WIDE = 160
_STYLES = {"good": "green", "fair": "yellow", "bad": "red", "": None}


class _Screen(Console):
    """Standard output; what it does not take ends the run in a sentence of its own, not in one about other files."""

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError as fault:
            raise unwritten(fault) from fault

    def on_broken_pipe(self) -> None:
        raise unwritten(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)))


class Terminal:
    """Prints to standard output, unless ``quiet``; a log file, once opened, gets the same text.

    ``brief``: the result is one line, as in a sweep whose table follows.
    """

    def __init__(self, quiet: bool = False, brief: bool = False) -> None:
        self._screen = _Screen(highlight=False, quiet=quiet, force_jupyter=False)  # as text, into a cell as well
        self.brief = brief
        if not self._screen.is_terminal:  # a file has no edge
            self._screen.width, self._screen.soft_wrap = WIDE, True
        self._log: Console | None = None
        self._remaining = Remaining()

    @contextmanager
    def logging_to(self, file: Path) -> Iterator[None]:
        """Also write everything to ``file``."""
        with open(file, "a", encoding="utf-8") as stream:
            self._log = Console(file=stream, width=WIDE, highlight=False, force_jupyter=False)
            try:
                yield
            finally:
                self._log = None

    def say(self, content: Any = "", style: str | None = None) -> None:
        """Print a line or a table."""
        self._screen.print(content, style=style, markup=False)
        self.note(content)

    def note(self, content: Any) -> None:
        """For the log alone."""
        if self._log is not None:
            self._log.print(content, markup=False)

    def aside(self, content: Any) -> None:
        """What a ``brief`` screen does without."""
        (self.note if self.brief else self.say)(content)

    def place(self, name: str, value: str) -> None:
        """A line whose ``value`` is to be copied: it is never broken."""
        self._screen.print(f"{name:8} {value}", markup=False, soft_wrap=True)
        self.note(f"{name:8} {value}")

    def plan(self, plan: Plan, chosen: str, details: Mapping[str, str]) -> None:
        """What will happen and what it needs: in one line, and ``details`` below it if there are any."""
        size = f"{plan.parameters / 1e6:,.1f} M parameters, {plan.blocks} blocks"
        if plan.cut:
            size += f" -> {plan.parameters_left / 1e6:,.1f} M parameters"
        needs = f"needs {gigabytes(plan.host_bytes)} memory, {gigabytes(plan.disk_bytes)} disk"
        (self.aside if not details else self.say)(f"{chosen}: {size}; {needs}.")
        self._pairs(details)

    def _pairs(self, details: Mapping[str, str]) -> None:
        """A line for each; on a screen what does not fit goes on below where it began."""
        if self._screen.is_terminal:
            grid = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 1, 0, 0))
            for name, value in details.items():
                grid.add_row(f"{name:12}", Text(value))
            self._screen.print(grid)
        for name, value in details.items():
            (self.note if self._screen.is_terminal else self.say)(f"{name:12} {value}")

    def expect(self, spans: Mapping[str, Span]) -> None:
        """What the bars to come will probably take, in seconds: the time that is left of the run is told by them."""
        self._remaining = expecting(spans)

    @contextmanager
    def progress(self, what: str, total: int, done: int = 0) -> Iterator[Steps]:
        """A live bar; yields what to call after each of ``total`` steps. Plain lines where there is no screen."""
        if not self._screen.is_terminal:
            self.say(f"{what} ...")
        with self._bar(what, total, done) as steps:
            yield steps

    @contextmanager
    def waiting(self, what: str) -> Iterator[Steps]:
        """A bar that moves, whether or not somebody finds out how many steps there are (``Steps.of``)."""
        with self._bar(what, None, 0) as steps:
            yield steps

    @contextmanager
    def _bar(self, what: str, total: int | None, done: int) -> Iterator[Steps]:
        begun = self._remaining.begin(what)
        if not self._screen.is_terminal:
            yield _Lines(self, what, self._remaining, Pace(total, done, begun))
            return
        with live(self._screen, what, Pace(total, done, begun), self._remaining) as steps:
            yield steps

    def tasks(self, zero_shot: ZeroShot) -> None:
        """The zero-shot scores and their protocol."""
        self._scores(task_head(zero_shot), task_rows(zero_shot))
        self.say(task_line(zero_shot))

    def speed(self, speed: Speed) -> None:
        """Tokens a second, memory and bytes, and how they were measured."""
        self._scores(SPEED_HEAD, speed_rows(speed))
        for line in speed_lines(speed):
            self.say(line)

    def comparison(self, comparison: Comparison) -> None:
        """Models side by side, and the protocols."""
        self._scores(comparison_head(comparison), comparison_rows(comparison))
        for line in comparison_lines(comparison):
            self.say(line)

    def groups(self, found: Sequence[Group]) -> None:
        """A table for each protocol of many runs."""
        for group in found:
            head, rows = group.cells()
            shown = fitting(head, rows, self._screen.width, left=len(group.varied), drop=DROPPED, best=group.best(),
                            title=group.protocol)  # fmt: skip
            for part in shown:
                self._screen.print(part)

    def _scores(self, head: list[str], rows: list[list[str]]) -> None:
        self._table(head, rows, left=2)

    def _table(self, head: Sequence[str], rows: Sequence[Sequence[str]], left: int, drop: Sequence[str] = ()) -> None:
        for part in fitting(head, rows, self._screen.width, left=left, drop=drop):
            self._screen.print(part)
        for part in fitting(head, rows, WIDE, left=left):
            self.note(part)

    def result(self, report: Report, folder: Path, page: bool, verbose: bool = False) -> None:
        """The table, the warnings, the verdict, and how to go on; in one line where the screen is ``brief``."""
        told = dataclasses.asdict(dataclasses.replace(report, slots=[], blocks=[]))
        word = verdict_of(report.perplexity.ratio)
        if self.brief and not verbose:
            self.say(f"{sentence(told)} {report.seconds['total']:.0f} s.", _STYLES[word.level])
            return
        self._numbers(report, verbose)
        for warning in report.warnings:
            self.say(f"Warning: {warning}", style="yellow")
        self.say(sentence(told), f"bold {_STYLES[word.level] or ''}".strip())
        if next_step := advice(told):
            self.place("Try", next_step)
        self.place("Report", str(folder / ("report.html" if page else "report.md")))
        if Path(report.checkpoint).is_dir():
            self.place("Load", loading(report.checkpoint, report.own_code))

    def _numbers(self, report: Report, verbose: bool) -> None:
        head = ["model", "perplexity", "ratio", share_name(report), "on disk"]
        self._table(head, perplexity_rows(report), 1, drop=("on disk",))
        self.say(protocol_line(report))
        lines = [windows_line(report)] if verbose else []
        for line in (*lines, recovery_line(report), fidelity_line(report), *stage_lines(report), target_line(report)):
            if line:
                self.say(line)
        if loops := loops_line({"samples": [dataclasses.asdict(sample) for sample in report.samples]}):
            self.say(loops)
        if report.zero_shot is not None:
            self.tasks(report.zero_shot)
        if report.speed is not None:
            self.speed(report.speed)
        seconds, memory = report.seconds, report.peak_memory_bytes
        rate = f" ({report.tokens_per_second['prune']:,.0f} tokens/s)" if report.tokens_per_second else ""
        self.say(
            f"Pruned in {seconds['prune'] + seconds['write']:.1f} s{rate + _limit(report) if verbose else ''}, "
            f"{seconds['total']:.1f} s in all; peak memory {gigabytes(memory['host'])}."
        )


def quiet_libraries() -> None:
    """Our own bar is the only one, and other libraries' remarks about files they read are not for the user."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _limit(report: Report) -> str:
    if not report.efficiency:
        return ""
    return (
        f", {report.efficiency['efficiency']:.0%} of this machine's limit ({report.efficiency['limit_seconds']:.1f} s)"
    )


@dataclasses.dataclass
class _Lines(Steps):
    """Where there is no screen: a line every ten per cent of a wait that is not short."""

    terminal: Terminal
    what: str
    remaining: Remaining
    pace: Pace

    def of(self, total: int) -> None:
        self.pace.of(total)

    def __call__(self) -> None:
        self.pace()
        done, total = self.pace.done, self.pace.total or 1
        if self.pace.elapsed > _SHORT and done * 10 // total > (done - 1) * 10 // total:
            left = self.remaining.with_later(self.pace.left()) if done < total else None
            line = f"{self.what}: {done}/{total}" + (f", {durations(left)} left of the run" if left else "")
            self.terminal.say(line)
