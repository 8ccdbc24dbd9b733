"""Whole numbers of 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

from ace_cli.core.registry import register
from ace_cli.methods.quantize.base import Integer


@register("quantize", "int8")
@dataclass
class Int8(Integer):
    """Codes -128 to 127 times a scale for each group: 8 bits a weight and 16 a group."""

    bits = 8
