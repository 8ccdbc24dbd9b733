"""Channels and heads: units that a weight reads and others make, told by how the weights of a block hang together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ace_cli.core.errors import AceError
from ace_cli.methods.units import Units
from ace_cli.model.calls import Batch
from ace_cli.model.cuts import Coupling, Grown, coupling, rows_of
from ace_cli.model.expert_links import ExpertLink
from ace_cli.model.files import Checkpoint
from ace_cli.model.links import LinkFinder
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.cutting import kind_of
from ace_cli.pruning.facts import BlockFacts
from ace_cli.pruning.width_cutting import WidthCutting

if TYPE_CHECKING:
    from ace_cli.methods.statistics import Seen
    from ace_cli.pruning.slot_pruner import SlotPruner


@dataclass
class UnitCutting(WidthCutting):
    """Making one reads a block of each kind, to see how its weights hang together."""

    _finder: LinkFinder = field(init=False, repr=False)
    _index: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        kind = type(self.model.skeleton).__name__
        mixture = any(block.experts for block in self.model.blocks)
        if self.unit.uneven and mixture:
            raise AceError(
                f"unit.uneven=true: {kind} has experts, whose layers keep one width.", "Leave unit.uneven=false."
            )
        with torch.no_grad():
            self._finder = LinkFinder(self.model)
            found: dict[Any, list[Any]] = {}
            inside: dict[Any, list[ExpertLink]] = {}
            for index, block in enumerate(self.model.blocks):
                if kind_of(block) not in found:
                    with self.model.loaded(block):
                        links = self.unit.links(self._finder, index)
                        inside[kind_of(block)] = self.unit.inside(self._finder, index)
                    found[kind_of(block)] = [(link, rows_of(link)) for link in links]
        self.couplings = tuple(
            (
                *(coupling(block, link, rows) for link, rows in found[kind_of(block)]),
                *(each for link in inside[kind_of(block)] for each in link.couplings(block)),
            )
            for block in self.model.blocks
        )
        self._index = {block.name: index for index, block in enumerate(self.model.blocks)}
        self._take_all()

    @property
    def pruner(self) -> type[SlotPruner]:
        """What happens to a block."""
        from ace_cli.pruning.unit_pruner import UnitPruner  # which looks at cuttings itself

        return UnitPruner

    @property
    def watched(self) -> StreamedModel:
        """The model with the weights that read units as its only slots: what is observed, scored and repaired."""
        return self.model.watching({each.name for block in self.couplings for each in block})

    def replay(self, batches: list[Batch], blocks: list[BlockFacts], written: Checkpoint, dense: bool) -> None:
        """Bring ``batches`` to where they were after the finished ``blocks``, which are read from ``written``.

        ``dense``: what came after saw the dense model.
        """
        source = self.model.checkpoint
        weights = source if dense else Grown(written, source, self.cut(), self.kept_units(blocks))
        model = self.watched.reading(weights)
        with torch.no_grad():
            for index in model.one_by_one(len(blocks)):
                model.advance(index, batches)

    def units(self, block: str, each: Coupling, gradients: Mapping[str, Seen]) -> Units:
        """The units of ``each`` as methods see them; ``block``, by name, is loaded when they ask for rows.

        ``gradients``: slot's name -> what was seen of its gradients.
        """
        slots = {slot.name: slot for slot in self.model.blocks[self._index[block]].slots}

        def producers() -> list[Tensor]:
            return [slots[name].weight_OI.float()[rows_I] for name, rows_I in each.producers]

        def makers() -> list[tuple[Seen, Tensor]]:
            return [(gradients[name], rows_I) for name, rows_I in each.producers]

        return Units(each.columns_RWC, producers, makers)

    def proven(self, block: str) -> dict[str, Coupling]:
        """The couplings of this loaded block by name; AceError if its weights do not hang together so."""
        index = self._index[block]
        parts = self.model.blocks[index].parts
        found = {parts[f"{link.consumer}.weight"][0].key for link in self.unit.links(self._finder, index)}
        for inside in self.unit.inside(self._finder, index):
            found |= {each.name for each in inside.couplings(self.model.blocks[index])}
        for each in self.couplings[index]:
            if each.name not in found:
                raise AceError(
                    f"{each.name}: {self.name}s cannot be taken out of it without changing what the others do.",
                    "Choose another unit.",
                )
        return {each.name: each for each in self.couplings[index]}

    def computes(self, sliced: Checkpoint) -> bool:
        """Whether blocks of ``sliced``, the model with ``first_units``, do what its own do with zeros there.

        One block of each kind is run on a few tokens.
        """
        narrow = StreamedModel(sliced, self.model.device, self.model.dtype)
        ids_BL = (torch.arange(16) % self.model.skeleton.get_input_embeddings().weight.shape[0]).view(2, 8)
        (wide_batch,), (narrow_batch,) = self.model.batches(ids_BL), narrow.batches(ids_BL)
        kinds = {kind_of(block): index for index, block in reversed(list(enumerate(self.model.blocks)))}
        with torch.no_grad():
            for index in kinds.values():
                with self.model.loaded(self.model.blocks[index]):
                    self._zero(index)
                    expected_BLH = self.model.forward(index, wide_batch)
                with narrow.loaded(narrow.blocks[index]):
                    found_BLH = narrow.forward(index, narrow_batch)
                if not float((found_BLH - expected_BLH).norm()) <= self._rounding * float(expected_BLH.norm()):
                    return False
        return True

    def _zero(self, index: int) -> None:
        """Of loaded block ``index``, zeros for the columns of all but ``first_units``."""
        slots = {slot.name: slot for slot in self.model.blocks[index].slots}
        for each in self.couplings[index]:
            weight_OI = slots[each.name].weight_OI.clone()
            keep_I = Units(each.columns_RWC).inputs(self.first_units[each.name], weight_OI.shape[1])
            weight_OI[:, (~keep_I).to(weight_OI.device)] = 0
            slots[each.name].put(weight_OI)

    @property
    def _rounding(self) -> float:
        return max(1e-3, 16 * torch.finfo(self.model.dtype).eps)
