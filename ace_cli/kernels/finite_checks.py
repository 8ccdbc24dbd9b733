"""Checks that tensors hold no NaN and no Inf, without waiting for a GPU at each of them."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ace_cli.core.errors import AceError
from ace_cli.kernels.selection import all_finite


class FiniteChecks:
    """Collects checks that tensors are finite.

    On a CPU each check is made at once. On a GPU reading a result makes the program wait until the GPU has caught up;
    so the results stay there until ``settle`` reads them all in one go.
    """

    def __init__(self, device: torch.device) -> None:
        self._at_once = device.type == "cpu"
        self._expected: list[tuple[Tensor, str]] = []

    def expect(self, values: Tensor, what: str) -> None:
        """Check ``values`` now (CPU) or with the next ``settle`` (GPU); ``what`` names them in the error.

        Raises AceError, on a CPU, if they are not finite.
        """
        if self._at_once:
            check_finite(values, what)
        else:
            self._expected.append((values.isfinite().all(), what))

    def settle(self) -> None:
        """Read the results of all checks since the last call; a GPU is waited for once.

        Raises AceError for the first tensor that was not finite.
        """
        if self._expected:
            finite = torch.stack([flag for flag, _ in self._expected]).tolist()
            for fine, (_, what) in zip(finite, self._expected, strict=True):
                if not fine:
                    refuse(what)
        self._expected.clear()


def check_finite(values: Tensor, what: str) -> None:
    """Raise AceError unless every value is finite."""
    if not all_finite(values):
        refuse(what)


def refuse(what: str) -> NoReturn:
    """Raise the AceError that says that ``what`` is not finite."""
    hint = "The file may be damaged, or the compute dtype too narrow (dtype=float32 is the widest)."
    raise AceError(f"NaN or Inf in {what}.", hint)
