"""No recovery."""

from __future__ import annotations

from dataclasses import dataclass

from ace_cli.core.registry import register
from ace_cli.recovery.base import Recovery


@register("recover", "none")
@dataclass
class NoRecovery(Recovery):
    """What pruning and repair left is the result."""

    acts = False
