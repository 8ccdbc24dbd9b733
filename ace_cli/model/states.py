"""A few tensors and what is said of them in one file, whole or not there: states that a run comes back to."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


def write_state(partial: Path, file: Path, tensors: Mapping[str, Tensor], words: Mapping[str, str]) -> None:
    """Written to ``partial`` and renamed into place. Raises OSError where the system refuses, as when a disk is full;
    then nothing is left there."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, dict(words))
    except SafetensorError as fault:  # it hides the system's number among its words
        partial.unlink(missing_ok=True)
        number = re.search(r"os error (\d+)", str(fault))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from fault
    partial.replace(file)
