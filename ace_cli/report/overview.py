"""What a sweep ends with and what ace-report makes: tables as text, and one page with the pictures of the paper."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ace_cli.report import plots
from ace_cli.report.collect import Group, Point, Row, as_csv, as_json, as_markdown
from ace_cli.report.facts import write_whole
from ace_cli.report.html import environment, model_name
from ace_cli.report.verdict import verdict_of

#: Per cent of its colour that a cell has that is twice as bad as the best.
_DARKEST = 60
#: More bars than anybody compares.
MOST_BARS = 40
#: Runs of one table whose samples are shown.
MOST_SAMPLES = 24


@dataclass(frozen=True)
class Picture:
    """``kind`` names its file, ``title`` says what it shows; ``height`` in inches."""

    kind: str
    title: str
    draw: plots.Draw
    height: float = 3.2


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
        for picture in of_group:
            file = folder / f"{name}_{picture.kind}{number or ''}.png"
            plots.png(file, picture.draw, 1.25 * picture.height)


def write_all(found: list[Group], folder: Path, name: str, title: str) -> None:
    """The page and pictures, and the same as Markdown, CSV and JSON."""
    write(found, folder, name, title)
    write_whole(folder / f"{name}.md", f"# {title}\n\n{as_markdown(found)}\n")
    write_whole(folder / f"{name}.csv", as_csv(found))
    write_whole(folder / f"{name}.json", as_json(found))


def _pictures(group: Group, trials: bool) -> list[Picture]:
    """What is to be seen of the runs of one table; nothing of a single one."""
    pictures: list[Picture] = []
    if trials and (values := [value for row in group.rows if (value := row.numbers["perplexity"]) is not None]):
        pictures.append(Picture("trials", "Trials of the search, in their order", plots.trials_plot(values)))
    if lines := group.lengths():
        pictures.append(Picture("length", "Perplexity against calibration length", plots.length_plot(lines)))
    bars = group.methods("perplexity")
    if not trials and 1 < sum(map(len, bars.values())) <= MOST_BARS:
        dense = next((value for row in group.rows if (value := row.numbers["dense"]) is not None), None)
        height, title = plots.grouped_height(bars), "Perplexity by pattern and method"
        pictures.append(Picture("bars", title, plots.grouped(bars, dense), height))
    ratios = group.methods("ratio")
    if len(ratios) > 1:
        pictures.append(Picture("sparsity", "Quality against sparsity", plots.against_sparsity(ratios)))
    for number, (machine, points) in enumerate(group.times().items()):
        title = f"Perplexity against pruning time on {machine}; a line joins the best of a pattern for their time"
        drawn = plots.front_plot(points, "seconds to prune and write")
        kind = f"time{'-' + str(number) if number else ''}"
        pictures.append(Picture(kind, title, drawn, _height(points)))
    what, points = group.sizes()
    if len(points) > 1:
        title = "Perplexity against size; a line joins the best of a pattern for their size"
        pictures.append(Picture("size", title, plots.front_plot(points, what), _height(points)))
    return pictures


def _height(points: Sequence[Point]) -> float:
    """Room for all names."""
    return min(5.5, 3.2 + 0.1 * max(0, len(points) - 8))


def _page(
    found: list[Group], pictures: list[list[Picture]], title: str, failures: Sequence[str],
    folder: Path,
) -> str:  # fmt: skip
    parts = []
    for number, (group, of_group) in enumerate(zip(found, pictures, strict=True)):
        head, lines = group.cells()
        drawn = [(each.title, plots.svg(f"group{number}-{each.kind}", each.draw, each.height)) for each in of_group]
        parts.append({
            "group": group, "head": head, "lines": lines, "pictures": drawn, "samples": _samples(group),
            "best": group.best(), "heat": _heat(group), "links": [_link(row, folder) for row in group.rows],
            "verdicts": [verdict_of(row.numbers["ratio"]) for row in group.rows],
            "models": list(dict.fromkeys(model_name(row.choices["model"]) for row in group.rows)),
        })  # fmt: skip
    text: str = environment().get_template("table.html.j2").render(title=title, parts=parts, failures=failures)
    return text


def _link(row: Row, folder: Path) -> str:
    """Where the run's own page is, seen from ``folder``; empty where there is none."""
    page = Path(row.report).with_name("report.html")
    return quote(os.path.relpath(page, folder)) if page.is_file() else ""


def _heat(group: Group) -> dict[str, Any] | None:
    """Method by pattern: mean perplexity, the colour of its cell in per cent: how much worse than its column's best.

    None where there are not two of each.
    """
    mean = group.methods("perplexity")
    methods = list(dict.fromkeys(name for of in mean.values() for name in of))
    if len(mean) < 2 or len(methods) < 2:
        return None

    def cell(method: str, of_pattern: Mapping[str, float]) -> tuple[str, int]:
        if (value := of_pattern.get(method)) is None:
            return "", 0
        return f"{value:.2f}", min(_DARKEST, round(_DARKEST * math.log2(value / min(of_pattern.values()))))

    return {"columns": list(mean), "rows": [(m, [cell(m, of) for of in mean.values()]) for m in methods]}


def _samples(group: Group) -> dict[str, list[tuple[str, str]]]:
    """Prompt -> (who, text): each dense model once, then the runs; to be shown side by side."""
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
    shown = [row.choices[name] for name in group.varied if row.choices.get(name, "none") != "none" and name != "job"]
    return ", ".join(shown) or Path(row.report).parent.name
