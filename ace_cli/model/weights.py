"""Weights of a model that was built without any: put in from the files, and taken out again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ace_cli.core.torch_api import own_buffers, own_parameters
from ace_cli.model.files import Checkpoint
from ace_cli.model.mapping import Conversion, Mapping
from ace_cli.model.slots import Part, View
from ace_cli.model.ties import resolved, same_values
from ace_cli.model.transformers_api import tied_weights


class Weights:
    """Parameters and stored buffers of ``skeleton``, on ``device``, each in the dtype that it is computed in."""

    def __init__(
        self,
        skeleton: Any,
        mapping: Mapping,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        in_float32: Callable[[str], bool],
    ) -> None:
        self._skeleton = skeleton
        self._mapping = mapping
        self._device = device
        self._dtype = dtype
        self._in_float32 = in_float32
        #: Parameters that share the tensor of another: name -> the other's.
        self.tied = resolved(tied_weights(skeleton), mapping, lambda one, other: self._alike(checkpoint, one, other))

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that a parameter is computed in."""
        return torch.float32 if self._in_float32(name) else self._dtype

    def state(self) -> dict[str, Tensor]:
        """All of them by name, those on the meta device that are not in memory."""
        return dict(self._skeleton.state_dict(keep_vars=True))

    def read(self, checkpoint: Checkpoint, names: Collection[str], conversions: Iterable[Conversion]) -> None:
        """Put ``names`` and what ``conversions`` make in, one after the other; tied ones share one tensor."""
        for name in names:
            if name not in self.tied and (parts := self._mapping.parts(name)):
                self.fill(name, parts, {part.key: checkpoint.read(part.key) for part in parts})
        for conversion in conversions:
            self.convert([conversion], {key: checkpoint.read(key) for key in conversion.keys})
        state = self.state()
        for name in names:
            if name in self.tied:
                assign(self._skeleton, name, state[self.tied[name]])

    def fill(self, name: str, parts: list[Part], tensors: dict[str, Tensor]) -> None:
        """Put a parameter together; empties ``tensors`` of what it takes."""
        if parts[0].place == View():
            assign(self._skeleton, name, self._cast(name, tensors.pop(parts[0].key)))
            return
        shape = self._skeleton.get_parameter(name).shape
        whole = torch.empty(shape, dtype=self.dtype_of(name), device=self._device)
        for part in parts:
            part.place(whole).copy_(tensors.pop(part.key), non_blocking=True)
        assign(self._skeleton, name, whole)

    def convert(self, conversions: Iterable[Conversion], tensors: dict[str, Tensor]) -> None:
        """Put in what transformers makes of several tensors of the files, or several of one."""
        for conversion in conversions:
            for name, tensor in conversion.run(self._skeleton, tensors).items():
                assign(self._skeleton, name, self._cast(name, tensor))

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self._device, non_blocking=True)
        return tensor.to(self.dtype_of(name)) if tensor.is_floating_point() else tensor

    def _alike(self, checkpoint: Checkpoint, one: str, other: str) -> bool:
        """Whether two tied parameters that are both stored are one; those put together from parts are as declared."""
        keys = [self._mapping.keys(name) for name in (one, other)]
        if any(len(found) != 1 for found in keys):
            return True
        return same_values(checkpoint, keys[0][0], keys[1][0], self.dtype_of(other))


def empty(root: nn.Module, names: Iterable[str]) -> None:
    """Replace parameters and buffers of ``root`` by ones on the meta device."""
    state = dict(root.state_dict(keep_vars=True))
    for name in names:
        assign(root, name, torch.empty_like(state[name], device="meta"))


def assign(root: nn.Module, name: str, tensor: Tensor) -> None:
    """``tensor`` becomes the parameter, without gradients, or buffer of this name."""
    path, _, leaf = name.rpartition(".")
    module = root.get_submodule(path)
    if leaf in own_buffers(module):
        own_buffers(module)[leaf] = tensor
    else:
        own_parameters(module)[leaf] = nn.Parameter(tensor, requires_grad=False)
