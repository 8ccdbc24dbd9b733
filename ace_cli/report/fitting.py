"""Tables that fit a screen: where there is no room for all columns some are left out, or each row stands upright.

No digit and no name is ever cut.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

#: Of the frame: two spaces and a line beside each column.
_BESIDE = 3


def fitting(
    head: Sequence[str], rows: Sequence[Sequence[str]], width: int, *, left: int = 1, drop: Sequence[str] = (),
    best: Collection[tuple[int, str]] = (), title: str | None = None,
) -> list[Any]:  # fmt: skip
    """What to print, line by line, for a screen of ``width`` letters.

    The first ``left`` columns are words, the others numbers. ``drop``: columns that may be left out, the first one
    first. ``best``: (row, column) of numbers that are marked.
    """
    shown, gone = list(head), []
    cells = {name: [row[place] for row in rows] for place, name in enumerate(head)}
    marked = {column for _, column in best}
    for name in marked & cells.keys():
        cells[name] = [each + ("*" if (at, name) in best else " ") for at, each in enumerate(cells[name])]
    for name in drop:
        if _width(shown, cells) <= width:
            break
        if name in shown:
            shown.remove(name)
            gone.append(name)
    upright = _width(shown, cells) > width
    if upright:
        shown, gone = list(head), []
    words = head[:left]
    made = [_upright(shown, cells, len(rows), title)] if upright else [_table(shown, cells, len(rows), words, title)]
    notes = ["* best of its column"] if marked & set(shown) else []
    notes += [f"no room here for {', '.join(gone)}"] if gone else []
    return [*made, *([Text("; ".join(notes), style="dim")] if notes else [])]


def _width(shown: Sequence[str], cells: dict[str, list[str]]) -> int:
    return 1 + sum(_BESIDE + max(map(cell_len, [name, *cells[name]])) for name in shown)


def _table(
    shown: Sequence[str], cells: dict[str, list[str]], count: int, words: Sequence[str], title: str | None
) -> Table:
    table = Table(title=title, title_justify="left")
    for name in shown:
        table.add_column(name, justify="left" if name in words else "right", no_wrap=True)
    for row in range(count):
        table.add_row(*(_cell(cells[name][row]) for name in shown))
    return table


def _upright(shown: Sequence[str], cells: dict[str, list[str]], count: int, title: str | None) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in range(count):
        if row:
            table.add_row()
        for name in shown:
            if cells[name][row].strip():
                table.add_row(name, _cell(cells[name][row]))
    return table


def _cell(text: str) -> Text:
    return Text(text, style="bold" if text.endswith("*") else "")
