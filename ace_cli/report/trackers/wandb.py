"""Weights & Biases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ace_cli.core.registry import register
from ace_cli.report.trackers.base import Tracker


@register("tracker", "wandb")
@dataclass
class WandB(Tracker):
    """One run in ``project``; where and as whom is the library's own configuration (``WANDB_MODE=offline``)."""

    project: str = "ace-prune"
    library = "wandb"

    def record(self, choices: dict[str, Any], numbers: dict[str, float], folder: Path) -> None:
        import wandb

        run = wandb.init(project=self.project, name=folder.name, config=choices, dir=str(folder))
        failed = 1
        try:
            run.log(numbers)
            failed = 0
        finally:  # a run that is not finished is shown as running for ever, and is the next one's
            run.finish(exit_code=failed)
