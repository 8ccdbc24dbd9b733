"""Loops that numba compiles for the CPU at hand.

Compiled when first called, half a second to three, and kept on disk beside the file or, where that cannot be written,
in the user's cache. What helps the compiler to vector instructions: flat arrays, unsigned indices, constant lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from numpy.typing import NDArray

_Function = TypeVar("_Function", bound=Callable[..., Any])
Array = NDArray[Any]


def compiled(function: _Function) -> _Function:
    """``function``, compiled on its first call; without Python's lock while it runs."""
    try:
        return cast(_Function, numba.njit(nogil=True, cache=True)(function))
    except RuntimeError:  # no folder to keep it in
        return cast(_Function, numba.njit(nogil=True)(function))
