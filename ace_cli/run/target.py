"""``target_gb=`` and ``target_params=``: a size in place of a sparsity; what it means, and what goes with it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

_NAMES = ("target_gb", "target_params")
_THOUSANDS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}


@dataclass(frozen=True)
class Target:
    """What the result is to have at most: ``size`` bytes of weight files, or parameters.

    ``asked``: in the words of the command line; ``form``: the folder of the result that is measured. ``way`` and
    ``planned``: the choice that meets it and the size that this will have, once they are known (``run.meeting``).
    """

    asked: str
    size: int
    in_bytes: bool
    form: str
    way: str = ""
    planned: int = 0


def target_of(parts: Any) -> Target | None:
    """The target that a configuration without ``faults`` asks for."""
    if parts.target_gb is not None:
        return Target(f"target_gb={parts.target_gb}", int(Fraction(str(parts.target_gb)) * 10**9), True, _form(parts))
    if parts.target_params is not None:
        return Target(f"target_params={parts.target_params}", _count(parts.target_params) or 0, False, _form(parts))
    return None


def faults(parts: Any) -> list[str]:
    """What makes no sense with a target, or with none, one line each."""
    given = [name for name in _NAMES if getattr(parts, name) is not None]
    if not given:
        return (
            ["quantize=auto finds the bits for a target_gb: give one, or the bits (int4)"] if _finds_bits(parts) else []
        )
    name, found = given[0], []
    if len(given) > 1:
        found.append(f"{' and '.join(_NAMES)} are two sizes: give one")
    if parts.target_gb is not None and not parts.target_gb > 0:
        found.append(f"target_gb={parts.target_gb}: must be more than 0")
    if parts.target_params is not None and not _count(parts.target_params):
        found.append(f"target_params={parts.target_params}: give a number, such as 100M or 1.1B")
    found += [
        f"{name} finds how much goes: leave out {other}={getattr(parts, other)} ({other}=null where a file says it)"
        for other in ("sparsity", "keep")
        if getattr(parts, other) is not None
    ]
    return found + [f"{name}: {reason}" for reason in [_unmet(parts)] if reason]


def _unmet(parts: Any) -> str:
    """Why no choice could meet it; empty where one may."""
    if parts.unit.ranks and not parts.unit.factors:
        return "products are as large as the weights that they replace: add unit.factors=true"
    if parts.unit.cuts or parts.unit.ranks or parts.unit.slices:
        return ""
    if parts.target_gb is None:
        return "a zero is a parameter, too: use target_gb, or another unit"
    if not parts.pack and not _finds_bits(parts):
        return "zeros are stored like any weight: add pack=true, quantize=auto, or another unit (unit=channel)"
    if parts.pack and _finds_bits(parts):
        return "pack=true finds the sparsity, quantize=auto the bits: give the bits (quantize=int8), or leave out pack"
    if parts.pack == "zstd":
        return "what zstd makes of the values is known when it is done: use pack=true"
    return ""


def _form(parts: Any) -> str:
    """The folder whose size counts."""
    if parts.unit.ranks:
        return "factors"
    if parts.unit.cuts or parts.unit.slices:
        return "checkpoint"
    return "packed" if parts.pack else "quantised" if parts.quantize.acts else "checkpoint"


def _finds_bits(parts: Any) -> bool:
    return bool(parts.quantize.of_target)


def _count(value: object) -> int | None:
    """ "100M" -> 100000000; None for what is no number of parameters."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)([kMB]?)", str(value).strip())
    return int(Fraction(found[1]) * _THOUSANDS[found[2]]) if found else None
