"""The decoder blocks of a model: which modules they are, and the tensors, slots and experts in each."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ace_cli.core.errors import AceError
from ace_cli.model.experts import Experts
from ace_cli.model.mapping import Conversion, Mapping
from ace_cli.model.slots import Left, Part, Slot, SlotFilter, find_slots
from ace_cli.model.transformers_api import block_classes

#: Where the decoder blocks are, of classes whose annotations do not tell: class of the model -> path of the list.
BLOCKS = {"BioGptForCausalLM": "biogpt.layers"}


@dataclass
class Block:
    """A decoder block. ``parts``: parameter name inside the block -> the tensors of the files that make it.

    ``slots`` are pruned, ``left`` is not (name in the files -> why); ``experts`` are the layers whose slots no module
    shows.
    """

    name: str
    module: nn.Module
    parts: dict[str, list[Part]]
    conversions: list[Conversion] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    left: dict[str, Left] = field(default_factory=dict)
    experts: list[Experts] = field(default_factory=list)

    @property
    def files(self) -> list[str]:
        """The block's tensors in the files, each once."""
        plain = [part.key for parts in self.parts.values() for part in parts]
        return list(dict.fromkeys([*plain, *(key for made in self.conversions for key in made.keys)]))

    def watching(self, names: Container[str]) -> Block:
        """The same block, of whose weights only those of these names are slots."""
        experts = [replace(each, slots=[slot for slot in each.slots if slot.name in names]) for each in self.experts]
        slots = [slot for slot in self.slots if slot.name in names]
        return replace(self, slots=slots, experts=[each for each in experts if each.slots])

    @property
    def layers(self) -> list[Slot]:
        """The slots whose module is called with their input."""
        return [slot for slot in self.slots if slot.in_module.index is None]


def find_blocks(skeleton: Any, mapping: Mapping, others: Iterable[str], selection: SlotFilter) -> list[Block]:
    """In order. Raises AceError where the list of blocks cannot be told from other lists of modules."""
    kind, names = type(skeleton).__name__, block_classes(skeleton)
    outside = tuple(f"{path}." for path in others)
    lists = [
        (name, module)
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.ModuleList)
        and not name.startswith(outside)
        and (_all_in(module, names) if kind not in BLOCKS else name == BLOCKS[kind])
    ]
    if len(lists) != 1:
        raise AceError(
            f"{kind}: expected one list of decoder blocks of class {', '.join(sorted(names)) or '(none named)'}, "
            f"found {', '.join(name for name, _ in lists) or 'none'}.",
            f"Give {kind} a row in BLOCKS of ace_cli/model/blocks.py. Lists in it: {_lists(skeleton)}.",
        )
    list_name, modules = lists[0]
    blocks = [_block(mapping, f"{list_name}.{index}", module, selection) for index, module in enumerate(modules)]
    selection.check(name for block in blocks for name in (*(slot.name for slot in block.slots), *block.left))
    return blocks


def _block(mapping: Mapping, name: str, module: nn.Module, selection: SlotFilter) -> Block:
    parts = {inner: stored for inner in module.state_dict() if (stored := mapping.parts(f"{name}.{inner}"))}
    found = find_slots(module, parts, selection)
    stacked = [slot for slot in found.slots if slot.in_module.index is not None]
    experts = [
        Experts(holder, [slot for slot in stacked if slot.module is holder])
        for holder in dict.fromkeys(slot.module for slot in stacked)
    ]
    return Block(name, module, parts, mapping.conversions(f"{name}."), found.slots, found.left, experts)


def _all_in(modules: nn.ModuleList, names: set[str]) -> bool:
    return len(modules) > 0 and {type(module).__name__ for module in modules} <= names


def _lists(skeleton: nn.Module) -> str:
    found = [
        f"{name} of {len(module)} {type(module[0]).__name__}"
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    return ", ".join(found[:4]) or "none"
