"""One Markdown table from the reports of sweeps: rows are recipes, columns patterns, mean and spread over seeds.

python scripts/table.py FOLDER          FOLDER/SWEEP/JOB/report.json, as scripts/reproduce_smollm2.sh leaves them
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

Jobs = list[dict[str, Any]]
Cells = dict[str, dict[str, Jobs]]

#: Overrides that say where and how much, not how: the same in every row.
PROTOCOL = ("model", "calib", "calib.path", "calib.seed", "eval", "sparsity", "keep_checkpoint", "output_dir")


def main(folder: Path) -> None:
    """Refuses to set numbers of different protocols side by side."""
    cells: Cells = defaultdict(lambda: defaultdict(list))
    protocols = set()
    for file in sorted(folder.glob("*/*/report.json"), key=lambda file: file.stat().st_mtime):
        report = json.loads(file.read_text())
        protocols.add(report["perplexity"]["protocol"]["fingerprint"])
        cells[overrides(report)][report["method"]["pattern"]].append(report)
    if len(protocols) != 1:
        sys.exit(f"{len(protocols)} evaluation protocols in {folder}: these numbers do not compare.")
    print(render(cells))


def overrides(report: dict[str, Any]) -> str:
    """What the row's command says beyond the protocol."""
    words = [word for word in shlex.split(report["command"])[1:] if "=" in word]
    named = [(word.partition("=")[0], word) for word in words]
    return " ".join(word for name, word in named if name not in PROTOCOL and not name.startswith("eval."))


def render(cells: Cells) -> str:
    """Best of each column in bold."""
    patterns = sorted({pattern for row in cells.values() for pattern in row}, key=lambda text: (":" in text, text))
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
        counts = sorted({len(jobs) for jobs in row.values()})
        seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
        fastest = min(seconds(job) for jobs in row.values() for job in jobs)
        lines.append(f"| `{name}` | {numbers} | {seeds} | {fastest:.0f} |")
    return "\n".join(lines)


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
    main(Path(sys.argv[1]))
