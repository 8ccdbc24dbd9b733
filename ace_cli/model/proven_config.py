"""The change of config.json that says a cut, found by trying and proven by the model that it builds.

No family has a row here: which key holds a width is seen from which key, changed, gives every tensor its new shape.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from ace_cli.core.errors import AceError
from ace_cli.model.configuration import transformers_config
from ace_cli.model.cuts import Sliced
from ace_cli.model.files import Checkpoint
from ace_cli.model.mapping import Mapping as NameMapping
from ace_cli.model.transformers_api import tied_weights

#: A place in config.json: the names that lead to it.
Place = tuple[str, ...]


def proven_changes(
    cut: Sliced, sizes: Mapping[int, int], right: Callable[[Checkpoint], bool]
) -> dict[Place, Any] | None:
    """Place in config.json -> new value, such that the stock class builds exactly the shapes of ``cut``.

    ``sizes``: old number -> new number that the change may be about. ``right`` has the last word, of a checkpoint whose
    config.json is changed so: other heads may have the same shapes. None if no key, and no two or three keys, say it.
    """
    raw, complete = cut.config(), complete_config(cut.folder)
    candidates = [*_candidates(raw, complete, sizes)]
    for count in (1, 2, 3):
        for chosen in combinations(candidates, count):
            for pinned in _pins(raw, complete):
                changes = {**pinned, **dict(chosen)}
                if len(dict(chosen)) == count and _says(changed(raw, changes), cut, right):
                    return changes
        candidates = candidates[:8]  # of pairs, only what is written in the file and holds the very number
    return None


def _pins(raw: Mapping[str, Any], complete: Mapping[str, Any]) -> Iterator[dict[Place, Any]]:
    """Nothing; then a size of heads that the file leaves to be computed from what may change."""
    yield {}
    written = {place for place, _ in leaves(raw)}
    yield from (
        {place: value}
        for place, value in leaves(complete)
        if place[-1] == "head_dim" and place not in written and value
    )


def changed(raw: Mapping[str, Any], changes: Mapping[Place, Any]) -> dict[str, Any]:
    """A copy of a configuration with some values replaced."""
    config = copy.deepcopy(dict(raw))
    for place, value in changes.items():
        part = config
        for name in place[:-1]:
            part = part.setdefault(name, {})
        part[place[-1]] = value
    return config


def complete_config(folder: Path) -> dict[str, Any]:
    """The configuration with all defaults filled in."""
    complete: dict[str, Any] = transformers_config(folder).to_dict()
    return complete


def _candidates(
    raw: Mapping[str, Any], complete: Mapping[str, Any], sizes: Mapping[int, int]
) -> Iterator[tuple[Place, Any]]:
    """Likely keys first: those that hold an old number, in the file, then by default; then those that hold nothing."""
    known = list(leaves(complete))
    written = {place for place, _ in leaves(raw)}
    for in_file in (True, False):
        for place, value in known:
            if (place in written) is in_file:
                if type(value) is int and value in sizes:
                    yield place, sizes[value]
                if isinstance(value, list) and value and set(map(type, value)) == {int} and set(value) & set(sizes):
                    yield place, [sizes.get(each, each) for each in value]
    for place, value in known:
        if value is None and not place[-1].endswith(("_id", "_ids", "_type", "config")):
            yield from ((place, new) for new in sizes.values())


def leaves(config: Mapping[str, Any], above: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value that is no part of the configuration itself, and where it is."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from leaves(value, (*above, name))
        else:
            yield (*above, name), value


def _says(config: Mapping[str, Any], cut: Sliced, right: Callable[[Checkpoint], bool]) -> bool:
    """Whether the stock class, of this configuration, has a place of the right shape for every tensor, and computes."""
    from ace_cli.model.skeleton import skeleton_of

    described = copy.copy(cut)
    with tempfile.TemporaryDirectory() as folder:
        described.folder = Path(folder)
        (described.folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            skeleton = skeleton_of(described)
        except AceError:  # a value that makes no model
            return False
        mapping, state = NameMapping(skeleton, described), dict(skeleton.state_dict(keep_vars=True))
        tied = tied_weights(skeleton)
        fits = not mapping.misfits(state) and all(name in mapping or name in tied for name in state)
        return fits and right(described)
