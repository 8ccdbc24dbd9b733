"""Whole numbers of 4 bits."""

from __future__ import annotations

from dataclasses import dataclass

from ace_cli.core.registry import register
from ace_cli.methods.quantize.base import Integer


@register("quantize", "int4")
@dataclass
class Int4(Integer):
    """Codes -8 to 7 times a scale for each group: 4 bits a weight and 16 a group."""

    bits = 4
