"""What the jobs of a ``--multirun`` leave together: sweep.json, and the table of many runs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ace_cli.report.collect import Group, Row, as_markdown, groups, row
from ace_cli.report.facts import Report, write_whole
from ace_cli.report.markdown import table
from ace_cli.report.zero_shot import task_protocol

SCHEMA_VERSION = 1


@dataclass
class Sweep:
    """The jobs so far: their overrides and reports, or the error that ended them."""

    folder: Path | None = None
    jobs: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    #: Another sweep works in this folder, too: it keeps the records, and its jobs are not overwritten in them.
    shared: bool = False

    def add(self, overrides: list[str], outcome: Report | str) -> None:
        """Record one job."""
        typed = dict(override.split("=", 1) for override in overrides)
        job: dict[str, Any] = {"job": len(self.jobs), "overrides": typed}
        if isinstance(outcome, str):
            job["error"] = outcome
        else:
            file = Path(outcome.checkpoint).parent / "report.json"
            report = dataclasses.asdict(dataclasses.replace(outcome, slots=[], blocks=[]))
            job |= _facts(report) | {"report": str(file)}
            self.rows.append(row(file, report, {"job": str(job["job"]), **typed}))
        self.jobs.append(job)
        if self.folder is not None:  # after every job: a sweep that is cut off leaves the table of what it did
            self.write()

    @property
    def failed(self) -> int:
        """How many jobs ended in an error."""
        return sum("error" in job for job in self.jobs)

    def write(self) -> str:
        """sweep.json and sweep.md in the sweep's folder; returns the tables, one for each evaluation protocol."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        tables = "\n\n".join(part for part in (as_markdown(self._groups()), self._failures()) if part)
        if self.shared:
            return tables
        content = {"schema_version": SCHEMA_VERSION, "jobs": self.jobs}
        write_whole(self.folder / "sweep.json", json.dumps(content, indent=1) + "\n")
        write_whole(self.folder / "sweep.md", f"# Sweep\n\n{tables}\n")
        return tables

    def finish(self) -> None:
        """sweep.html and its pictures, from the jobs that succeeded."""
        from ace_cli.report import overview

        assert self.folder is not None
        if self.shared:
            return
        failures = [f"Job {job['job']} failed: {job['error']}" for job in self.jobs if "error" in job]
        overview.write(self._groups(), self.folder, "sweep", f"Sweep of {len(self.jobs)} jobs", failures)

    def _varied(self) -> list[str]:
        """The overrides in which the jobs differ."""
        names = dict.fromkeys(name for job in self.jobs for name in job["overrides"])
        return [name for name in names if len({job["overrides"].get(name) for job in self.jobs}) > 1]

    def _groups(self) -> list[Group]:
        return groups(self.rows, always=("job", *self._varied()))

    def _failures(self) -> str:
        """A table of the jobs that failed; empty where none did."""
        varied = self._varied()
        lines = [
            [str(job["job"]), *(job["overrides"].get(name, "") for name in varied), job["error"]]
            for job in self.jobs
            if "error" in job
        ]
        return "## Failed\n\n" + table(["job", *varied, "error"], lines) if lines else ""


def _facts(report: dict[str, Any]) -> dict[str, Any]:
    """What sweep.json keeps of a report."""
    perplexity, zero_shot = report["perplexity"], report["zero_shot"]
    tasks = {"protocol": task_protocol(zero_shot), "average": zero_shot["average"]} if zero_shot else None
    return {
        "perplexity": perplexity["pruned"], "dense": perplexity["dense"], "protocol": perplexity["protocol"],
        "sparsity": report["sparsity"]["achieved"], "seconds": report["seconds"],
        "peak_memory_bytes": report["peak_memory_bytes"], "tasks": tasks,
    }  # fmt: skip
