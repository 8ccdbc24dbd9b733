"""What a sweep ends with and what ace-report makes: tables as text, and one page with the pictures of the paper."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ace_cli.report import plots
from ace_cli.report.collect import Group, Row, as_csv, as_json, as_markdown, varied
from ace_cli.report.facts import write_whole
from ace_cli.report.html import environment
from ace_cli.report.verdict import verdict_of

#: Runs of one table whose samples are shown.
MOST_SAMPLES = 24


def write(
    found: list[Group], folder: Path, name: str, title: str, failures: Sequence[str] = (), trials: bool = False
) -> None:
    """``name``.html with tables, pictures and samples, and the pictures as ``name``_*.png beside it.

    ``trials``: the runs are trials of a search, in their order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [_pictures(group, trials) for group in found]
    write_whole(folder / f"{name}.html", _page(found, pictures, title, failures, folder))
    for number, of_group in enumerate(pictures):
        for kind, _, draw in of_group:
            plots.png(folder / f"{name}_{kind}{number or ''}.png", draw)


def write_all(found: list[Group], folder: Path, name: str, title: str) -> None:
    """The page and pictures, and the same as Markdown, CSV and JSON."""
    write(found, folder, name, title)
    write_whole(folder / f"{name}.md", f"# {title}\n\n{as_markdown(found)}\n")
    write_whole(folder / f"{name}.csv", as_csv(found))
    write_whole(folder / f"{name}.json", as_json(found))


def _pictures(group: Group, trials: bool) -> list[tuple[str, str, plots.Draw]]:
    """(kind, title, picture): the paper's Table 20 as lines, and what a second of pruning buys."""
    pictures = []
    if trials and (values := [value for row in group.rows if (value := row.numbers["perplexity"]) is not None]):
        pictures.append(("trials", "Trials of the search, in their order", plots.trials_plot(values)))
    if lines := group.lengths():
        pictures.append(("length", "Perplexity against calibration length", plots.length_plot(lines)))
    for number, (machine, points) in enumerate(group.times().items()):
        title = f"Perplexity against pruning time on {machine}; a line joins the best of a pattern for their time"
        pictures.append((f"time{'-' + str(number) if number else ''}", title, plots.time_plot(points)))
    return pictures


def _page(
    found: list[Group], pictures: list[list[tuple[str, str, plots.Draw]]], title: str, failures: Sequence[str],
    folder: Path,
) -> str:  # fmt: skip
    parts = []
    for number, (group, of_group) in enumerate(zip(found, pictures, strict=True)):
        head, lines = group.cells()
        drawn = [(title, plots.svg(f"group{number}-{kind}", draw, 3.2)) for kind, title, draw in of_group]
        parts.append({
            "group": group, "head": head, "lines": lines, "pictures": drawn, "samples": _samples(group),
            "best": group.best(), "heat": _heat(group), "links": [_link(row, folder) for row in group.rows],
            "verdicts": [verdict_of(row.numbers["ratio"]) for row in group.rows],
            "models": list(dict.fromkeys(Path(row.choices["model"]).name for row in group.rows)),
        })  # fmt: skip
    text: str = environment().get_template("table.html.j2").render(title=title, parts=parts, failures=failures)
    return text


def _link(row: Row, folder: Path) -> str:
    """Where the run's own page is, seen from ``folder``; empty where there is none."""
    page = Path(row.report).with_name("report.html")
    return quote(os.path.relpath(page, folder)) if page.is_file() else ""


def _heat(group: Group) -> dict[str, Any] | None:
    """Metric by sparsity: mean perplexity, and the colour of its cell in per cent: the worst of a column has most.

    None where there are not two of each, or other choices vary, too.
    """
    names = [name for name in varied(group.rows) if name not in ("job", "calib.seed")]
    if sorted(names) != ["metric", "sparsity"]:
        return None
    cells: dict[tuple[str, str], list[float]] = {}
    for row in group.rows:
        if (value := row.numbers["perplexity"]) is not None:
            cells.setdefault((row.choices["metric"], row.choices["sparsity"]), []).append(value)
    mean = {place: statistics.fmean(values) for place, values in cells.items()}
    columns, metrics = (list(dict.fromkeys(place[end] for place in mean)) for end in (1, 0))
    ends = {c: [f(mean[m, c] for m in metrics if (m, c) in mean) for f in (min, max)] for c in columns}

    def cell(metric: str, column: str) -> tuple[str, int]:
        low, high = ends[column]
        value = mean.get((metric, column))
        return ("", 0) if value is None else (f"{value:.2f}", round(60 * (value - low) / ((high - low) or 1.0)))

    return {"columns": columns, "rows": [(m, [cell(m, c) for c in columns]) for m in metrics]}


def _samples(group: Group) -> dict[str, list[tuple[str, str]]]:
    """Prompt -> (who, text): each dense model once, then the runs."""
    texts: dict[str, list[tuple[str, str]]] = {}
    for row in group.rows[:MOST_SAMPLES]:
        for sample in row.samples:
            prompt = f"{sample['prompt']} ({'drawn' if sample['sampled'] else 'greedy'})"
            dense = (f"dense {row.choices['model']}", sample["dense"])
            known = texts.setdefault(prompt, [])
            known += [] if dense in known else [dense]
            known.append((_who(group, row), sample["pruned"]))
    return texts


def _who(group: Group, row: Row) -> str:
    shown = [f"{name} {row.choices[name]}" for name in group.varied if name in row.choices]
    return ", ".join(shown) or Path(row.report).parent.name
