"""How much worse a pruned model may be: for pipelines that must stop at a bad one."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Gate:
    """``max_ppl_ratio``: pruned over dense perplexity that is still allowed; null for no gate."""

    max_ppl_ratio: float | None = None

    def faults(self) -> list[str]:
        """What is wrong with the knobs, one line each; empty when all is well."""
        most = self.max_ppl_ratio
        if most is None or (math.isfinite(most) and most > 0):
            return []
        return [f"gate.max_ppl_ratio={most}: must be a number above 0, like 1.5, or null"]

    def objection(self, ratio: float | None) -> str | None:
        """Why a model of this perplexity ratio does not pass; None if it does."""
        if self.max_ppl_ratio is None or ratio is None or ratio <= self.max_ppl_ratio:
            return None
        return (
            f"The pruned model's perplexity is {ratio:.3f} times the dense one's, "
            f"gate.max_ppl_ratio={self.max_ppl_ratio:g} allows less."
        )
