"""Where the units of a model lie, and how many of them stay: known in shape before any block is pruned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ace_cli.core.errors import AceError
from ace_cli.methods.units import Units, equal_width, kept_width
from ace_cli.model.blocks import Block
from ace_cli.model.calls import Batch
from ace_cli.model.cuts import Coupling, Cut, Grown, Sliced, coupling, rows_of
from ace_cli.model.expert_links import ExpertLink
from ace_cli.model.files import Checkpoint
from ace_cli.model.header import TensorEntry
from ace_cli.model.links import LinkFinder
from ace_cli.model.proven_config import Place, proven_changes
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.facts import BlockFacts

if TYPE_CHECKING:
    from ace_cli.methods.statistics import Seen
    from ace_cli.pruning.orders import Order
    from ace_cli.pruning.slot_pruner import SlotPruner
    from ace_cli.pruning.units.base import Unit


@dataclass
class Cutting:
    """The units of ``model`` of the kind ``unit``; ``couplings`` of each block. ``name``: the unit's, as asked for.

    ``stay``: coupling's name -> how many of each region's units stay; all, until an allocation said otherwise.

    Making one reads a block of each kind, to see how its weights hang together. Raises AceError if there are no units.
    """

    model: StreamedModel
    unit: Unit
    name: str
    couplings: tuple[tuple[Coupling, ...], ...] = field(init=False)
    stay: dict[str, int] = field(init=False)
    _finder: LinkFinder = field(init=False, repr=False)
    _index: dict[str, int] = field(init=False, repr=False)
    _said: tuple[dict[str, int], dict[Place, Any] | None] | None = field(init=False, repr=False, default=None)

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
        self._take_all(kind)

    def _take_all(self, kind: str) -> None:
        """All units of ``couplings`` stay, for now. AceError if there are none."""
        self.stay = {each.name: each.width for block in self.couplings for each in block}
        self._index = {block.name: index for index, block in enumerate(self.model.blocks)}
        if not any(self.couplings):
            raise AceError(f"unit={self.name}: no {self.name}s were found in {kind}.", "Choose another unit.")

    #: How the slots of a block are observed and pruned; None where that is as for single weights.
    order: ClassVar[type[Order] | None] = None
    #: Whether slots are repaired one by one: what that costs is planned from their shapes.
    by_slots = True
    #: Whether ``repair`` refits weights, and so holds what it holds.
    repairs = True
    #: How many further blocks are loaded while one is worked on.
    beside = 0
    #: How often the dense model is run before anything is cut, for the unit itself.
    looks = 0
    #: Why ``changes`` found none, where more is known than that.
    why_not = ""

    @property
    def speeds(self) -> bool:
        """Whether a token is computed with so many weights fewer as the files have."""
        return not any(block.experts for block in self.model.blocks)

    @property
    def pruner(self) -> type[SlotPruner]:
        """What happens to a block."""
        from ace_cli.pruning.unit_pruner import UnitPruner  # which looks at cuttings itself

        return UnitPruner

    @property
    def planned(self) -> StreamedModel:
        """The model whose slots say what a run computes."""
        return self.watched

    @property
    def watched(self) -> StreamedModel:
        """The model with the weights that read units as its only slots: what is observed, scored and repaired."""
        return self.model.watching({each.name for block in self.couplings for each in block})

    def runs(self, index: int) -> bool:
        """Whether block ``index`` is part of the smaller model."""
        return True

    def taught(self, index: int, of_model: bool) -> list[int] | None:
        """The blocks whose work block ``index`` learns beside its own; None where it has nothing to learn.

        ``of_model``: from the dense model's states, in which errors made before show.
        """
        return []

    def ask(self, share: Fraction, keep: int | None) -> None:
        """Every block keeps the same number: all but a share of its units, or ``keep``. AceError if that cannot be.

        Beside experts, of which ``keep`` then speaks, what is so many times as wide stays so: of shared experts some
        configurations say no more than for how many they stand.
        """
        multiple, expert = self.unit.multiple, self._expert_width
        widths = {each.width for block in self.couplings for each in block}
        stay = {
            width: equal_width(self.name, width, share, multiple)
            if keep is None
            else kept_width(self.name, width, keep, multiple)
            for width in ({expert} if expert else widths)
        }
        for width in widths - stay.keys():
            if width % expert == 0:
                stay[width] = width // expert * stay[expert]
            elif keep is None:
                stay[width] = equal_width(self.name, width, share, multiple)
            else:
                raise AceError(
                    f"keep={keep}: there are {expert} {self.name}s in an expert, and {width} elsewhere.",
                    "Give a sparsity instead.",
                )
        self.stay = {each.name: stay[each.width] for block in self.couplings for each in block}

    @property
    def _expert_width(self) -> int:
        """How many units one expert has; 0 where none has any."""
        inside = {slot.name for block in self.model.blocks for experts in block.experts for slot in experts.slots}
        return next((each.width for block in self.couplings for each in block if each.name in inside), 0)

    def words(self) -> str:
        """What is cut: "1216 of 1536 channels stay in 30 blocks"."""
        counts = {(self.stay[each.name], each.width, each.regions) for block in self.couplings for each in block}
        words = [
            f"{stay} of {width} {self.name}s stay" + (f" in each of {regions} groups" if regions > 1 else "")
            for stay, width, regions in sorted(counts)
        ]
        return f"{', '.join(words)} in {sum(bool(block) for block in self.couplings)} blocks"

    def cut(self) -> Cut:
        """The shapes that follow."""
        return Cut(self.couplings, self.stay)

    @property
    def uneven(self) -> bool:
        """Whether blocks of equal width keep different numbers of units."""
        return self.cut().uneven

    def entries(self) -> dict[str, TensorEntry]:
        """The tensors of the new files."""
        return self.cut().entries(self.model.checkpoint)

    def changes(self) -> dict[Place, Any] | None:
        """The change of config.json that says it, proven; None if there is none."""
        if self._said is None or self._said[0] != self.stay:  # many models are built to find it
            sliced = Sliced(self.model.checkpoint, self.cut(), self.first_units)
            self._said = (dict(self.stay), proven_changes(sliced, self.sizes, self.computes))
        return self._said[1]

    def kept_units(self, blocks: Iterable[BlockFacts]) -> dict[str, Tensor]:
        """Coupling's name -> which of its units stayed, bool (U,), of finished blocks."""
        each_of = {each.name: each for block in self.couplings for each in block}
        found = {}
        for slot in (slot for block in blocks for slot in block.slots):
            keep_U = torch.zeros(each_of[slot.name].regions * each_of[slot.name].width, dtype=torch.bool)
            keep_U[slot.kept or []] = True
            found[slot.name] = keep_U
        return found

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

    @property
    def sizes(self) -> dict[int, int]:
        """Numbers that the configuration may hold -> what they become, where all blocks keep equally many.

        Beside the units themselves what is in proportion to them: query heads where groups of them are taken out.
        """
        found: dict[int, int] = {}
        for each in (each for block in self.couplings for each in block):
            copies, stay = each.columns_RWC.shape[2], self.stay[each.name]
            parts = [each.regions, *(part for part in range(1, copies + 1) if copies % part == 0)]
            found |= {part * each.width: part * stay for part in reversed(parts)}
        return found

    @property
    def first_units(self) -> dict[str, Tensor]:
        """Coupling's name -> the first of each region's units, as many as stay, bool (U,): for trying shapes."""
        return {
            each.name: (torch.arange(each.width) < self.stay[each.name]).repeat(each.regions)
            for block in self.couplings
            for each in block
        }

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

    def manifest(self, blocks: Iterable[BlockFacts], entries: Mapping[str, TensorEntry]) -> list[dict[str, Any]]:
        """What pruning.json tells of every cut: the units kept, and the tensors as they were written."""
        each_of = {each.name: each for block in self.couplings for each in block}
        return [
            {
                "name": slot.name, "units": each_of[slot.name].regions * each_of[slot.name].width,
                "pattern": slot.pattern, "fewer": self._fewer(each_of[slot.name], entries), "kept": slot.kept,
                "tensors": {
                    key: {"shape": list(entries[key].shape), "xxh3": found} for key, found in slot.digests.items()
                },
            }
            for block in blocks
            for slot in block.slots
        ]  # fmt: skip

    def _fewer(self, each: Coupling, entries: Mapping[str, TensorEntry]) -> int:
        """How many weights less there are of the one that reads the units."""
        reader = each.axes[0]
        before = self.model.checkpoint.tensors[reader.key]
        fewer = before.numel - entries[reader.key].numel
        return fewer if reader.index is None else fewer // before.shape[0]


def kind_of(block: Block) -> Any:
    """Blocks of one kind have the same code and shapes."""
    return type(block.module), tuple((name, value.shape) for name, value in block.module.state_dict().items())
