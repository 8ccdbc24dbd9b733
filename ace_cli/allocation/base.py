"""What an allocation is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ace_cli.patterns import Pattern


@dataclass
class Allocation:
    """The pattern asked for -> the pattern of each slot."""

    def faults(self) -> list[str]:
        """What is wrong with the knobs, one line each; empty when all is well."""
        return []

    def patterns(self, pattern: Pattern, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Pattern]:
        """Slot name -> its pattern; ``shapes`` gives each slot's (rows, columns) in the order of the model."""
        raise NotImplementedError
