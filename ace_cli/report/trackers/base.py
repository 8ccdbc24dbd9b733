"""What a tracker is."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Tracker:
    """Gets the report of a finished run. Its library is imported only then, and never required otherwise."""

    #: Module that must be there, and what installs it.
    library = ""
    package = ""

    def faults(self) -> list[str]:
        """What is wrong, one line each; a missing library is found here, before any work."""
        if self.library and importlib.util.find_spec(self.library) is None:
            return [f"tracker={self.library}: the package is missing; run: pip install {self.package or self.library}"]
        return []

    def record(self, choices: dict[str, Any], numbers: dict[str, float], folder: Path) -> None:
        """Take a run's choices and numbers, by name; ``folder`` holds its files. Raises what the library raises."""
        raise NotImplementedError


def choices_of(report: dict[str, Any]) -> dict[str, Any]:
    """The method, the model and the calibration of a report.json, flat: names to strings, numbers or None."""
    calibration = report["calibration"] or {}
    parts = {"model": report["model"]["path"], **report["method"]}
    parts |= {f"calib_{name}": calibration.get(name) for name in ("source", "n_samples", "seq_len", "seed")}
    flat: dict[str, Any] = {}
    for name, value in parts.items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def numbers_of(report: dict[str, Any]) -> dict[str, float]:
    """The results of a report.json, flat; what was not measured is left out."""
    zero_shot = (report["zero_shot"] or {}).get("average", {})
    groups = {
        "perplexity": {name: report["perplexity"][name] for name in ("dense", "pruned", "ratio")},
        "fidelity": {name: (report["fidelity"] or {}).get(name) for name in ("kl", "agreement", "cosine")},
        "sparsity": {name: report["sparsity"][name] for name in ("achieved", "model")},
        "seconds": report["seconds"],
        "peak_memory_bytes": report["peak_memory_bytes"],
        "zero_shot": {name: score["value"] for name, score in zero_shot.items()},
    }
    return {
        f"{group}/{name}": float(value)
        for group, values in groups.items()
        for name, value in values.items()
        if value is not None
    }
