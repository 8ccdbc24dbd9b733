"""The one reader of JSON that others wrote: configurations, headers, indexes, manifests, journals.

Everything here is an object at the top. What could end or stall the process (size, depth, numbers of a million digits)
is refused before anyone looks inside.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ace_cli.core.errors import AceError

#: What safetensors allows a header; the longest real index is a tenth of it.
LARGEST_BYTES = 100_000_000
#: Real files are some ten deep. Deeper ones overflow the stack of one library or another.
DEEPEST = 100


def read_object(file: Path, hint: str = "Fetch the file again.") -> dict[str, Any]:
    """The JSON object in ``file``. Raises AceError if it cannot be read or holds anything else."""
    try:
        with open(file, "rb") as stream:
            text = stream.read(LARGEST_BYTES + 1)
    except OSError as fault:
        raise AceError(f"{file} cannot be read: {fault.strerror or fault}.", hint) from None
    return parse_object(text, str(file), hint)


def parse_object(text: bytes, name: str, hint: str = "Fetch the file again.") -> dict[str, Any]:
    """``text`` as a JSON object; ``name`` says where it is from. Raises AceError if it is anything else."""
    if len(text) > LARGEST_BYTES:
        raise AceError(f"{name} is more than {LARGEST_BYTES:,} bytes of JSON.", hint)
    try:
        found = json.loads(text)
        if b"\\ud" in text.lower():  # half of a pair of surrogates is no text: it can be neither printed nor hashed
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise AceError(f"{name} is nested too deeply to be read as JSON.", hint) from None
    except ValueError as fault:
        raise AceError(f"{name} cannot be read as JSON: {fault}.", hint) from None
    if not isinstance(found, dict):
        raise AceError(f"{name} holds {_kind(found)}, not a JSON object.", hint)
    if is_deep(text) and _depth(found) > DEEPEST:
        raise AceError(f"{name} is nested too deeply ({_depth(found)} levels) to be read as JSON.", hint)
    return found


def is_deep(text: bytes) -> bool:
    """Whether JSON ``text`` may be nested deeper than ``DEEPEST``: a quick look that is never wrong about no."""
    return text.count(b"[") + text.count(b"{") > DEEPEST


def _depth(found: Any) -> int:
    """Levels of lists and objects, counted level by level: the stack does not grow."""
    depth, level = 0, [found]
    while level := [value for value in level if isinstance(value, dict | list)]:
        depth += 1
        level = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value)]
    return depth


def _kind(found: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(found), "null")
