"""Checkpoints of compressed-tensors' ``pack-quantized`` that this tool wrote, read as if they were plain ones.

A Hugging Face folder that transformers loads. A quantised weight X.weight (O, I) is there as X.weight_packed,
codes in int32 (O, ceil(I bits / 32)); X.weight_scale (O, G), one scale for each group of inputs; X.weight_shape.
quantised.json tells the dtype and shape that every tensor had, and the grid.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ace_cli.core.errors import AceError
from ace_cli.core.json_reader import read_object
from ace_cli.core.steps import NOBODY, Steps
from ace_cli.methods.grids import Grid
from ace_cli.model.compressed_tensors_api import unpacked
from ace_cli.model.files import Checkpoint
from ace_cli.model.header import DTYPES, TensorEntry
from ace_cli.model.plain_again import write_plain

if TYPE_CHECKING:
    from torch import Tensor

QUANTISED = "quantised.json"
FORMAT = "ace-quantised-1"
#: In config.json, what the plain checkpoint's does not have.
SETTINGS = "quantization_config"
_HINT = "Quantise the model again."


def is_quantised(folder: Path) -> bool:
    """Whether the folder holds a checkpoint that this tool quantised."""
    return (folder / QUANTISED).is_file()


def parts(name: str) -> tuple[str, str, str]:
    """What a quantised tensor is stored as: codes, scales, shape."""
    return f"{name}_packed", f"{name}_scale", f"{name}_shape"


class QuantisedCheckpoint(Checkpoint):
    """``tensors`` are those that were quantised, as they were; ``stored`` what the files hold of them.

    Raises AceError where the folder is not whole, or of another version's format.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        told = read_object(folder / QUANTISED, _HINT)
        if told.get("format") != FORMAT:
            raise AceError(f"{folder} is quantised as {told.get('format')}.", f"This version reads {FORMAT}.")
        self.stored = self.tensors
        try:
            self.grid = Grid(int(told["bits"]), told["group"])
            self.tensors = {name: self._entry(name, **entry) for name, entry in told["tensors"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise AceError(f"{folder / QUANTISED} does not tell shapes, dtypes and grid.", _HINT) from None

    def _entry(self, name: str, dtype: str, shape: list[int], quantised: bool) -> TensorEntry:
        lost = [part for part in (parts(name) if quantised else [name]) if part not in self.stored]
        if lost:
            raise AceError(f"{self.folder}: no file holds {lost[0]}.", _HINT)
        at = self.stored[parts(name)[0] if quantised else name]
        return TensorEntry(name, dtype, tuple(shape), at.file, at.start, math.prod(shape) * DTYPES[dtype][1])

    def holds_codes(self, name: str) -> bool:
        """Whether the tensor is stored as codes and scales."""
        return name not in self.stored

    @contextmanager
    def opened(self, name: str) -> Iterator[Callable[[int, int], Tensor]]:
        """As of a plain checkpoint; a quantised matrix is unpacked whole."""
        if not self.holds_codes(name):
            with super().opened(name) as read:
                yield read
            return
        flat = self._values(name).view(-1)
        yield lambda first, count: flat[first : first + count]

    def _values(self, name: str) -> Tensor:
        import torch

        entry = self.tensors[name]
        rows, columns = entry.shape
        codes_OP, scale_OG, shape = (self._plain.read(part) for part in parts(name))
        fits = codes_OP.shape == (rows, -(-columns * self.grid.bits // 32)) and shape.tolist() == [rows, columns]
        if not fits or scale_OG.shape != (rows, columns // self.grid.width(columns)):
            raise AceError(f"{self.folder}: {name} is damaged: its parts do not fit.", _HINT)
        codes_OI = unpacked(codes_OP, self.grid.bits, (rows, columns))
        return self.grid.values(codes_OI, scale_OG, getattr(torch, DTYPES[entry.dtype][0]))

    @cached_property
    def _plain(self) -> Checkpoint:
        return Checkpoint(self.folder)

    def config(self) -> dict[str, Any]:
        """config.json of the plain checkpoint."""
        return {name: value for name, value in super().config().items() if name != SETTINGS}

    def _read_fingerprint(self) -> str:
        told = (self.folder / QUANTISED).read_bytes()
        return hashlib.sha256(told + self._plain.fingerprint().encode()).hexdigest()


def dequantise_folder(source: Path, target: Path, steps: Steps = NOBODY) -> None:
    """The plain checkpoint again, into a new folder. Memory is one tensor, and so is a step."""
    quantised = QuantisedCheckpoint(source)
    write_plain(quantised, target, (QUANTISED,), steps)
    (target / "config.json").write_text(json.dumps(quantised.config(), indent=2) + "\n", encoding="utf-8")
