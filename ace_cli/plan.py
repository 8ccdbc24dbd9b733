"""What a run will do and need, known before it starts."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ace_cli.errors import AceError

if TYPE_CHECKING:
    from ace_cli.model.streamed import StreamedModel
    from ace_cli.patterns import Pattern

#: Below this share of the block weights a "pruned" model would be mostly dense: stop instead.
MINIMUM_COVERAGE = 0.9
_LIBRARIES = 500_000_000


@dataclass(frozen=True)
class Plan:
    """Sizes in elements and bytes; ``shapes`` are the slots', ``coverage`` the share of the blocks' weights in them."""

    model: str
    architecture: str
    parameters: int
    blocks: int
    shapes: dict[str, tuple[int, int]]
    slot_weights: int
    pruned_weights: int
    coverage: float
    left_dense: list[str]
    copied: list[str]
    tokens: int
    device: str
    dtype: str
    host_bytes: int
    device_bytes: int
    disk_bytes: int


def make_plan(model: StreamedModel, patterns: Mapping[str, Pattern], tokens: int, hidden_windows: int) -> Plan:
    """Check the patterns against every shape and the slots against the model; then add up.

    Raises AceError where a pattern does not fit a weight or the slots cover too little of the blocks.
    """
    slots = {slot.name: slot.shape for block in model.blocks for slot in block.slots}
    misfits = [f"{name} {shape}: {why}" for name, shape in slots.items() if (why := patterns[name].misfit(*shape))]
    if misfits:
        more = f" (and {len(misfits) - 1} more)" if len(misfits) > 1 else ""
        raise AceError(f"sparsity does not fit {misfits[0]}{more}.", "Choose a pattern whose M divides the inputs.")
    coverage, left = _coverage(model)
    if coverage < MINIMUM_COVERAGE:
        raise AceError(
            f"Only {coverage:.0%} of the block weights of {type(model.skeleton).__name__} can be pruned; the rest "
            f"is in {', '.join(left)}.",
            "Give its class a row in STORED_TRANSPOSED of ace_cli/model/slots.py, or exclude it to leave it dense.",
        )
    if faults := model.faults():
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise AceError(f"{model.checkpoint.folder}: {faults[0]}{more}.", "Fetch the files again.")
    host, device = _memory(model, hidden_windows)
    return Plan(
        model=str(model.checkpoint.folder),
        architecture=type(model.skeleton).__name__,
        parameters=sum(entry.numel for entry in model.checkpoint.tensors.values()),
        blocks=len(model.blocks),
        shapes=slots,
        slot_weights=sum(rows * columns for rows, columns in slots.values()),
        pruned_weights=sum(patterns[name].pruned(*shape) for name, shape in slots.items()),
        coverage=coverage,
        left_dense=left,
        copied=_copied(model),
        tokens=tokens,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        host_bytes=host,
        device_bytes=device,
        disk_bytes=model.checkpoint.nbytes,
    )


def check_disk(folder: Path, needed: int) -> None:
    """AceError unless the file system of ``folder`` has room for the checkpoint."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    reserved = sum(file.stat().st_blocks * 512 for file in folder.glob("checkpoint.partial/*"))
    free = shutil.disk_usage(existing).free + reserved
    if free < needed * 1.01:
        raise AceError(
            f"The checkpoint needs {needed / 1e9:.1f} GB, {existing} has {free / 1e9:.1f} GB free.",
            "Free some space or choose another output_dir.",
        )


def _coverage(model: StreamedModel) -> tuple[float, list[str]]:
    """Share of the blocks' matrices that are pruned or left as the user said, and the names of those left, with why."""
    covered = sum(rows * columns for block in model.blocks for rows, columns in (slot.shape for slot in block.slots))
    left = {name: left for block in model.blocks for name, left in block.left.items()}
    chosen = sum(left.count for left in left.values() if left.chosen)
    names = {f"{re.sub(r'[.][0-9]+(?=[.]|$)', '.*', name)} ({left.why})" for name, left in left.items()}
    return (covered + chosen) / max(1, covered + sum(left.count for left in left.values())), sorted(names)


def _copied(model: StreamedModel) -> list[str]:
    """What the files hold beside the text decoder."""
    copied = [f"{path} ({type(other).__name__}), no part of the text decoder" for path, other in model.others.items()]
    if unused := model.unused:
        copied.append(f"{len(unused)} tensors that {type(model.skeleton).__name__} does not read, like {unused[0]}")
    return copied


def _memory(model: StreamedModel, hidden_windows: int) -> tuple[int, int]:
    """Expected peak bytes while pruning, on the host and on the device.

    The stem is in memory while the windows are embedded, then blocks one at a time: computed with, and, as stored, what
    of it is pruned and the next one that is read ahead. Scores and masks of the largest slot come on top, and hidden
    states stay throughout; a second time while a layer of experts is shown to its experts one by one.
    """
    entries = model.checkpoint.tensors
    width = model.dtype.itemsize
    block = max(sum(entries[key].numel for key in block.files) for block in model.blocks) * width
    stored = max(sum(entries[key].nbytes for key in block.files) for block in model.blocks)
    slots = [slot.shape for block_ in model.blocks for slot in block_.slots]
    largest = max(rows * columns for rows, columns in slots) * 4
    hidden_size = model.skeleton.config.get_text_config().hidden_size
    hidden = hidden_windows * hidden_size * width * (2 if any(block_.experts for block_ in model.blocks) else 1)
    active = (
        min(hidden_windows, model.batch_tokens) * (4 * max(max(shape) for shape in slots) + 6 * hidden_size) * width
    )
    embeddings = model.skeleton.get_input_embeddings().weight.numel() * width
    working = hidden + max(embeddings, block + stored + 4 * largest + active)
    if model.device.type == "cpu":
        return _LIBRARIES + working + stored, 0
    return _LIBRARIES + 2 * stored, working
