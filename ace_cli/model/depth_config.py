"""The change of config.json that says which blocks of a model are left, proven by the model that it builds.

No family has a row here. The number of blocks is found by trying; lists as long as the blocks are cut as the blocks
are; where that does not do, numbers that may be places of blocks (the first with experts, those without) are changed.
A change counts if every block that it builds is the old one in all its settings but its number.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ace_cli.core.errors import AceError
from ace_cli.model.alike import differs
from ace_cli.model.cuts import Numbered, renumbered
from ace_cli.model.files import Checkpoint
from ace_cli.model.proven_config import Place, changed, complete_config, leaves
from ace_cli.model.streamed import StreamedModel

#: Lists under such names are of tokens or of frequencies, however long they happen to be.
_OTHERS = ("_id", "_ids", "factor", "factors", "section", "architectures")

#: Keys that may hold places of blocks are called after one of these, and not after what is counted in a block.
_PLACES, _COUNTS = re.compile("layer|block|dense|moe|attn|attention|window"), re.compile("head|expert|size|_ids?$")


def numbered_blocks(model: StreamedModel) -> Numbered:
    """How the files number the blocks. AceError where the names of a block's tensors do not tell."""
    count = len(model.blocks)
    first = model.blocks[0].files[0].split(".")
    for place in range(1, len(first)):
        found = Numbered(".".join(first[:place]) + ".")
        numbers = [{found.number(key) for key in block.files} for block in model.blocks]
        if numbers == [{index} for index in range(count)]:
            return found
    raise AceError(
        f"{type(model.skeleton).__name__}: its files do not number the blocks.", "Choose another unit than blocks."
    )


def depth_changes(model: StreamedModel, numbered: Numbered, kept: Sequence[int]) -> dict[Place, Any] | str:
    """Place in config.json -> new value, for the blocks ``kept``; in words, what no change could say."""
    source = renumbered(model.checkpoint, numbered, kept)
    raw, complete = model.checkpoint.config(), complete_config(model.checkpoint.folder)
    count = len(model.blocks)
    lists = {place: [value[u] for u in kept] for place, value in leaves(complete) if _of_blocks(place, value, count)}
    numbers = [place for place, value in leaves(complete) if type(value) is int and value == count]
    written = {place for place, _ in leaves(raw)}
    numbers.sort(key=lambda place: (place not in written, "layer" not in str(place[-1])))
    why = f"{type(model.skeleton).__name__} has no key for the number of blocks"
    for number in numbers:
        base = {number: len(kept), **lists}
        moves = [*_moves(complete, kept, count, number)]
        for size in range(3):
            for chosen in combinations(moves, size):
                changes = {**base, **dict(chosen)}
                fault = _fault(model, source, changed(raw, changes), kept, {**lists, **dict(chosen)})
                if not fault:
                    return changes
                if not chosen and "blocks are built" not in fault:
                    why = fault
    return why


def _of_blocks(place: Place, value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and not str(place[-1]).endswith(_OTHERS)


def _moves(complete: Mapping[str, Any], kept: Sequence[int], count: int, number: Place) -> Iterator[tuple[Place, Any]]:
    """What may be places of blocks, and what they become: lists of some, and how many come first."""
    for place, value in leaves(complete):
        name = str(place[-1])
        if place == number or not _PLACES.search(name) or _COUNTS.search(name):
            continue
        if isinstance(value, list) and value and all(type(each) is int and 0 <= each < count for each in value):
            yield place, [kept.index(each) for each in value if each in kept]
        if type(value) is int and 0 < value <= count and (new := sum(each < value for each in kept)) != value:
            yield place, new


def _fault(
    model: StreamedModel, source: Checkpoint, config: dict[str, Any], kept: Sequence[int], lists: Mapping[Place, Any]
) -> str:
    """Why the stock class, of this configuration, does not build the blocks ``kept``; empty if it does."""
    described = copy.copy(source)
    with tempfile.TemporaryDirectory() as folder:
        described.folder = Path(folder)
        (described.folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            shorter = StreamedModel(described, model.device, model.dtype)
            complete = dict(leaves(complete_config(described.folder)))
        except AceError as fault:  # a value that makes no model
            return str(fault)
    if len(shorter.blocks) != len(kept):
        return f"{len(shorter.blocks)} blocks are built"
    for place, value in lists.items():
        if complete.get(place, value) != value:
            return f"{'.'.join(place)} cannot be said"
    for new, old in enumerate(kept):
        one, other = model.blocks[old].module, shorter.blocks[new].module
        if name := differs(one, other, {old: new}) or ("shape" if _shapes(one) != _shapes(other) else ""):
            return f"block {old} as number {new} would have another {name}"
    try:
        shorter.check_complete()
    except AceError as fault:
        return str(fault)
    if len(kept) and kept[-1] != len(kept) - 1 and not _computes(model, shorter, kept[-1], len(kept) - 1):
        return f"block {kept[-1]} as number {len(kept) - 1} would compute something else"
    return ""


def _computes(model: StreamedModel, shorter: StreamedModel, old: int, new: int) -> bool:
    """Whether a block does under its new number what it did: its code may ask for the number."""
    ids_BL = (torch.arange(16) % model.vocabulary).view(2, 8)
    outputs = []
    with torch.no_grad():
        for each, index in ((model, old), (shorter, new)):
            (batch,) = each.batches(ids_BL)
            with each.loaded(each.blocks[index]):
                outputs.append(each.forward(index, batch))
    return torch.equal(*outputs)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}
