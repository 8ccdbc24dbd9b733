"""What a person sees: the plan, a live bar, the table, where the results are. Everything also goes to run.log."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ace_cli.core.console import unwritten
from ace_cli.report.markdown import (
    fidelity_line,
    gigabytes,
    perplexity_rows,
    protocol_line,
    recovery_line,
    share_name,
    stage_lines,
    windows_line,
)
from ace_cli.report.speed import SPEED_HEAD, speed_lines, speed_rows
from ace_cli.report.zero_shot import (
    comparison_head,
    comparison_lines,
    comparison_rows,
    task_head,
    task_line,
    task_rows,
)

if TYPE_CHECKING:
    from ace_cli.report.facts import Comparison, Report, Speed, ZeroShot
    from ace_cli.run.machine_limit import Limit
    from ace_cli.run.plan import Plan


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
    """Prints to standard output, unless ``quiet``; a log file, once opened, gets the same text."""

    def __init__(self, quiet: bool = False) -> None:
        self._screen = _Screen(highlight=False, soft_wrap=True, quiet=quiet)
        self._log: Console | None = None

    @contextmanager
    def logging_to(self, file: Path) -> Iterator[None]:
        """Also write everything to ``file``."""
        with open(file, "a", encoding="utf-8") as stream:
            self._log = Console(file=stream, width=160, highlight=False)
            try:
                yield
            finally:
                self._log = None

    def say(self, content: Any = "", style: str | None = None) -> None:
        """Print a line or a table."""
        self._screen.print(content, style=style, markup=False)
        if self._log is not None:
            self._log.print(content, markup=False)

    def plan(self, plan: Plan, limit: Limit, method: str, calibration: str, takes: str, instead: str = "") -> None:
        """What will happen and what it needs; ``takes``: how long pruning will be; ``instead``: what is cheaper."""
        rows = {
            "model": f"{plan.architecture}, {plan.parameters / 1e6:,.1f} M parameters, {plan.blocks} blocks",
            "from": plan.model,
            "method": method,
            "calibration": calibration,
            "prunes": f"{plan.pruned_weights / 1e6:,.1f} of {plan.slot_weights / 1e6:,.1f} M weights in "
            f"{len(plan.shapes)} matrices ({plan.coverage:.1%} of the blocks' weights)",
            **({"cuts": _cut_line(plan)} if plan.cut else {}),
            "computes": f"on {plan.device} in {plan.dtype}",
            "needs": f"{gigabytes(plan.host_bytes)} memory"
            + (f", {gigabytes(plan.device_bytes)} on the device" if plan.device_bytes else "")
            + f", {gigabytes(plan.disk_bytes)} disk",
            "takes": f"{takes} to prune and write; the limit here is {limit.seconds:,.1f} s",
        }
        if instead:
            rows["cheaper"] = instead
        if limit.rates.busy:
            rows["machine"] = "busy: the same product took up to " + f"{limit.rates.spread:.1f} times as long"
        if plan.cut:
            rows.pop("prunes")
        if plan.copied:
            rows["copies"] = "; ".join(plan.copied)
        if plan.spills(plan.tokens):
            rows["keeps"] = f"hidden states on disk, to stay within {gigabytes(plan.budget_bytes)} of memory"
        if plan.left_dense:
            rows["stays dense"] = ", ".join(plan.left_dense)
        for name, value in rows.items():
            self.say(f"{name:12} {value}")

    @contextmanager
    def progress(self, what: str, total: int, done: int = 0) -> Iterator[Any]:
        """A live bar; yields a function to call after each of ``total`` steps. Plain lines where there is no screen."""
        if not self._screen.is_terminal:
            self.say(f"{what} ...")
            yield _plain_steps(self, what, total, done)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TextColumn("left"), TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=self._screen, transient=True) as bar:
            task = bar.add_task(what, total=total, completed=done)
            yield lambda: bar.advance(task)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A spinner while something without steps of its own happens."""
        if self._screen.is_terminal:
            with self._screen.status(what):
                yield
        else:
            yield

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

    def _scores(self, head: list[str], rows: list[list[str]]) -> None:
        table = Table()
        for number, name in enumerate(head):
            table.add_column(name, justify="left" if number < 2 else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.say(table)

    def result(self, report: Report) -> None:
        """The table and the warnings."""
        table = Table(title_justify="left")
        for name in ("model", "perplexity", "ratio", share_name(report), "on disk"):
            table.add_column(name, justify="left" if name == "model" else "right")
        for row in perplexity_rows(report):
            table.add_row(*row)
        self.say(table)
        self.say(protocol_line(report))
        for line in (windows_line(report), recovery_line(report), fidelity_line(report), *stage_lines(report)):
            if line:
                self.say(line)
        if report.zero_shot is not None:
            self.tasks(report.zero_shot)
        if report.speed is not None:
            self.speed(report.speed)
        seconds, memory = report.seconds, report.peak_memory_bytes
        rate = f" ({report.tokens_per_second['prune']:,.0f} tokens/s)" if report.tokens_per_second else ""
        self.say(
            f"Pruned in {seconds['prune'] + seconds['write']:.1f} s{rate}{_limit(report)}, "
            f"{seconds['total']:.1f} s in all; peak memory {gigabytes(memory['host'])}."
        )
        for warning in report.warnings:
            self.say(f"Warning: {warning}", style="yellow")


def quiet_libraries() -> None:
    """Our own bar is the only one, and other libraries' remarks about files they read are not for the user."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _cut_line(plan: Plan) -> str:
    before, after, share = plan.parameters, plan.parameters_left, 1 - plan.parameters_left / plan.parameters
    return (
        f"{plan.cut}: {before / 1e6:,.1f} -> {after / 1e6:,.1f} M parameters ({share:.1%} fewer), "
        f"{gigabytes(plan.bytes_source)} -> {gigabytes(plan.bytes_left)}"
    )


def _limit(report: Report) -> str:
    if not report.efficiency:
        return ""
    return (
        f", {report.efficiency['efficiency']:.0%} of this machine's limit ({report.efficiency['limit_seconds']:.1f} s)"
    )


def _plain_steps(terminal: Terminal, what: str, total: int, done: int) -> Any:
    def step() -> None:
        nonlocal done
        done += 1
        if done * 4 // total > (done - 1) * 4 // total:
            terminal.say(f"{what}: {done}/{total}")

    return step
