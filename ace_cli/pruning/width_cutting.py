"""Units of which so many stay in each place: what their tensors and config.json become."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ace_cli.core.errors import AceError
from ace_cli.methods.units import equal_width, kept_width
from ace_cli.model.cuts import Coupling, Cut, Sliced
from ace_cli.model.files import Checkpoint
from ace_cli.model.header import TensorEntry
from ace_cli.model.proven_config import Place, proven_changes
from ace_cli.pruning.cutting import Cutting
from ace_cli.pruning.facts import BlockFacts


@dataclass
class WidthCutting(Cutting):
    """Units that are rows and columns of tensors, of each coupling as many as ``stay``."""

    _said: tuple[dict[str, int], dict[Place, Any] | None] | None = field(init=False, repr=False, default=None)

    def _take_all(self) -> None:
        """All units of ``couplings`` stay, for now. AceError if there are none."""
        self.stay = {each.name: each.width for block in self.couplings for each in block}
        if not any(self.couplings):
            raise AceError(
                f"unit={self.name}: no {self.name}s were found in {type(self.model.skeleton).__name__}.",
                "Choose another unit.",
            )

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

    def resized(self) -> set[str]:
        return self.cut().keys

    def changes(self) -> dict[Place, Any] | None:
        """The change of config.json that says it, proven; None if there is none."""
        if self._said is None or self._said[0] != self.stay:  # many models are built to find it
            sliced = Sliced(self.model.checkpoint, self.cut(), self.first_units)
            self._said = (dict(self.stay), proven_changes(sliced, self.sizes, self.computes))
        return self._said[1]

    def computes(self, sliced: Checkpoint) -> bool:
        """Whether ``sliced``, the model with ``first_units``, does what it should."""
        raise NotImplementedError

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

    def kept_units(self, blocks: Iterable[BlockFacts]) -> dict[str, Tensor]:
        """Coupling's name -> which of its units stayed, bool (U,), of finished blocks."""
        each_of = {each.name: each for block in self.couplings for each in block}
        found = {}
        for slot in (slot for block in blocks for slot in block.slots):
            keep_U = torch.zeros(each_of[slot.name].regions * each_of[slot.name].width, dtype=torch.bool)
            keep_U[slot.kept or []] = True
            found[slot.name] = keep_U
        return found

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
