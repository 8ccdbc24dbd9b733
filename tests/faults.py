"""What befalls a run or its files, for tests of what becomes of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch import Tensor

from ace_cli.model.files import Checkpoint, CheckpointWriter


@contextmanager
def stopped_before(part: str) -> Iterator[None]:
    """What runs in here is interrupted when a tensor with ``part`` in its name is to be written."""
    write = CheckpointWriter.write

    def failing(self: CheckpointWriter, name: str, tensor: Tensor) -> None:
        if part in name:
            raise KeyboardInterrupt
        write(self, name, tensor)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CheckpointWriter, "write", failing)
        yield


def flip_a_bit(folder: Path, name: str) -> None:
    """In the first byte of a tensor of a checkpoint in one file."""
    file = folder / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[Checkpoint(folder).tensors[name].start] ^= 1
    file.write_bytes(raw)
