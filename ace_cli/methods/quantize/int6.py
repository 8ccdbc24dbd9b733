"""Whole numbers of 6 bits."""

from __future__ import annotations

from dataclasses import dataclass

from ace_cli.core.registry import register
from ace_cli.methods.quantize.base import Integer


@register("quantize", "int6")
@dataclass
class Int6(Integer):
    """Codes -32 to 31 times a scale for each group: 6 bits a weight and 16 a group."""

    bits = 6
