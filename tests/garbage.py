"""The garbage collector waits for all imports: nothing of them is garbage, and looking at it takes seconds."""

from __future__ import annotations

import gc

gc.disable()


def begin() -> None:
    """What is there stays, and is never looked at again; from now on garbage is collected."""
    gc.collect()
    gc.freeze()
    gc.enable()
