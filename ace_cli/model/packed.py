"""Packed checkpoints, read as if they were plain ones.

A Hugging Face folder but for its weights: ``packed*.safetensors``, a name that no other loader takes for a model's
(one that did would leave the packed matrices random). A matrix W is there as ``W.bitmask`` and ``W.values``, as
``ace_cli.kernels.bitmask`` has them; another tensor as it was. Of a matrix on a grid the values are codes, int8, and
``W.scales`` (O, G) is there as well. Values compressed further are ``W.zstd``.
packed.json tells the shape and dtype of every tensor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ace_cli.core.errors import AceError
from ace_cli.core.json_reader import read_object
from ace_cli.core.steps import NOBODY, Steps
from ace_cli.model.files import Checkpoint
from ace_cli.model.header import DTYPES, TensorEntry
from ace_cli.model.plain_again import write_plain

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.kernels.bitmask import Bitmask

PACKED = "packed.json"
FORMAT = "ace-bitmask-1"


def is_packed(folder: Path) -> bool:
    """Whether the folder holds a packed checkpoint."""
    return (folder / PACKED).is_file()


def zstandard() -> ModuleType:
    """The library of that name. Raises AceError where it is not installed."""
    try:
        return import_module("zstandard")
    except ImportError:
        raise AceError("zstd needs the package zstandard, which is not installed.", "pip install zstandard") from None


class PackedCheckpoint(Checkpoint):
    """``tensors`` are those that were packed, as they were; ``stored`` what the files hold of them.

    Raises AceError where the folder is not whole, or of another version's format.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        content = read_object(folder / PACKED, "Pack the checkpoint again.")
        if content.get("format") != FORMAT:
            raise AceError(f"{folder} is packed as {content.get('format')}.", f"This version reads {FORMAT}.")
        self.stored = self.tensors
        try:
            self.tensors = {name: self._entry(name, **told) for name, told in content["tensors"].items()}
        except (KeyError, TypeError, AttributeError):
            raise AceError(
                f"{folder / PACKED} does not tell shapes and dtypes.", "Pack the checkpoint again."
            ) from None

    def _entry(self, name: str, dtype: str, shape: list[int], packed: bool) -> TensorEntry:
        ends = (".values", ".zstd") if packed else ("", ".zstd")
        held = next((f"{name}{end}" for end in ends if f"{name}{end}" in self.stored), None)
        if held is None or (packed and f"{name}.bitmask" not in self.stored):
            raise AceError(f"{self.folder}: no file holds {name}.", "Pack the checkpoint again.")
        at = self.stored[held]
        return TensorEntry(name, dtype, tuple(shape), at.file, at.start, math.prod(shape) * DTYPES[dtype][1])

    def holds_packed(self, name: str) -> bool:
        """Whether the tensor is a packed matrix."""
        return f"{name}.bitmask" in self.stored

    def holds_codes(self, name: str) -> bool:
        """Whether the tensor is a packed matrix of codes and scales."""
        return f"{name}.scales" in self.stored

    def bitmask(self, name: str) -> Bitmask:
        """The packed matrix ``name``, all axes but the last being rows. Raises AceError where its parts do not fit."""
        import torch

        from ace_cli.kernels.bitmask import from_parts, with_scales

        *rows, columns = self.tensors[name].shape
        mask = self._raw(f"{name}.bitmask")
        try:
            packed = from_parts((math.prod(rows), columns), mask, self._values(name))
            if not self.holds_codes(name):
                return packed
            dtype = getattr(torch, DTYPES[self.tensors[name].dtype][0])
            return with_scales(packed, self._raw(f"{name}.scales").bfloat16(), dtype)
        except ValueError as fault:
            raise AceError(f"{self.folder}: {name} is damaged: {fault}.", "Pack the checkpoint again.") from None

    @contextmanager
    def opened(self, name: str) -> Iterator[Callable[[int, int], Tensor]]:
        """As of a plain checkpoint; a packed matrix is unpacked whole."""
        from ace_cli.kernels.bitmask import unpack

        if name in self.stored:
            with super().opened(name) as read:
                yield read
            return
        flat = unpack(self.bitmask(name)).view(-1) if self.holds_packed(name) else self._values(name)
        yield lambda first, count: flat[first : first + count]

    @cached_property
    def _plain(self) -> Checkpoint:
        return Checkpoint(self.folder)

    def _raw(self, name: str) -> Tensor:
        return self._plain.read(name)

    def _values(self, name: str) -> Tensor:
        if f"{name}.values" in self.stored:
            return self._raw(f"{name}.values")
        return decompressed(self._raw(f"{name}.zstd"), "I8" if self.holds_codes(name) else self.tensors[name].dtype)

    def _read_fingerprint(self) -> str:
        told = (self.folder / PACKED).read_bytes()
        return hashlib.sha256(told + self._plain.fingerprint().encode()).hexdigest()


def compressed(values: Tensor) -> Tensor:
    """zstd of the values' first bytes, then their second ones, ...: the exponents are much alike. uint8 (bytes,)."""
    import numpy
    import torch

    planes = values.view(torch.uint8).view(-1, values.element_size()).T.contiguous().numpy()
    frame = zstandard().ZstdCompressor(level=3).compress(planes.data)
    return torch.from_numpy(numpy.frombuffer(frame, numpy.uint8).copy())


def decompressed(frame: Tensor, dtype: str) -> Tensor:
    """The values that ``compressed`` took."""
    import numpy
    import torch

    kind, width = DTYPES[dtype]
    raw = zstandard().ZstdDecompressor().decompress(frame.numpy().tobytes())
    planes = torch.from_numpy(numpy.frombuffer(raw, numpy.uint8).copy()).view(width, -1)
    return planes.T.contiguous().view(-1).view(getattr(torch, kind))


def unpack_folder(source: Path, target: Path, steps: Steps = NOBODY) -> None:
    """The plain checkpoint again, into a new folder. Memory is one tensor, and so is a step."""
    write_plain(PackedCheckpoint(source), target, (PACKED,), steps)


def told(entries: dict[str, TensorEntry], packed: set[str]) -> dict[str, Any]:
    """packed.json."""
    tensors = {
        name: {"dtype": entry.dtype, "shape": list(entry.shape), "packed": name in packed}
        for name, entry in entries.items()
    }
    return {"format": FORMAT, "tensors": tensors}
