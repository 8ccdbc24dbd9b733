"""The garbage collector waits for all imports: nothing of them is garbage, and looking at it takes seconds."""

from __future__ import annotations

import gc

gc.disable()


def begin() -> None:
    """What is there stays, and is never looked at again; from now on garbage is collected."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(700, 10, 50)  # what tests import later is looked at as well, each time: seldom will do
    gc.enable()
