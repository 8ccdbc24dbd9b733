"""Links inside experts: which rows of an expert's first weights make the inputs of its last one.

The experts of a layer are alike. How their rows lie is one of the few ways in which models lay them out, and proven
with the weights of every expert: channels in another order must change nothing.

Shapes: I inputs of an expert's last weight, its channels, each made by P rows of a first weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ace_cli.core.errors import AceError
from ace_cli.model.blocks import Block
from ace_cli.model.cuts import Axis, Coupling
from ace_cli.model.experts import ExpertCall, Experts
from ace_cli.model.links import LinkFinder
from ace_cli.model.slots import Slot


@dataclass(frozen=True)
class ExpertLink:
    """The channels of every expert of one layer, number ``layer`` of those that a block has.

    ``rows``: of each of an expert's first weights the rows that make each channel, (I, P).
    """

    layer: int
    rows: tuple[Tensor, ...]

    def couplings(self, block: Block) -> list[Coupling]:
        """One for each expert, as the files have them. The block may be empty."""
        experts = block.experts[self.layer]
        holder = next(name for name, module in block.module.named_modules() if module is experts.module)
        columns_RWC = torch.arange(len(self.rows[0])).view(1, -1, 1)
        found = []
        for expert in range(experts.count):
            first, (last,) = experts.stages(expert)
            axes = [_axis(last, 1, columns_RWC[0])]
            for slot, rows_IP in zip(first, self.rows, strict=True):
                axes += [_axis(slot, 0, rows_IP), *_biases(block, f"{holder}.{slot.leaf}_bias", slot, rows_IP)]
            producers = tuple(
                (slot.name, rows_I) for slot, rows_IP in zip(first, self.rows, strict=True) for rows_I in rows_IP.T
            )
            found.append(Coupling(last.name, columns_RWC, tuple(axes), producers))
        return found


def _axis(slot: Slot, axis: int, places_IP: Tensor) -> Axis:
    """Where channels lie in the file of a slot, along its rows (0) or columns (1)."""
    return Axis(slot.key, 1 - axis if slot.in_file.transposed else axis, places_IP, slot.in_file.index)


def _biases(block: Block, name: str, slot: Slot, rows_IP: Tensor) -> Iterator[Axis]:
    """The same for what is added to the slot's outputs, in a tensor of all experts or in one of its own."""
    for part in block.parts.get(name, []):
        if part.place.index is None:
            yield Axis(part.key, 0, slot.in_module.start + rows_IP, slot.in_module.index)
        elif (part.place.index, part.place.start) == (slot.in_module.index, slot.in_module.start):
            yield Axis(part.key, 0, rows_IP)


def expert_links(finder: LinkFinder, index: int) -> list[ExpertLink]:
    """One for each layer of experts of loaded block ``index``. AceError, by name, where channels cannot be told."""
    found = []
    for layer, (experts, call) in enumerate(finder.calls(index)):
        links = (ExpertLink(layer, rows) for rows in _layouts(experts))
        link = next((link for link in links if _preserves(finder, experts, call, link, 0)), None)
        if link is None:
            raise AceError(
                f"{experts.slots[0].name}: how channels lie inside {type(experts.module).__name__} was not found.",
                "Use unit=expert, or unit=weight.",
            )
        for expert in range(1, experts.count):
            if not _preserves(finder, experts, call, link, expert):
                name = experts.stages(expert)[1][0].name
                raise AceError(f"{name}: its channels are not those of expert 0.", "Use unit=expert, or unit=weight.")
        found.append(link)
    return found


def _layouts(experts: Experts) -> Iterator[tuple[Tensor, ...]]:
    """Where the rows of each channel may be."""
    stages = experts.stages(0)
    if len(stages) != 2 or len(stages[1]) != 1:
        return
    (first, (last,)), rows = stages, [slot.shape[0] for slot in stages[0]]
    channels_I = torch.arange(last.shape[1])
    if set(rows) == {len(channels_I)}:
        yield tuple(channels_I[:, None] for _ in first)
    if rows == [2 * len(channels_I)]:
        yield (torch.stack([channels_I, len(channels_I) + channels_I], 1),)  # all gates, then all values
        yield (torch.stack([2 * channels_I, 2 * channels_I + 1], 1),)  # a gate, its value, the next gate


def _preserves(finder: LinkFinder, experts: Experts, call: ExpertCall, link: ExpertLink, expert: int) -> bool:
    """Whether channels in another order, by the link, leave what the expert makes of all tokens."""
    first, (last,) = experts.stages(expert)
    order_I = finder.order(len(link.rows[0]))
    views = [last.weight_OI, *(view for slot in first for view in (slot.weight_OI, slot.bias_O) if view is not None)]
    kept = [view.clone() for view in views]
    before = experts.outputs(call, expert, everyone=True)
    try:
        last.weight_OI.copy_(last.weight_OI[:, order_I.to(last.weight_OI.device)])
        for slot, rows_IP in zip(first, link.rows, strict=True):
            old_O, new_O = rows_IP[order_I].flatten(), rows_IP.flatten()
            for view in (slot.weight_OI, slot.bias_O):
                if view is not None:
                    view[new_O] = view[old_O].clone()
        return finder.same(before, experts.outputs(call, expert, everyone=True))
    finally:
        for view, value in zip(views, kept, strict=True):
            view.copy_(value)
