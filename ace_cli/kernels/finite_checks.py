"""Tensors that must be finite."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ace_cli.core.errors import AceError
from ace_cli.kernels.selection import all_finite


class FiniteChecks:
    """Expects tensors without NaN or Inf. On a CPU a fault is raised at once; a device is asked once, by ``settle``."""

    def __init__(self, device: torch.device) -> None:
        self._at_once = device.type == "cpu"
        self._expected: list[tuple[Tensor, str]] = []

    def expect(self, values: Tensor, what: str) -> None:
        """Note ``values``; ``what`` names them in the error."""
        if self._at_once:
            check_finite(values, what)
        else:
            self._expected.append((values.isfinite().all(), what))

    def settle(self) -> None:
        """Raise AceError for the first tensor that was not finite."""
        if self._expected:
            finite = torch.stack([flag for flag, _ in self._expected]).tolist()
            for fine, (_, what) in zip(finite, self._expected, strict=True):
                if not fine:
                    refuse(what)
        self._expected.clear()


def check_finite(values: Tensor, what: str) -> None:
    """AceError unless every value is finite."""
    if not all_finite(values):
        refuse(what)


def refuse(what: str) -> NoReturn:
    """Raise the AceError of ``what``."""
    hint = "The file may be damaged, or the compute dtype too narrow: try dtype=float32."
    raise AceError(f"NaN or Inf in {what}.", hint)
