"""One table over the jobs of a ``--multirun``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ace_cli.report.facts import Report, Score
from ace_cli.report.markdown import protocol_words, table
from ace_cli.report.zero_shot import percent, task_protocol

SCHEMA_VERSION = 1


@dataclass
class Sweep:
    """The jobs so far: their overrides and reports, or the error that ended them."""

    folder: Path | None = None
    jobs: list[dict[str, Any]] = field(default_factory=list)

    def add(self, overrides: list[str], outcome: Report | str) -> None:
        """Record one job."""
        job: dict[str, Any] = {"job": len(self.jobs), "overrides": dict(o.split("=", 1) for o in overrides)}
        if isinstance(outcome, str):
            job["error"] = outcome
        else:
            job |= {
                "perplexity": outcome.perplexity.pruned,
                "dense": outcome.perplexity.dense,
                "protocol": vars(outcome.perplexity.protocol) if outcome.perplexity.protocol else None,
                "sparsity": outcome.sparsity.achieved,
                "seconds": outcome.seconds,
                "peak_memory_bytes": outcome.peak_memory_bytes,
                "tasks": _tasks(outcome),
                "report": str(Path(outcome.checkpoint).parent / "report.json"),
            }
        self.jobs.append(job)
        if self.folder is not None:  # after every job: a sweep that is cut off leaves the table of what it did
            self.write()

    @property
    def failed(self) -> int:
        """How many jobs ended in an error."""
        return sum("error" in job for job in self.jobs)

    def write(self) -> list[str]:
        """sweep.json and sweep.md in the sweep's folder; returns the tables, one for each evaluation protocol."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        tables = self._tables()
        content = {"schema_version": SCHEMA_VERSION, "jobs": self.jobs}
        (self.folder / "sweep.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (self.folder / "sweep.md").write_text("# Sweep\n\n" + "\n\n".join(tables) + "\n", encoding="utf-8")
        return tables

    def finish(self) -> None:
        """sweep.html and its pictures, from the reports of the jobs that succeeded."""
        from ace_cli.report import collect, overview

        assert self.folder is not None
        files = [Path(job["report"]) for job in self.jobs if "error" not in job]
        failures = [f"Job {job['job']} failed: {job['error']}" for job in self.jobs if "error" in job]
        reports = [found for file in files for found in collect.find([file.parent])]
        overview.write(collect.groups(reports), self.folder, "sweep", f"Sweep of {len(self.jobs)} jobs", failures)

    def _tables(self) -> list[str]:
        names = {name for job in self.jobs for name in job["overrides"]}
        varied = sorted(name for name in names if len({job["overrides"].get(name) for job in self.jobs}) > 1)
        groups: dict[str, list[dict[str, Any]]] = {}
        for job in self.jobs:
            protocol = job.get("protocol")
            title = "Failed" if "error" in job else protocol_words(protocol) if protocol else "Not evaluated"
            if tasks := job.get("tasks"):
                title = "; ".join([*([title] if protocol else []), tasks["protocol"]])
            groups.setdefault(title, []).append(job)
        return [f"## {title}\n\n" + _table(varied, jobs) for title, jobs in groups.items()]


def _table(varied: list[str], jobs: list[dict[str, Any]]) -> str:
    if "error" in jobs[0]:
        return table(["job", *varied, "error"], [[*_start(varied, job), job["error"]] for job in jobs])
    tasks = _TASKS if jobs[0].get("tasks") else {}
    head = ["job", *varied, "perplexity", "dense", *tasks, "zeros", "prune s", "total s", "peak GB"]
    rows = [
        [
            *_start(varied, job), _number(job["perplexity"]), _number(job["dense"]),
            *(_average(job, model) for model in tasks.values()), f"{job['sparsity']:.4f}",
            f"{job['seconds']['prune'] + job['seconds']['write']:.1f}", f"{job['seconds']['total']:.1f}",
            f"{job['peak_memory_bytes']['host'] / 1e9:.2f}",
        ]
        for job in jobs
    ]  # fmt: skip
    return table(head, rows)


#: Columns where a sweep runs zero-shot tasks -> model whose mean accuracy they show.
_TASKS = {"tasks": "pruned", "dense tasks": "dense"}


def _tasks(outcome: Report) -> dict[str, Any] | None:
    """Mean accuracies by model, and their protocol; None without tasks."""
    if outcome.zero_shot is None:
        return None
    average = {model: vars(score) for model, score in outcome.zero_shot.average.items()}
    return {"protocol": task_protocol(outcome.zero_shot), "average": average}


def _average(job: dict[str, Any], model: str) -> str:
    found = job["tasks"]["average"].get(model)
    return percent(Score(**found)) if found else ""


def _start(varied: list[str], job: dict[str, Any]) -> list[str]:
    return [str(job["job"]), *(job["overrides"].get(name, "") for name in varied)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
