"""No evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from ace_cli.registry import register


@register("eval", "none")
@dataclass
class NoEvaluation:
    """Prune only."""

    def faults(self) -> list[str]:
        """Nothing to set, nothing to get wrong."""
        return []
