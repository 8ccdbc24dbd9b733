"""What is read out of the messages of Hydra and OmegaConf, whose exceptions say it no other way."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from hydra._internal.utils import get_args_parser


def choice_not_found(message: str) -> tuple[str, str] | None:
    """(group, name) of a choice that no file and no schema offers."""
    found = re.search(r"Could not find '([\w./]+?)/([^'/]*)'", message)
    return (found[1], found[2]) if found else None


def key_not_in_class(message: str) -> tuple[str, str] | None:
    """(the key with its groups, the class that lacks it)."""
    found = re.search(r"Key '([^']+)' (?:is )?not in '(\w+)'", message)
    return (full_key(message) or found[1], found[2]) if found else None


def key_not_overridden(message: str) -> str | None:
    """The key of an override that failed, of whatever cause."""
    found = re.search(r"Could not override '([^']+)'", message)
    return found[1] if found else None


def merged_into_class(message: str) -> tuple[str, str, str] | None:
    """(file, class, value): a plain value in a file where options of a class are expected."""
    pattern = r"In '([^']+)':.*Merge error: \w+ is not a subclass of (\w+)\. value: (.*?)(?:\n|$)"
    found = re.search(pattern, message, re.S)
    return (found[1], found[2], found[3]) if found else None


def full_key(message: str) -> str | None:
    """The key that OmegaConf's error is about, with its groups."""
    found = re.search(r"full_key: (\S+)", message)
    return found[1] if found else None


def words(cause: BaseException) -> str:
    """A library's words in one line: without where its own objects are, and without a link to the grammar."""
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("full_key", "object_type", "reference_type", "See https:"))]
    return " ".join(kept) or type(cause).__name__


def flags_first(arguments: Sequence[str]) -> list[str]:
    """The same arguments, every flag of Hydra's with its value in front: its parser knows no override between two.

    ``ace-prune model=smollm2 -m metric=wanda,ace`` is as good as ``ace-prune -m model=smollm2 metric=wanda,ace``.
    """
    actions = {name: action for action in get_args_parser()._actions for name in action.option_strings}
    flags, others, left = list[str](), list[str](), list(arguments)
    while left:
        argument = left.pop(0)
        name, given, _ = argument.partition("=")
        if name not in actions:
            others.append(argument)
            continue
        flags.append(argument)
        action = actions[name]
        if given or action.nargs == 0:
            continue
        if action.nargs == "?" and (not left or "=" in left[0] or left[0][:1] == "-"):
            flags.append(str(action.const))  # or it would take the first override
        elif left:
            flags.append(left.pop(0))
    return flags + others


def unreadable_flags(arguments: Sequence[str]) -> str | None:
    """What Hydra's own parser would say of these arguments, with its usage, before it ends the process."""
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        _, unknown = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as fault:
        return str(fault)
    return f"unrecognized arguments: {' '.join(unknown)}" if unknown else None
