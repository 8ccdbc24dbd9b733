"""MLflow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ace_cli.core.registry import register
from ace_cli.report.trackers.base import Tracker


@register("tracker", "mlflow")
@dataclass
class MLflow(Tracker):
    """One run in ``experiment``, with the reports as artifacts; the server is the library's own configuration."""

    experiment: str = "ace-prune"
    library = "mlflow"

    def record(self, choices: dict[str, Any], numbers: dict[str, float], folder: Path) -> None:
        import mlflow

        mlflow.set_experiment(self.experiment)
        with mlflow.start_run(run_name=folder.name):
            mlflow.log_params(choices)
            mlflow.log_metrics(numbers)
            for name in ("report.json", "report.md", "report.html"):
                if (folder / name).is_file():
                    mlflow.log_artifact(str(folder / name))
