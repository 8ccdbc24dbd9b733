"""``ace-verify FOLDER``: does a pruned checkpoint still hold its pattern?"""

from __future__ import annotations

import sys
from pathlib import Path

from ace_cli.cli.ending import LOADING, command
from ace_cli.cli.flags import Flags


@command("ace-verify")
def main() -> None:
    """Exits 0 if every pruned weight holds its pattern, 1 at the first violation, 2 if the folder cannot be read."""
    folder: Path = parser().parse_args().folder
    from ace_cli.report.terminal import Terminal

    terminal = Terminal()
    with terminal.waiting(LOADING):
        from ace_cli.model.pruned import MANIFEST, Violation, verify

    if not (folder / MANIFEST).exists() and (folder / "checkpoint" / MANIFEST).exists():
        folder /= "checkpoint"
    try:
        with terminal.waiting(f"reading {folder.name}"):
            count = verify(folder)
        print(f"{folder}: {count} pruned weights hold their pattern.")
    except Violation as violation:
        print(f"ace-verify: {violation}", file=sys.stderr)
        sys.exit(1)


def parser() -> Flags:
    """Of the command's arguments."""
    made = Flags("ace-verify", description="Re-read a pruned checkpoint and check its pattern.")
    made.add_argument("folder", type=Path, help="of an ace-prune run, or its checkpoint")
    return made


if __name__ == "__main__":
    main()
