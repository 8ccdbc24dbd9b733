"""Whole numbers of 2 bits."""

from __future__ import annotations

from dataclasses import dataclass

from ace_cli.core.registry import register
from ace_cli.methods.quantize.base import Integer


@register("quantize", "int2")
@dataclass
class Int2(Integer):
    """Codes -2 to 1 times a scale for each group: 2 bits a weight and 16 a group."""

    bits = 2
