"""How every command ends: what the user can mend is one line on standard error and exit code 2."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec

from ace_cli.core import workers
from ace_cli.core.console import unwritten
from ace_cli.core.errors import AceError, first_line

LOST, MEND = 1, 2
#: What takes every command that computes its first seconds.
LOADING = "loading torch and transformers"
#: Files of ours, and what files of models have in their path.
_OURS, _MODELS = Path(__file__).parents[1], os.path.join("transformers", "models", "")  # noqa: PTH118
P = ParamSpec("P")


def command(program: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Make ``main`` a command of this name: every AceError, OSError and Ctrl-C that leaves it ends in one line."""

    def make(main: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(main)
        def start(*args: P.args, **kwargs: P.kwargs) -> None:
            if (code := workers.ended()) is not None:
                sys.exit(code)
            try:
                _check_working_folder()
                try:
                    main(*args, **kwargs)
                finally:
                    _flush()  # here at the latest a reader that went away, or a full disk, shows
            except workers.LostWorker as fault:
                sys.exit(lost(program, fault))
            except AceError as fault:
                sys.exit(mend(program, fault))
            except OSError as fault:
                sys.exit(mend(program, of_system(fault)))
            except KeyboardInterrupt:
                sys.exit(mend(program, AceError("Interrupted.")))
            except Exception as fault:
                if (line := of_model(fault)) is None:
                    raise
                sys.exit(mend(program, line))

        return start

    return make


@contextmanager
def stopping_at_once(program: str) -> Iterator[None]:
    """While large libraries are imported: Ctrl-C ends the process, in one line. Nothing is lost: nothing was begun.

    An exception in the middle of their imports leaves them in pieces, and comes out as anything.
    """

    def stop(*_: object) -> None:
        if sys.stdout.isatty():
            print("\r\x1b[2K\x1b[?25h", end="", flush=True)  # the bar goes, the cursor that it hid comes back
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


def lost(program: str, fault: workers.LostWorker) -> int:
    """Others ended. If one of them said why, that is all; otherwise starting again goes on from what is finished."""
    if workers.another_spoke():
        workers.remember_end(MEND)
        return MEND
    print(f"{program}: {fault}", file=sys.stderr)
    return LOST


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


def of_model(fault: Exception) -> AceError | None:
    """What a model's own code ended in, in one line; None where it was not a model's code.

    A config.json may hold values of the right type with which the code of its class cannot compute.
    """
    frames = traceback.extract_tb(fault.__traceback__)
    ours = max((place for place, frame in enumerate(frames) if _OURS in Path(frame.filename).parents), default=-1)
    theirs = [frame for frame in frames[ours + 1 :] if _MODELS in frame.filename]
    if not theirs:
        return None
    where = f"{Path(theirs[-1].filename).name}, line {theirs[-1].lineno}"
    return AceError(
        f"The model's own code fails: {type(fault).__name__}: {first_line(fault)} ({where})",
        "Does transformers alone run this folder? If not, look at that value in its config.json; if so, report this.",
    )


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
