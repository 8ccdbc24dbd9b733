"""What rounding makes of a model, known before work begins."""

from __future__ import annotations

from torch import nn

from ace_cli.core.errors import AceError
from ace_cli.core.registry import name_of
from ace_cli.export.quantised import stored_entries
from ace_cli.methods.quantize.base import Quantize
from ace_cli.model.slots import Slot, View
from ace_cli.model.streamed import StreamedModel


def slots_of(model: StreamedModel) -> list[Slot]:
    """Every slot of the model."""
    return [slot for block in model.blocks for slot in block.slots]


def check_grid(quantize: Quantize, model: StreamedModel) -> None:
    """AceError, naming a weight, if its inputs are no whole groups, or the format has no place for it."""
    name, group = name_of("quantize", quantize), quantize.group
    for slot in slots_of(model):
        columns = slot.shape[1]
        if not isinstance(slot.module, nn.Linear) or (slot.in_file, slot.in_module) != (View(), View()):
            raise AceError(
                f"quantize={name}: {slot.name} is no linear layer of its own, and compressed-tensors stores no other.",
                "Exclude such weights to leave them as they are (exclude=*experts*), or use quantize=none.",
            )
        if group is not None and columns % group:
            fits = [str(size) for size in (128, 96, 64, 48, 32, 24, 16) if columns % size == 0]
            raise AceError(
                f"quantize.group={group} does not divide the {columns} inputs of {slot.name}.",
                f"Use quantize.group={fits[0]}." if fits else "Use quantize.group=null: one scale a row.",
            )


def rounded(quantize: Quantize, model: StreamedModel) -> str:
    """Bits and bytes, in words: "int4, 64 inputs a scale: 106.2 M weights at 4.25 bits, 0.54 GB -> 0.17 GB"."""
    slots, tensors = slots_of(model), model.checkpoint.tensors
    weights = sum(rows * columns for rows, columns in (slot.shape for slot in slots))
    bits = sum(slot.shape[0] * slot.shape[1] * quantize.bits_per_weight(slot.shape[1]) for slot in slots) / weights
    share = "one scale a row" if quantize.group is None else f"{quantize.group} inputs a scale"
    entries = stored_entries(tensors, [slot.key for slot in slots], quantize.grid())
    stored = sum(entry.nbytes for entry in entries.values())
    return (
        f"{name_of('quantize', quantize)}, {share}: {weights / 1e6:,.1f} M weights at {bits:.2f} bits, "
        f"{model.checkpoint.nbytes / 1e9:.3f} GB -> {stored / 1e9:.3f} GB"
    )
