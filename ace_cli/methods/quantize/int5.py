"""Whole numbers of 5 bits."""

from __future__ import annotations

from dataclasses import dataclass

from ace_cli.core.registry import register
from ace_cli.methods.quantize.base import Integer


@register("quantize", "int5")
@dataclass
class Int5(Integer):
    """Codes -16 to 15 times a scale for each group: 5 bits a weight and 16 a group."""

    bits = 5
