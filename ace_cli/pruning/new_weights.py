"""The tensors of one block as the new files will have them. Shapes: O outputs, I inputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ace_cli.core.device import brought_back
from ace_cli.model.blocks import Block
from ace_cli.model.header import DTYPES
from ace_cli.model.slots import Slot, View
from ace_cli.model.streamed import StreamedModel
from ace_cli.model.weights import assign


class NewWeights:
    """What will be written of ``block``: tensors by name, in the files' dtypes and on the model's device."""

    def __init__(self, model: StreamedModel, block: Block) -> None:
        self._model = model
        self._block = block
        self._new: dict[str, Tensor] = {}

    def of_file(self, key: str) -> Tensor:
        """A tensor that will be written, to be changed in place; until then it is the source's."""
        if key not in self._new:
            self._new[key] = self._model.checkpoint.read(key).to(self._model.device)
        return self._new[key]

    def of_slot(self, slot: Slot) -> Tensor:
        """The slot's part of it, (O, I)."""
        return slot.in_file(self.of_file(slot.key))

    def dense(self, slot: Slot) -> Tensor:
        """The slot's weight as the source has it, (O, I): read again where the compute dtype has fewer digits."""
        return slot.weight_OI if self.exact(slot) else self.of_slot(slot)

    def exact(self, slot: Slot) -> bool:
        """Whether the loaded weight has all digits of the file's."""
        return self._model.dtype in (torch.float32, self.dtype(slot.key))

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of a tensor in the files."""
        dtype: torch.dtype = getattr(torch, DTYPES[self._model.checkpoint.tensors[key].dtype][0])
        return dtype

    def store(self, slot: Slot, new_OI: Tensor) -> None:
        """``new_OI``, in the file's dtype, will be written; the loaded weight stays as it is."""
        if slot.in_file == View():
            self._new[slot.key] = new_OI
        else:
            self.of_slot(slot).copy_(new_OI)

    def put(self, slot: Slot, new_OI: Tensor) -> None:
        """``new_OI``, in the file's dtype, is what becomes of the slot, loaded and in the files."""
        slot.put(new_OI)
        self.store(slot, new_OI)

    def take_loaded(self, names: Iterable[str]) -> None:
        """The loaded parameters of these names are what will be written, rounded to the files' dtypes."""
        parameters = dict(self._block.module.named_parameters())
        for name in names:
            new = parameters[name].detach()
            for part in self._block.parts[name]:
                place = part.place(new)
                self._new[part.key] = place.to(self.dtype(part.key)).clone()
                place.copy_(self._new[part.key])
            assign(self._block.module, name, new.to(self._model.dtype_of(f"{self._block.name}.{name}")))

    def hand_over(self) -> dict[str, Tensor]:
        """All of it, on the CPU; once."""
        new, self._new = self._new, {}
        return brought_back(new)
