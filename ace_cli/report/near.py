"""Runs beside a run: the same model measured by the same protocol, in the folders next to it; where it stands.

A run knows those that were finished before it; a sweep, once it is done, tells each of its pages about all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ace_cli.core.errors import AceError
from ace_cli.report import plots
from ace_cli.report.collect import Row, find, groups
from ace_cli.report.facts import write_whole
from ace_cli.report.html import BEGIN, END, environment, framed

#: Of the folders beside a run, so many of the latest are read.
MOST = 32


def beside(folder: Path) -> list[Row]:
    """The run in ``folder`` and those in the folders next to it, as far as they can be read."""
    files = sorted(folder.parent.glob("*/report.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    found: list[Row] = []
    for file in files[:MOST]:
        try:
            found += find([file.parent], below=False)
        except AceError:  # of another version, or being written
            continue
    return found


def place(rows: Sequence[Row], folder: Path) -> str:
    """The picture of the runs in ``rows`` that compare with the one in ``folder``, as HTML; empty for one alone."""
    own = next((row for row in rows if Path(row.report).parent == folder), None)
    if own is None or own.numbers["ratio"] is None:
        return ""
    (group,) = groups([row for row in rows if (row.protocol, row.model) == (own.protocol, own.model)])
    lines = group.methods("ratio")
    if sum(len(of) for of in lines.values()) < 2:
        return ""
    here = (own.choices["sparsity"], own.numbers["ratio"])
    drawn = plots.svg("near", plots.place(lines, here), 2.8)
    text: str = environment().get_template("near.html.j2").render(count=len(group.rows), picture=drawn)
    return text


def refresh(rows: Sequence[Row]) -> None:
    """Put the picture of all ``rows`` into the page of each, where it has one."""
    for row in rows:
        page = Path(row.report).with_name("report.html")
        try:
            text = page.read_text(encoding="utf-8")
        except OSError:
            continue
        new = re.sub(f"{BEGIN}.*?{END}", lambda _, row=row: framed(place(rows, Path(row.report).parent)), text,  # type: ignore[misc]
                     count=1, flags=re.DOTALL)  # fmt: skip
        write_whole(page, new)
