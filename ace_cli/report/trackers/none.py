"""No tracker: the files of the run are all there is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ace_cli.core.registry import register
from ace_cli.report.trackers.base import Tracker


@register("tracker", "none")
@dataclass
class NoTracker(Tracker):
    """Nothing goes anywhere."""

    def record(self, choices: dict[str, Any], numbers: dict[str, float], folder: Path) -> None:
        return None
