"""Whole numbers of 3 bits."""

from __future__ import annotations

from dataclasses import dataclass

from ace_cli.core.registry import register
from ace_cli.methods.quantize.base import Integer


@register("quantize", "int3")
@dataclass
class Int3(Integer):
    """Codes -4 to 3 times a scale for each group: 3 bits a weight and 16 a group."""

    bits = 3
