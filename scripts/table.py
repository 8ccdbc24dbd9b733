"""One Markdown table from the sweeps in a folder: rows are recipes, columns patterns, mean and spread over seeds.

python scripts/table.py FOLDER
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

Cells = dict[str, dict[str, list[dict[str, Any]]]]


def main(folder: Path) -> None:
    cells: Cells = defaultdict(lambda: defaultdict(list))
    protocols = set()
    for sweep in sorted(folder.glob("*/sweep.json"), key=lambda file: file.stat().st_mtime):
        for job in json.loads(sweep.read_text())["jobs"]:
            if "error" in job:
                print(f"{sweep.parent.name} job {job['job']}: {job['error']}", file=sys.stderr)
                continue
            protocols.add(json.dumps(job["protocol"], sort_keys=True))
            name = job["overrides"]["metric"] if sweep.parent.name == "metrics" else sweep.parent.name
            cells[name][job["overrides"]["sparsity"]].append(job)
    if len(protocols) != 1:
        sys.exit(f"{len(protocols)} evaluation protocols in {folder}: these numbers do not compare.")
    print(render(cells))


def render(cells: Cells) -> str:
    patterns = list(dict.fromkeys(pattern for row in cells.values() for pattern in row))
    means = {name: {p: mean(row[p], "perplexity") for p in row} for name, row in cells.items()}
    best = {p: min(row[p] for row in means.values() if p in row) for p in patterns}
    dense = next(job["dense"] for row in cells.values() for jobs in row.values() for job in jobs)
    lines = [
        f"Dense {dense:.2f}.",
        "",
        "| recipe | " + " | ".join(patterns) + " | seconds |",
        "|---|" + "---|" * (len(patterns) + 1),
    ]
    for name, row in cells.items():
        numbers = [cell(row.get(p, []), best[p]) for p in patterns]
        seconds = statistics.median(
            job["seconds"]["prune"] + job["seconds"]["write"] for jobs in row.values() for job in jobs
        )
        lines.append(f"| {name} | " + " | ".join(numbers) + f" | {seconds:.0f} |")
    return "\n".join(lines)


def cell(jobs: list[dict[str, Any]], best: float) -> str:
    if not jobs:
        return ""
    values = [job["perplexity"] for job in jobs]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    text = f"{mean(jobs, 'perplexity'):.1f}"
    return (f"**{text}**" if mean(jobs, "perplexity") == best else text) + spread


def mean(jobs: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(job[key] for job in jobs)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
