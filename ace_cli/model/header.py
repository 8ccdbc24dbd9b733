"""The header of a safetensors file, checked against the format and against the file.

Format: 8 bytes little-endian header length, a JSON header, then the tensors end to end, without holes and without
overlaps (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ace_cli.core.errors import AceError
from ace_cli.core.json_reader import LARGEST_BYTES, parse_object

#: safetensors' dtype names -> (name in torch, bytes per element). Others are copied, never decoded.
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
#: What weights are stored in.
FLOATS = ("F64", "F32", "F16", "BF16")
_LARGEST = 1 << 62
_MOST_AXES = 32


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: ``start`` counts bytes from the beginning of ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(file: Path) -> list[TensorEntry]:
    """The tensors of ``file``, in the order of their bytes. Raises AceError where header and file do not agree."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise _broken(file, f"it has {size:,} bytes")
        if length > LARGEST_BYTES:
            raise _broken(file, f"a header of {length:,} bytes")
        header = parse_object(stream.read(length), f"{file} is not a whole safetensors file: its header")
    data = 8 + length
    entries = [_entry(file, name, item, data) for name, item in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: (entry.start, entry.nbytes))
    end = data
    for entry in entries:
        if entry.start != end:
            raise _broken(file, f"{entry.name} begins at byte {entry.start - data}, where {end - data} is expected")
        end += entry.nbytes
    if end != size:
        raise _broken(file, f"{size - data:,} bytes of tensors, the header counts {end - data:,}")
    return entries


def _entry(file: Path, name: str, item: Any, data: int) -> TensorEntry:
    """One line of the header, its types and ranges checked; ``data`` is where the tensors begin."""
    if not isinstance(item, dict) or not isinstance(dtype := item.get("dtype"), str):
        raise _broken(file, f"its header does not say what {name} is")
    shape, offsets = item.get("shape"), item.get("data_offsets")
    if not (_sizes(shape) and len(shape) <= _MOST_AXES):
        raise _broken(file, f"{name} has the shape {str(shape)[:200]}")
    if not (_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise _broken(file, f"{name} has the offsets {str(offsets)[:200]}")
    entry = TensorEntry(name, dtype, tuple(shape), file, data + offsets[0], offsets[1] - offsets[0])
    if dtype in DTYPES and entry.numel * DTYPES[dtype][1] != entry.nbytes:
        raise _broken(file, f"{name} of shape {shape} in {dtype} has {entry.nbytes:,} bytes")
    return entry


def _sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether ``value`` is a list of whole numbers, none negative and none absurd; True is not one."""
    return isinstance(value, list) and all(type(size) is int and 0 <= size < _LARGEST for size in value)


def _broken(file: Path, why: str) -> AceError:
    return AceError(f"{file} is not a whole safetensors file: {why}.", "Fetch the file again.")
