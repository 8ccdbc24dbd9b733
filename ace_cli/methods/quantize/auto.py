"""As many bits as there is room for."""

from __future__ import annotations

from dataclasses import dataclass

from ace_cli.core.registry import register
from ace_cli.methods.quantize.base import Integer


@register("quantize", "auto")
@dataclass
class Auto(Integer):
    """The most bits with which the result meets ``target_gb``; nothing is pruned."""

    bits = 8
    of_target = True
