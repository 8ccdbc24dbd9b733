"""A pruned model that computes with its weights packed: ``ace_cli.sparse.load(FOLDER)``.

Decoding one token at a time, a CPU waits for weights. Read as a bit mask and the values that are not zero, half as
many bytes come through memory at 50 %; of weights that were rounded, as codes of 8 bits, a third. A prompt is many
tokens: there each matrix is unpacked for a moment, and the product is a dense one.
"""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ace_cli.kernels.bitmask import Bitmask, pack, packed_bytes, product, unpack, why_slow
from ace_cli.model.files import Checkpoint
from ace_cli.model.header import DTYPES
from ace_cli.model.opening import open_folder
from ace_cli.model.packed import PackedCheckpoint
from ace_cli.model.streamed import StreamedModel

#: More tokens at once go through the unpacked matrix: where both ways were measured to take equally long.
FEW_TOKENS = 8


#: Weights that are unpacked at once: memory is bounded, and pieces are few, as the threads meet after each.
_PIECE = 1 << 22


class _Room(threading.local):
    """Memory that matrices are unpacked into, one for each thread: to ask for fresh pages takes longer."""

    def __init__(self) -> None:
        self._rooms: dict[torch.dtype, Tensor] = {}

    def __call__(self, count: int, dtype: torch.dtype) -> Tensor:
        """At least ``count`` elements."""
        if dtype not in self._rooms or len(self._rooms[dtype]) < count:
            with torch.inference_mode(False):  # or it could not be written to outside of that mode
                self._rooms[dtype] = torch.empty(count, dtype=dtype)
        return self._rooms[dtype]


_room = _Room()


class PackedLinear(nn.Module):
    """``nn.Linear`` with a packed weight (O, I). Its state dict, and so what ``save_pretrained`` writes, is dense."""

    mask: Tensor
    values: Tensor
    starts: Tensor
    scales: Tensor | None
    bias: Tensor | None

    def __init__(self, packed: Bitmask, bias: Tensor | None = None) -> None:
        """``bias`` (O,)."""
        super().__init__()
        self.out_features, self.in_features = packed.shape
        for part in ("mask", "values", "starts"):
            self.register_buffer(part, getattr(packed, part), persistent=False)
        scales = (
            None if packed.scales is None else packed.scales.view(torch.int16)
        )  # which stays as it is in .to(dtype)
        self.register_buffer("scales", scales, persistent=False)
        self._rounded_to = packed.rounded_to
        self.register_buffer("bias", bias, persistent=False)

    @property
    def packed(self) -> Bitmask:
        """The weight as it is kept."""
        scales = None if self.scales is None else self.scales.view(torch.bfloat16)
        shape = (self.out_features, self.in_features)
        return Bitmask(shape, self.mask, self.values, self.starts, scales, self._rounded_to)

    @property
    def weight(self) -> Tensor:
        """The weight (O, I), unpacked anew each time."""
        return unpack(self.packed)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        dtype = self._rounded_to or self.values.dtype
        plain = x.device.type == "cpu" and x.dtype == dtype and not x.requires_grad
        if plain and 0 < x.numel() <= FEW_TOKENS * self.in_features:
            return product(self.packed, x.reshape(-1, self.in_features), self.bias).view(*x.shape[:-1], -1)
        return self._many(x) if plain else linear(x, self.weight.to(x.dtype), self.bias)

    def _many(self, x: Tensor) -> Tensor:
        """Some rows of the weight after the other, each unpacked into the same place."""
        packed, count = self.packed, max(1, _PIECE // self.in_features)
        room = _room(count * self.in_features, x.dtype)
        outputs = []
        for first in range(0, self.out_features, count):
            bias = None if self.bias is None else self.bias[first : first + count]
            outputs.append(linear(x, unpack(packed.rows(first, first + count), room), bias))
        return torch.cat(outputs, dim=-1)

    def extra_repr(self) -> str:
        share = self.packed.nbytes / (self.out_features * self.in_features * self.packed.dtype.itemsize)
        return f"in_features={self.in_features}, out_features={self.out_features}, bytes={share:.0%}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What ``load`` made of a folder. ``note``: why nothing is packed, if nothing is."""

    model: Any
    matrices: int
    note: str = ""


def load(folder: str | Path, dtype: torch.dtype | None = None) -> Any:
    """A transformers model of a packed or a pruned plain checkpoint, on the CPU, its linear layers packed.

    In the stored dtype if ``dtype`` is not said. It generates what the plain checkpoint does, to rounding: sums are
    taken in another order. A matrix that packing does not make smaller stays dense; so do all, and a warning says why,
    where this machine has no packed product that is faster. Raises AceError for a folder that is not a whole
    checkpoint of a model that transformers knows.
    """
    loaded = load_with_facts(Path(folder), dtype)
    if loaded.note:
        import warnings

        warnings.warn(f"{folder} is computed with densely: {loaded.note}.", stacklevel=2)
    return loaded.model


def load_with_facts(folder: Path, dtype: torch.dtype | None = None) -> Loaded:
    """As ``load``, with what there is to tell."""
    checkpoint = open_folder(folder)
    dtype = dtype or stored_dtype(checkpoint)
    streamed = StreamedModel(checkpoint, torch.device("cpu"), dtype)
    streamed.check_complete()
    note = why_slow(dtype)
    packed = {} if note else _packed_weights(streamed)
    model = streamed.whole(without=[f"{name}.weight" for name in packed])
    for name, matrix in packed.items():
        bias = model.get_submodule(name).bias
        model.set_submodule(name, PackedLinear(matrix, None if bias is None else bias.detach()))
    _as_from_pretrained(model, folder, dtype)
    return Loaded(model, len(packed), note or ("" if packed else "no linear layer of it gets smaller by packing"))


def _packed_weights(streamed: StreamedModel) -> dict[str, Bitmask]:
    """Name of a linear layer -> its weight, of those that are there packed or become smaller by it."""
    found = {}
    for name, module in streamed.skeleton.named_modules():
        key = streamed.stored_as(f"{name}.weight")
        if type(module) is not nn.Linear or key is None or f"{name}.weight" in streamed.tied:
            continue
        if (packed := _packed(streamed.checkpoint, key, streamed.dtype)) is not None:
            found[name] = packed
    return found


def _packed(checkpoint: Checkpoint, key: str, dtype: torch.dtype) -> Bitmask | None:
    if isinstance(checkpoint, PackedCheckpoint):
        return _cast(checkpoint.bitmask(key), dtype) if checkpoint.holds_packed(key) else None
    weight = checkpoint.read(key).to(dtype)
    if packed_bytes(weight.shape, int(weight.count_nonzero()), dtype.itemsize) >= weight.nbytes:
        return None
    return pack(weight)


def _cast(packed: Bitmask, dtype: torch.dtype) -> Bitmask:
    return packed if packed.dtype == dtype and packed.compiled else pack(unpack(packed).to(dtype))


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What the matrices are stored in; float32 where they differ."""
    stored = {entry.dtype for entry in checkpoint.tensors.values() if len(entry.shape) >= 2}
    if len(stored) > 1 or not stored <= {"BF16", "F16", "F32"}:
        return torch.float32
    return getattr(torch, DTYPES[stored.pop()][0])  # type: ignore[no-any-return]


def _as_from_pretrained(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """What transformers' own loader tells a model about its folder."""
    from transformers import GenerationConfig

    model.config.dtype, model.config.name_or_path = dtype, str(folder)
    if isinstance(head := model.get_output_embeddings(), nn.Linear):
        head.weight.requires_grad_()  # else torch multiplies a prompt's last token by a transposed copy of it
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
