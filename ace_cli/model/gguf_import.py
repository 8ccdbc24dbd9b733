"""A GGUF file -> a safetensors folder: its header checked against its bytes first, then read by transformers.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import re
import struct
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ace_cli.core.errors import AceError, first_line
from ace_cli.core.steps import NOBODY, Steps
from ace_cli.model.transformers_api import save_as_plain, telling

_WHOLE = "Is it a whole GGUF file of a decoder model?"
#: Type of a value in the header -> its letter in ``struct``; strings and lists are 8 and 9.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _LIST = 8, 9
_DEEPEST = 4
_LONGEST_NAME = 1 << 16


@dataclass
class Header:
    """What a GGUF file says of itself: single values by name, and tensor name -> (first byte, bytes) after the header.

    ``data``: where the tensors begin.
    """

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[int, int]] = field(default_factory=dict)
    data: int = 0


def import_gguf(path: Path, dtype: str, folder: Path, steps: Steps = NOBODY) -> None:
    """Write the model and the tokenizer of ``path`` into ``folder``, in this torch dtype; a step is a tensor.

    Raises AceError if the file is damaged, lacks weights, or is of a kind that transformers does not read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_gguf(path)
    # In a folder of its own: transformers would read adapters and settings that lie beside the file.
    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / "model.gguf").symlink_to(path.resolve())
        try:
            with telling(steps):
                model, loading = AutoModelForCausalLM.from_pretrained(
                    alone,
                    gguf_file="model.gguf",
                    dtype=getattr(torch, dtype),
                    output_loading_info=True,
                    trust_remote_code=False,
                )
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf", trust_remote_code=False)
        except Exception as fault:  # damaged or unsupported files fail in many layers of two libraries
            raise AceError(f"{path} cannot be imported: {first_line(fault)}", _WHOLE) from fault
    if lacking := sorted(loading["missing_keys"]):  # transformers has put random numbers there
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise AceError(f"{path} cannot be imported: it lacks {lacking[0]}{more}.", _WHOLE)
    save_as_plain(model)
    model.save_pretrained(folder, max_shard_size="5GB")
    tokenizer.save_pretrained(folder)


def check_gguf(path: Path) -> None:
    """AceError if the file is cut off, is one of several, or lacks blocks that it says it has."""
    header = read_header(path)
    size, end = path.stat().st_size, max((first + count for first, count in header.tensors.values()), default=0)
    if header.data + end > size:
        raise _damaged(path, f"it has {size:,} bytes, its tensors end at byte {header.data + end:,}")
    if (files := _count(header.values.get("split.count"))) > 1:
        raise AceError(
            f"{path} is one of {files} files of a split model.", "Join them first: llama-gguf-split --merge."
        )
    architecture = header.values.get("general.architecture")
    if not isinstance(architecture, str):
        raise _damaged(path, "its header names no architecture")
    asked = _count(header.values.get(f"{architecture}.block_count"))
    numbers = [int(found[1]) for name in header.tensors if (found := re.match(r"blk\.(\d{1,9})\.", name))]
    held = max(numbers, default=-1) + 1
    if asked > held:
        raise _damaged(path, f"its header counts {asked:,} blocks, it holds {held}")


def read_header(path: Path) -> Header:
    """The header of a GGUF file, every count and offset checked. Raises AceError if it is none."""
    with open(path, "rb") as stream:
        try:
            return _Reader(stream, path.stat().st_size).header()
        except (_NoGguf, UnicodeDecodeError) as fault:
            raise _damaged(path, str(fault)) from None


class _NoGguf(Exception):
    """What is wrong with a header."""


class _Reader:
    """Reads values one after the other, never past the end of the file."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._stream = stream
        self._size = size
        self._order = "<"

    def header(self) -> Header:
        if self._bytes(4) != b"GGUF":
            raise _NoGguf("it does not begin with the letters GGUF")
        version = self._one("I")
        if version >= 1 << 16:  # written by a machine of the other byte order
            self._order, version = ">", struct.unpack(">I", struct.pack("<I", version))[0]
        if version not in (2, 3):
            raise _NoGguf(f"its version is {version}, known are 2 and 3")
        tensors, values = self._one("Q"), self._one("Q")
        header = Header()
        for _ in range(values):
            name, kind = self._string(_LONGEST_NAME), self._one("I")
            header.values[name] = self._value(kind)
        for _ in range(tensors):
            name, place = self._tensor()
            if name in header.tensors:
                raise _NoGguf(f"it has two tensors called {name}")
            header.tensors[name] = place
        alignment = _count(header.values.get("general.alignment", 32))
        if not 0 < alignment <= 1 << 20:
            raise _NoGguf(f"its tensors are aligned to {alignment} bytes")
        header.data = -(-self._stream.tell() // alignment) * alignment
        return header

    def _tensor(self) -> tuple[str, tuple[int, int]]:
        from gguf.constants import GGML_QUANT_SIZES

        name, axes = self._string(_LONGEST_NAME), self._one("I")
        if axes > 8:
            raise _NoGguf(f"{name} has {axes:,} axes")
        count = 1
        for _ in range(axes):
            count *= self._one("Q")
        kind, first = self._one("I"), self._one("Q")
        known = {int(key): sizes for key, sizes in GGML_QUANT_SIZES.items()}
        if kind not in known:
            raise _NoGguf(f"{name} is stored as type {kind}, which is not known")
        block, width = known[kind]
        return name, (first, count // block * width)

    def _value(self, kind: int, depth: int = 0) -> Any:
        """A single value; None for a list, which is only passed over."""
        if kind in _SCALARS:
            return self._one(_SCALARS[kind])
        if kind == _STRING:
            return self._string(self._size)
        if kind != _LIST or depth > _DEEPEST:
            raise _NoGguf(f"its header holds a value of type {kind}")
        inner, count = self._one("I"), self._one("Q")
        if inner in _SCALARS:
            self._skip(count * struct.calcsize(_SCALARS[inner]))
        else:
            for _ in range(count):
                self._value(inner, depth + 1)
        return None

    def _string(self, longest: int) -> str:
        length = self._one("Q")
        if length > longest:
            raise _NoGguf(f"its header holds a text of {length:,} bytes")
        return self._bytes(length).decode("utf-8", "replace")

    def _one(self, letter: str) -> Any:
        return struct.unpack(self._order + letter, self._bytes(struct.calcsize(letter)))[0]

    def _bytes(self, count: int) -> bytes:
        found = self._stream.read(count) if count <= self._size else b""
        if len(found) != count:
            raise _NoGguf(f"it ends at byte {self._size:,}, inside its header")
        return found

    def _skip(self, count: int) -> None:
        if self._stream.tell() + count > self._size:
            raise _NoGguf(f"it ends at byte {self._size:,}, inside its header")
        self._stream.seek(count, 1)


def _count(value: Any) -> int:
    return value if type(value) is int else 0


def _damaged(path: Path, why: str) -> AceError:
    return AceError(f"{path} cannot be imported: {why}.", _WHOLE)
