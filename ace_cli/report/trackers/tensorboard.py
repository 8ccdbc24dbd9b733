"""TensorBoard, through torch's writer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ace_cli.core.registry import register
from ace_cli.report.trackers.base import Tracker


@register("tracker", "tensorboard")
@dataclass
class TensorBoard(Tracker):
    """Scalars and hyperparameters, one run each in ``folder`` (null: the run's own folder)."""

    folder: str | None = None
    library = "tensorboard"

    def record(self, choices: dict[str, Any], numbers: dict[str, float], folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        place = Path(self.folder).expanduser() / folder.name if self.folder else folder / "tensorboard"
        known = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in choices.items()
        }
        with SummaryWriter(str(place)) as writer:
            for name, value in numbers.items():
                writer.add_scalar(name, value)
            writer.add_hparams(known, numbers, run_name=".")
