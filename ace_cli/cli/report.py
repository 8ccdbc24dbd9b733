"""``ace-report``: many runs or sweeps in one table, with the paper's pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ace_cli.cli.ending import command
from ace_cli.cli.flags import Flags
from ace_cli.report.collect import Group, as_csv, as_json, as_markdown, find, groups


@command("ace-report")
def main(arguments: Sequence[str] | None = None) -> None:
    """Exits 0 when done, 2 where a folder holds no report."""
    options = parser().parse_args(arguments)
    _show(options.folders, options.format, options.out)


def parser() -> Flags:
    """Of the command's arguments."""
    made = Flags("ace-report", description="Runs side by side, a table for each protocol.")
    made.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a run, a sweep, or many of them")
    made.add_argument("--format", choices=("terminal", "md", "csv", "json"), default="terminal", help="of the output")
    made.add_argument("--out", type=Path, help="also write overview.html, .md, .csv, .json and the pictures here")
    return made


def _show(folders: Sequence[Path], form: str, out: Path | None) -> None:
    from ace_cli.report import overview
    from ace_cli.report.terminal import Terminal

    found = groups(find(folders))
    if form == "terminal":
        Terminal().groups(found)
    else:
        forms: dict[str, Callable[[list[Group]], str]] = {"md": as_markdown, "csv": as_csv, "json": as_json}
        print(forms[form](found).rstrip("\n"))
    if out is not None:
        with Terminal().waiting("writing overview.html"):
            overview.write_all(found, out, "overview", f"{sum(len(group.rows) for group in found)} runs")
        print(f"Written: {out / 'overview.html'}", file=sys.stderr)


if __name__ == "__main__":
    main()
