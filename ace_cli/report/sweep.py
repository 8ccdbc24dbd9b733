"""What the jobs of a ``--multirun`` leave together: a record of each job, sweep.json, and the table of many runs.

Jobs may be processes of other machines, so they share files alone: each writes its record, whoever asks reads them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ace_cli.core.locks import in_turn, is_locked
from ace_cli.report.collect import Group, Row, as_markdown, groups, row
from ace_cli.report.facts import Report, write_whole
from ace_cli.report.markdown import table
from ace_cli.report.pace import duration
from ace_cli.report.zero_shot import task_protocol

SCHEMA_VERSION = 1
#: The folder of the records, in a sweep's folder: N.json of job N, and N.lock, held while somebody works on it.
RECORDS = "jobs"
#: Letters in the name of a repository.
LONGEST_ON_HUB = 96
_LAUNCHED = "launched"
_AGAIN = "repeat the command to do it again"


@dataclass(frozen=True)
class JobRecord:
    """What became of job ``number``, as a file in the sweep's ``folder``. Written under the lock ``lock``."""

    folder: Path
    number: int
    overrides: Sequence[str]

    @property
    def lock(self) -> tuple[Path, str]:
        """Folder and name of the lock file of whoever works on this job."""
        return self.folder / RECORDS, f"{self.number}.lock"

    def begin(self) -> None:
        """The job runs. If nothing else is ever written, it was killed."""
        self._write({"running": {"process": os.getpid(), "machine": platform.node()}})

    def fail(self, error: str) -> None:
        """The job ended in an error."""
        self._write({"error": error})

    def finish(self, report: Report | None, objection: str | None = None) -> None:
        """The job is done; None for a dry run. ``objection``: why its result is not good enough."""
        if report is None:
            self._write({"dry_run": True})
            return
        slim = dataclasses.asdict(dataclasses.replace(report, slots=[], blocks=[]))
        self._write({"objection": objection, "report": slim})

    def read(self) -> dict[str, Any]:
        """What was written last; empty where nothing was."""
        try:
            return dict(json.loads((self.folder / RECORDS / f"{self.number}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def _write(self, content: dict[str, Any]) -> None:
        (self.folder / RECORDS).mkdir(parents=True, exist_ok=True)
        content = {"job": self.number, "overrides": list(self.overrides), **content}
        write_whole(self.folder / RECORDS / f"{self.number}.json", json.dumps(content) + "\n")


@dataclass(frozen=True)
class Launched:
    """What was started: how many ``jobs``, and the overrides in which they differ."""

    jobs: int
    varied: Sequence[str]

    def on_hub(self, name: str | None, number: int, typed: Mapping[str, str]) -> str | None:
        """What job ``number`` is called on the hub: ``name`` and what it was asked for, apart from the others.

        me/small of the job with metric=varp sparsity=2:4 is me/small-varp-2-4, where these differ; names that are too
        long end in the job's number. Where the jobs were given names of their own, those.
        """
        if name is None or "push_to_hub" in self.varied:
            return name
        own = [re.sub(r"[^A-Za-z0-9.]+", "-", typed[each]).strip("-.") for each in self.varied if each in typed]
        long = "-".join([name, *filter(None, own)])
        return long if len(long) <= LONGEST_ON_HUB else f"{name[: LONGEST_ON_HUB - 8]}-{number}"

    def write(self, folder: Path) -> None:
        """Into a sweep's folder, for its jobs to read."""
        (folder / RECORDS).mkdir(parents=True, exist_ok=True)
        write_whole(folder / RECORDS / _LAUNCHED, json.dumps({"jobs": self.jobs, "varied": list(self.varied)}) + "\n")

    def line(self, of: JobRecord) -> str:
        """ "Job 2 of 4 (number 1): metric=varp; about 12 min left": from what the jobs that have ended took."""
        typed = dict(override.split("=", 1) for override in of.overrides)
        own = " ".join(f"{name}={typed[name]}" for name in self.varied if name in typed)
        records = [JobRecord(of.folder, number, []).read() for number in range(self.jobs)]
        took = [each["report"]["seconds"]["total"] for each in records if each.get("report")]
        at_once = max(1, sum("running" in each for each in records))
        left = self.jobs - sum(bool(each.keys() & {"report", "error", "dry_run"}) for each in records)
        seconds = statistics.fmean(took) * left / at_once if took else 0.0
        about = f"; about {duration(seconds)} left" if seconds else ""
        return f"Job {of.number + 1} of {self.jobs} (number {of.number}){': ' if own else ''}{own}{about}"


def launched(folder: Path) -> Launched | None:
    """What the sweep in ``folder`` started; None where that is not known."""
    try:
        return Launched(**json.loads((folder / RECORDS / _LAUNCHED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def differing(jobs: Sequence[Mapping[str, str]]) -> list[str]:
    """The overrides, name -> value, in which jobs differ."""
    names = dict.fromkeys(name for job in jobs for name in job)
    return [name for name in names if len({job.get(name) for job in jobs}) > 1]


def forget(folder: Path) -> None:
    """Remove the records of an earlier start, but for those of jobs that are still worked on."""
    for file in (folder / RECORDS).glob("*.json"):
        if not is_locked(file.parent, f"{file.stem}.lock"):
            file.unlink()


def gather(folder: Path, launched: Mapping[int, Sequence[str]] | None = None) -> Sweep:
    """The sweep as its records tell it. ``launched``: number -> overrides; such a job without a result has failed.

    None: the jobs that have ended so far.
    """
    sweep = Sweep(folder)
    if launched is None:
        numbers = sorted(int(file.stem) for file in (folder / RECORDS).glob("*.json"))
        ended = {
            number: found for number in numbers if not (found := JobRecord(folder, number, []).read()).get("running")
        }
    else:
        ended = {number: _result(JobRecord(folder, number, overrides)) for number, overrides in launched.items()}
    for number, record in ended.items():
        sweep.add(number, record)
    return sweep


def _perplexity(row: Row) -> float:
    value = row.numbers["perplexity"]
    return float("inf") if value is None else value


def write_so_far(folder: Path) -> None:
    """The tables of the jobs that have ended: a sweep that is cut off leaves them."""
    with in_turn(folder / RECORDS / "tables.lock"):
        gather(folder).write()


@dataclass
class Sweep:
    """The jobs of a sweep: their overrides and facts, or the error that ended them."""

    folder: Path
    jobs: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    #: What the gate says of jobs that are done.
    objections: list[str] = field(default_factory=list)

    def add(self, number: int, record: dict[str, Any]) -> None:
        """One more job by its record; a dry run is none."""
        if "dry_run" in record:
            return
        typed = dict(override.split("=", 1) for override in record["overrides"])
        job: dict[str, Any] = {"job": number, "overrides": typed}
        if report := record.get("report"):
            file = Path(report["checkpoint"]).parent / "report.json"
            job |= _facts(report) | {"report": str(file)}
            self.rows.append(row(file, report, {"job": str(number), **typed}))
            self.objections += [record["objection"]] if record["objection"] else []
        else:
            job["error"] = record["error"]
        self.jobs.append(job)

    @property
    def failed(self) -> int:
        """How many jobs ended in an error, or without a result."""
        return sum("error" in job for job in self.jobs)

    def show(self) -> None:
        """The tables, one for each evaluation protocol, what failed, and where it all is, on the screen."""
        from ace_cli.report.terminal import Terminal

        terminal = Terminal()
        terminal.say()
        terminal.groups(self._groups())
        for job in self.jobs:
            if "error" in job:
                own = " ".join(f"{name}={job['overrides'].get(name, '')}" for name in self._varied())
                terminal.say(f"Job {job['job']} failed ({own}): {job['error']}", "red")
        terminal.place("Sweep", str(self.folder / "sweep.html"))

    def write(self) -> None:
        """sweep.json and sweep.md in the sweep's folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tables = "\n\n".join(part for part in (as_markdown(self._groups()), self._failures()) if part)
        content = {"schema_version": SCHEMA_VERSION, "jobs": self.jobs}
        write_whole(self.folder / "sweep.json", json.dumps(content, indent=1) + "\n")
        write_whole(self.folder / "sweep.md", f"# Sweep\n\n{tables}\n")

    def finish(self, search: bool = False) -> None:
        """sweep.html and its pictures, from the jobs that succeeded; each job's page is told of the others.

        ``search``: each job learnt from those before.
        """
        from ace_cli.report import near, overview

        failures = [f"Job {job['job']} failed: {job['error']}" for job in self.jobs if "error" in job]
        title = f"Search of {len(self.jobs)} trials" if search else f"Sweep of {len(self.jobs)} jobs"
        overview.write(self._groups(), self.folder, "sweep", title, failures, trials=search)
        near.refresh(self.rows)

    def _varied(self) -> list[str]:
        """The overrides in which the jobs differ."""
        return differing([job["overrides"] for job in self.jobs])

    def _groups(self) -> list[Group]:
        """Where each job is a method as a table has it (``recipe``), best first; else as they were asked for."""
        varied = self._varied()
        rows = sorted(self.rows, key=_perplexity) if "recipe" in varied else self.rows
        return groups(rows, always=("job", *varied))

    def _failures(self) -> str:
        """A table of the jobs that failed; empty where none did."""
        varied = self._varied()
        lines = [
            [str(job["job"]), *(job["overrides"].get(name, "") for name in varied), job["error"]]
            for job in self.jobs
            if "error" in job
        ]
        return "## Failed\n\n" + table(["job", *varied, "error"], lines) if lines else ""


def _result(of: JobRecord) -> dict[str, Any]:
    """A job's record; one of a failure where the job has left none."""
    record = {"overrides": list(of.overrides), **of.read()}
    running = record.get("running")
    if is_locked(*of.lock):
        error = "Still worked on by another process: wait for it, then repeat the command."
    elif running:
        where = f"process {running['process']} on {running['machine']}"
        error = f"Ended without a result ({where}): killed, or out of memory; {_AGAIN}."
    elif record.keys() == {"overrides"}:
        error = f"Never began: cancelled, or its launcher stopped before; {_AGAIN}."
    else:
        return record
    return {"overrides": record["overrides"], "error": error}


def _facts(report: dict[str, Any]) -> dict[str, Any]:
    """What sweep.json keeps of a report."""
    perplexity, zero_shot = report["perplexity"], report["zero_shot"]
    tasks = {"protocol": task_protocol(zero_shot), "average": zero_shot["average"]} if zero_shot else None
    return {
        "perplexity": perplexity["pruned"], "dense": perplexity["dense"], "protocol": perplexity["protocol"],
        "sparsity": report["sparsity"]["achieved"], "seconds": report["seconds"],
        "peak_memory_bytes": report["peak_memory_bytes"], "tasks": tasks,
    }  # fmt: skip
