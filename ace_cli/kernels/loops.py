"""What neither torch nor numpy does in one pass, in loops compiled for a CPU."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

_failed: dict[str, str] = {}


@cache
def load(name: str) -> ModuleType | None:
    """The module of this name here; None where numba is missing, or refuses this Python or numpy (``why_not``)."""
    try:
        return import_module(f"{__package__}.{name}")
    except Exception as fault:  # a numba that does not fit fails in as many ways as it has layers
        _failed[name] = " ".join(str(fault).split()) or type(fault).__name__
        return None


def why_not() -> str:
    """Why no loops can be compiled here; empty where they can. Imports numba: 0.3 s and 150 MB."""
    return "" if load("compiled") is not None else _failed["compiled"]
