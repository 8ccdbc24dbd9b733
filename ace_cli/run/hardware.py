"""Machines that are not here, as a card describes them: for a plan of what a run would take there."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """Rates are per second, and of one worker unless said otherwise.

    ``workers`` on one machine; ``matmul`` and ``float32``: operations in products of the dtype that is computed in, and
    in float32; ``memory``: bytes; ``link``: bytes from other workers; ``read``, ``write``: bytes of a machine's disk.
    """

    device: str
    workers: int
    matmul: float
    float32: float
    memory: float
    memory_gb: float
    link: float
    read: float
    write: float

    def faults(self) -> list[str]:
        """What is wrong with the card, one line each; empty when all is well."""
        found = [] if self.device in ("cpu", "cuda") else [f"hardware: device={self.device}: must be cpu or cuda"]
        for name, value in vars(self).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name != "device" and not (number and 0 < value < math.inf):
                found.append(f"hardware: {name}={value}: must be a number above 0")
        if not found and self.workers != int(self.workers):
            found.append(f"hardware: workers={self.workers}: must be a whole number")
        return found
