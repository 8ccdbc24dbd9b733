"""A checkpoint's folder, however it is stored."""

from __future__ import annotations

from pathlib import Path

from ace_cli.model.files import Checkpoint
from ace_cli.model.packed import PackedCheckpoint, is_packed
from ace_cli.model.quantised import QuantisedCheckpoint, is_quantised


def open_folder(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder``: packed, quantised or plain."""
    if is_quantised(folder):
        return QuantisedCheckpoint(folder)
    return PackedCheckpoint(folder) if is_packed(folder) else Checkpoint(folder)
