"""One Markdown table from the reports of sweeps: rows are recipes, columns patterns, mean and spread over seeds.

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
    for file in sorted(folder.glob("*/*/report.json"), key=lambda file: file.stat().st_mtime):
        report = json.loads(file.read_text())
        protocols.add(json.dumps(report["perplexity"]["protocol"], sort_keys=True))
        sweep = file.parent.parent.name
        name = report["method"]["metric"] if sweep == "metrics" else sweep
        cells[name][report["method"]["pattern"]].append(report)
    if len(protocols) != 1:
        sys.exit(f"{len(protocols)} evaluation protocols in {folder}: these numbers do not compare.")
    print(render(cells))


def render(cells: Cells) -> str:
    patterns = list(dict.fromkeys(pattern for row in cells.values() for pattern in row))
    means = {name: {p: mean(row[p]) for p in row} for name, row in cells.items()}
    best = {p: min(row[p] for row in means.values() if p in row) for p in patterns}
    dense = next(job["perplexity"]["dense"] for row in cells.values() for jobs in row.values() for job in jobs)
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
    values = [job["perplexity"]["pruned"] for job in jobs]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    text = f"{mean(jobs):.1f}"
    return (f"**{text}**" if mean(jobs) == best else text) + spread


def mean(jobs: list[dict[str, Any]]) -> float:
    return statistics.fmean(job["perplexity"]["pruned"] for job in jobs)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
