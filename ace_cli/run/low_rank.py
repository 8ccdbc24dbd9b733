"""How thin the products are that weights become, and what the folder tells of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ace_cli.methods.low_rank import fewer, rank_of
from ace_cli.methods.patterns import Pattern, Ratio
from ace_cli.model.header import TensorEntry
from ace_cli.pruning.facts import BlockFacts


def ranks_of(shape: tuple[int, int], pattern: Pattern) -> int:
    """The rank of the product that a weight of this shape becomes."""
    assert isinstance(pattern, Ratio)
    return rank_of(*shape, pattern.p)


def products_of(blocks: Iterable[BlockFacts], entries: Mapping[str, TensorEntry]) -> list[dict[str, Any]]:
    """What pruning.json tells: which singular components stay, of how many, and the tensors as they were written."""
    return [
        {
            "name": slot.name, "units": min(slot.shape), "pattern": slot.pattern,
            "fewer": fewer(*slot.shape, len(slot.kept or [])), "kept": slot.kept,
            "tensors": {
                key: {"shape": list(entries[key].shape), "xxh3": found} for key, found in slot.digests.items()
            },
        }
        for block in blocks
        for slot in block.slots
    ]  # fmt: skip
