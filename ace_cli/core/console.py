"""Standard output that cannot be written: a reader that went away, a disk that is full."""

from __future__ import annotations

import contextlib
import os
import sys

from ace_cli.core.errors import TransientError


def unwritten(fault: OSError) -> TransientError:
    """``fault``, which writing to standard output raised, in a sentence. All later output goes nowhere.

    Python would otherwise try to write what is left when it ends, and fail again.
    """
    with contextlib.suppress(OSError, ValueError):  # where standard output is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return TransientError(
        f"Standard output cannot be written: {fault.strerror or fault}",
        "Send it where there is room for all of it, and repeat the command.",
    )
