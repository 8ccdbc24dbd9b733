"""What the control groups of this process still give it (Linux): containers and batch systems limit memory by them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class _Files(NamedTuple):
    """In the folder of a group: its limits, what it uses, and of that the pages of files (names in memory.stat)."""

    limits: tuple[str, ...]
    used: str
    cached: tuple[str, ...]


_V1 = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = _Files(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))


def room(groups: Path = Path("/proc/self/cgroup"), mounts: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that the tightest of the groups still gives; infinite where there is no limit.

    A group's limit holds for all groups inside it, so every one from the process's own up to the root is asked.
    """
    return min((_left(folder, files) for folder, files in _groups(groups, mounts)), default=math.inf)


def _groups(groups: Path, mounts: Path) -> Iterator[tuple[Path, _Files]]:
    """The folders of the process's groups, each up to its root, and the names of the files in them."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        lines = ["0::/"]
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        own = Path(path.lstrip("/"))
        # a container may see its own group as the root: of a path, only what is there says anything
        parts = [part for part in (own, *own.parents) if ".." not in part.parts]
        if not controllers:
            yield from ((root / part, _V2) for part in parts for root in (mounts, mounts / "unified"))
        elif "memory" in controllers.split(","):
            yield from ((mounts / "memory" / part, _V1) for part in parts)


def _left(folder: Path, files: _Files) -> float:
    """Infinite where the group has no limit, or is not there."""
    left = math.inf
    for limit in files.limits:
        with suppress(OSError, ValueError, KeyError):
            most = int((folder / limit).read_text())  # "max", no limit, is no number
            found = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = sum(int(found[name]) for name in files.cached)  # given back when it is asked for
            left = min(left, most - int((folder / files.used).read_text()) + cached)
    return left
