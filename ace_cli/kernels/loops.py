"""What neither torch nor numpy does in one pass, in loops compiled for a CPU."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType


@cache
def load(name: str) -> ModuleType | None:
    """The module of this name here; None where numba is not installed, which comes later than a new Python does."""
    try:
        return import_module(f"{__package__}.{name}")
    except ImportError:
        return None
