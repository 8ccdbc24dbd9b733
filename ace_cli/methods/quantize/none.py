"""No rounding."""

from __future__ import annotations

from dataclasses import dataclass

from ace_cli.core.registry import register
from ace_cli.methods.quantize.base import Quantize


@register("quantize", "none")
@dataclass
class NoQuantize(Quantize):
    """Weights stay in the numbers they came in."""
