"""How every command ends: what the user can mend is one line on standard error and exit code 2."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec

from ace_cli.core import workers
from ace_cli.core.console import unwritten
from ace_cli.core.errors import AceError

MEND = 2
P = ParamSpec("P")


def command(program: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Make ``main`` a command of this name: every AceError, OSError and Ctrl-C that leaves it ends in one line."""

    def make(main: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(main)
        def start(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                _check_working_folder()
                try:
                    main(*args, **kwargs)
                finally:
                    _flush()  # here at the latest a reader that went away, or a full disk, shows
            except AceError as fault:
                sys.exit(mend(program, fault))
            except OSError as fault:
                sys.exit(mend(program, of_system(fault)))
            except KeyboardInterrupt:
                sys.exit(mend(program, AceError("Interrupted.")))

        return start

    return make


@contextmanager
def stopping_at_once(program: str) -> Iterator[None]:
    """While large libraries are imported: Ctrl-C ends the process, in one line. Nothing is lost: nothing was begun.

    An exception in the middle of their imports leaves them in pieces, and comes out as anything.
    """

    def stop(*_: object) -> None:
        print(f"{program}: Interrupted. Nothing was begun.", file=sys.stderr, flush=True)
        os._exit(MEND)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def mend(program: str, fault: AceError) -> int:
    """Say what is wrong, once for all workers; returns the exit code, which no restart of theirs will change."""
    if workers.speaks():
        print(f"{program}: {fault}", file=sys.stderr)
    workers.remember_end(MEND)
    return MEND


def of_system(fault: OSError) -> AceError:
    """What the system refused, in one line; of standard output, where that is what cannot be written."""
    if fault.filename is None:
        try:
            print(flush=True)  # an empty line shows whether it is standard output that fails
        except OSError:
            return unwritten(fault)
    if isinstance(fault, FileExistsError):
        return AceError(f"{fault.filename} is a file, where a folder is needed", "Name another one.")
    return AceError(f"{fault.strerror or fault}: {fault.filename}" if fault.filename else str(fault.strerror or fault))


def _flush() -> None:
    try:
        sys.stdout.flush()
    except OSError as fault:
        raise unwritten(fault) from fault


def _check_working_folder() -> None:
    try:
        Path.cwd()
    except OSError:
        raise AceError("The folder this was started in is gone", "Change to one that exists.") from None
