"""Markdown tables from the reports of sweeps: rows are recipes, columns patterns, mean and spread over seeds.

python scripts/table.py FOLDER [RECIPE]     FOLDER/SWEEP/JOB/report.json, as scripts/reproduce_smollm2.sh leaves them

One table for each evaluation protocol; then by how much each recipe differs from RECIPE (the overrides of a row; the
first row if it is not said), paired: of runs of one calibration text, seed and evaluation protocol, the mean of the
logarithm of the ratio of perplexities in per cent, and its standard error. Better is only what is beyond two of those.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Jobs = list[dict[str, Any]]
Cells = dict[str, dict[str, Jobs]]

#: Overrides that say where and how much, not how: the same in every row.
PROTOCOL = (
    "model", "calib", "calib.path", "calib.seed", "eval", "sparsity", "keep_checkpoint", "output_dir",
    "html", "samples.prompts", "observe.windows", "observe.tokens",
)  # fmt: skip


def main(folder: Path, base: str | None) -> None:
    """Numbers of different protocols never stand in one table, and are never paired."""
    jobs = [json.loads(file.read_text()) for file in sorted(folder.glob("*/*/report.json"), key=modified)]
    if not jobs:
        sys.exit(f"{folder} holds no SWEEP/JOB/report.json.")
    for protocol in dict.fromkeys(map(protocol_of, jobs)):
        print(render(cells_of([job for job in jobs if protocol_of(job) == protocol])), end="\n\n")
    cells = cells_of(jobs)
    base = base or next(iter(cells))
    if base not in cells:
        sys.exit(f"There is no recipe '{base}' in {folder}. Recipes: {', '.join(cells)}")
    print(differences(cells, base))


def modified(file: Path) -> float:
    return file.stat().st_mtime


def protocol_of(job: dict[str, Any]) -> str:
    return str(job["perplexity"]["protocol"]["fingerprint"])


def cells_of(jobs: Jobs) -> Cells:
    cells: Cells = defaultdict(lambda: defaultdict(list))
    for job in jobs:
        cells[overrides(job)][job["method"]["pattern"]].append(job)
    return cells


def overrides(report: dict[str, Any]) -> str:
    """What the row's command says beyond the protocol."""
    words = [word for word in shlex.split(report["command"])[1:] if "=" in word]
    named = [(word.partition("=")[0], word) for word in words]
    return " ".join(word for name, word in named if name not in PROTOCOL and not name.startswith("eval."))


def patterns_of(cells: Cells) -> list[str]:
    """The columns: ratios, then N:M."""
    return sorted({pattern for row in cells.values() for pattern in row}, key=lambda text: (":" in text, text))


def span(counts: Iterable[int]) -> str:
    """ "3", or "2-3"."""
    found = sorted(set(counts))
    return str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"


def render(cells: Cells) -> str:
    """Best of each column in bold."""
    patterns = patterns_of(cells)
    means = {name: {pattern: mean(jobs) for pattern, jobs in row.items()} for name, row in cells.items()}
    best = {pattern: min(row[pattern] for row in means.values() if pattern in row) for pattern in patterns}
    dense = next(job["perplexity"]["dense"] for row in cells.values() for jobs in row.values() for job in jobs)
    lines = [
        f"Dense {dense:.2f}.",
        "",
        "| recipe | " + " | ".join(patterns) + " | seeds | seconds |",
        "|---|" + "---|" * (len(patterns) + 2),
    ]
    for name, row in cells.items():
        numbers = " | ".join(cell(row[pattern], best[pattern]) if pattern in row else "" for pattern in patterns)
        seeds = span(map(len, row.values()))
        fastest = min(seconds(job) for jobs in row.values() for job in jobs)
        lines.append(f"| `{name}` | {numbers} | {seeds} | {fastest:.0f} |")
    return "\n".join(lines)


def differences(cells: Cells, base: str) -> str:
    """Per cent of perplexity beside ``base``, ± standard error, over pairs; marked where that is beyond two of them."""
    patterns = patterns_of(cells)
    lines = [
        f"Perplexity against `{base}` in per cent, paired, ± standard error; **<** better, > worse beyond two of them.",
        "",
        "| recipe | " + " | ".join(patterns) + " | pairs |",
        "|---|" + "---|" * (len(patterns) + 1),
    ]
    for name, row in cells.items():
        if name == base:
            continue
        paired = {pattern: pairs(row.get(pattern, []), cells[base].get(pattern, [])) for pattern in patterns}
        if counts := [len(values) for values in paired.values() if values]:
            many = span(counts)
            lines.append(f"| `{name}` | " + " | ".join(verdict(paired[p]) for p in patterns) + f" | {many} |")
    return "\n".join(lines)


def pairs(jobs: Jobs, others: Jobs) -> list[float]:
    """Of runs that differ in the recipe alone, log(perplexity / the other's)."""
    beside = {condition(job): job["perplexity"]["pruned"] for job in others}
    return [math.log(job["perplexity"]["pruned"] / beside[condition(job)]) for job in jobs if condition(job) in beside]


def condition(job: dict[str, Any]) -> tuple[str, ...]:
    words = dict(word.partition("=")[::2] for word in shlex.split(job["command"])[1:] if "=" in word)
    given = (words.get(name, "") for name in ("model", "model.path", "calib", "calib.path", "calib.seed"))
    return (*given, protocol_of(job))


def verdict(logs: list[float]) -> str:
    if not logs:
        return ""
    mean = statistics.fmean(logs)
    text = f"{100 * math.expm1(mean):+.1f}"
    if len(logs) < 2:
        return text
    error = statistics.stdev(logs) / math.sqrt(len(logs))
    sign = ("**<** " if mean < 0 else "> ") if abs(mean) > 2 * error else ""
    return f"{sign}{text} ± {100 * error:.1f}"


def cell(jobs: Jobs, best: float) -> str:
    values = [job["perplexity"]["pruned"] for job in jobs]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    text = f"{mean(jobs):.1f}"
    return (f"**{text}**" if mean(jobs) == best else text) + spread


def mean(jobs: Jobs) -> float:
    return statistics.fmean(job["perplexity"]["pruned"] for job in jobs)


def seconds(job: dict[str, Any]) -> float:
    """From the text to the checkpoint: windows, those the model writes on included, pruning and writing."""
    return float(sum(job["seconds"].get(name, 0.0) for name in ("calibrate", "prune", "write")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
