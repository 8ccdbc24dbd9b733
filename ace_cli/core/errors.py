"""The one error a user can cause."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class AceError(Exception):
    """A fault the user can mend: shown as one line, ends the program with exit code 2.

    ``problem`` says what is wrong and what was found; ``hint`` says what to do.
    """

    def __init__(self, problem: str, hint: str = "") -> None:
        problem, hint = _printable(problem), _printable(hint)
        super().__init__(f"{problem.rstrip('. ')}. {hint}".strip())
        self.problem = problem
        self.hint = hint


class TransientError(AceError):
    """A fault that may be gone at the next try: what is finished stays on disk, to be continued."""


class BusyError(AceError):
    """Another process is doing it: there is nothing to mend, and nothing to record."""


def first_line(fault: BaseException) -> str:
    """What an exception of another library says, in one line; where that announces a cause, the cause with it."""
    first, *rest = (str(fault).strip() or type(fault).__name__).splitlines()
    while first.rstrip().endswith(":") and rest:
        first = f"{first.rstrip()} {rest.pop(0).strip()}".rstrip()
    return first


def wider_than(dtype: object, option: str = "dtype=") -> str:
    """What to do where numbers overflow in ``dtype``; ``option`` is how it is chosen."""
    if str(dtype).endswith("float32"):
        return "It is so in float32: the weights are at fault. Is the model whole?"
    return f"Try {option}float32."


def _printable(text: str) -> str:
    """Names come from files of others: nothing in them may move a terminal's cursor, or fill its screen."""
    if not text.isprintable():
        text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return re.sub(r"\S{600,}", lambda found: f"{found[0][:200]}...", text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A suggestion for a misspelt ``name``: "Did you mean 'x'? Available: ..."."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    suggestion = f"Did you mean '{close[0]}'? " if close else ""
    return f"{suggestion}Available: {', '.join(options)}."
