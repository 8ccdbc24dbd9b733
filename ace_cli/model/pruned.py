"""A pruned checkpoint: what is written beside its weights, and how its pattern is checked again from the files.

The folder is a plain Hugging Face one. config.json gains a neutral "pruning" entry: engines refuse, or misread, a
``quantization_config`` or ``sparsity_config``. pruning.json lists every pruned weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ace_cli.errors import AceError
from ace_cli.model.files import Checkpoint, copy_other_files, read_json, write_index
from ace_cli.model.slots import Slot, View
from ace_cli.patterns import Pattern, Ratio, Scope, parse_sparsity

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "pruning.json"


def write_metadata(
    source: Checkpoint,
    folder: Path,
    summary: dict[str, Any],
    slots: Iterable[dict[str, Any]],
    card: str,
    identity: str = "",
) -> None:
    """Everything but the weights: configuration, tokenizer, index, manifest and model card.

    ``identity`` tells the run that made it from any other.
    """
    write_index(source, folder)
    copy_other_files(source.folder, folder)
    config = {**source.config(), "pruning": summary}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    manifest = {"schema_version": 1, "identity": identity, **summary, "slots": list(slots)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def manifest_entry(slot: Slot, pattern: Pattern, zeros: int) -> dict[str, Any]:
    """One pruned weight, as pruning.json records it. Ratios are kept exact ("1/2").

    Where the weight is not the stored tensor as it stands: ``tensor`` is its name, ``expert`` its place in it, and it
    is stored (inputs, outputs) if ``transposed``.
    """
    entry: dict[str, Any] = {"name": slot.name, "shape": list(slot.shape), "pattern": str(pattern), "zeros": zeros}
    if isinstance(pattern, Ratio):
        entry |= {"pattern": str(pattern.p), "scope": pattern.scope.value}
    if slot.in_file.index is not None:
        entry |= {"tensor": slot.key, "expert": slot.in_file.index}
    return entry | ({"transposed": True} if slot.in_file.transposed else {})


class Violation(Exception):
    """A stored weight that is not what it should be."""


@dataclass(frozen=True)
class Pruned:
    """Where a pruned weight lies in the files, and what it must look like."""

    key: str
    in_file: View
    pattern: Pattern


def count_zeros(checkpoint: Checkpoint, pruned: Mapping[str, Pruned]) -> dict[str, int]:
    """Re-read every pruned weight: name -> its zeros. Raises Violation at the first that breaks its pattern."""
    import numpy as np

    zeros = {}
    last: tuple[str, Tensor] | None = None
    for name, weight in pruned.items():
        if weight.key not in checkpoint.tensors:
            raise Violation(f"{weight.key}: not in the checkpoint")
        if last is None or last[0] != weight.key:  # one tensor may hold many experts
            last = (weight.key, checkpoint.read(weight.key))
        weight_OI = weight.in_file(last[1])
        if problem := weight.pattern.violation(weight_OI):
            raise Violation(f"{name} breaks {weight.pattern}: {problem}")
        zeros[name] = int(np.count_nonzero((weight_OI == 0).numpy()))
    return zeros


def verify(folder: Path) -> int:
    """Check a finished checkpoint against its manifest; returns how many weights were checked.

    Raises Violation at the first weight that is not as it was written, AceError if the folder cannot be read at all.
    """
    if not (folder / MANIFEST).is_file():
        raise AceError(f"{folder} has no {MANIFEST}.", "Give the checkpoint folder of an ace-prune run.")
    slots = {slot["name"]: slot for slot in read_json(folder / MANIFEST)["slots"]}
    pruned = {name: Pruned(slot.get("tensor", name), _view(slot), _pattern(slot)) for name, slot in slots.items()}
    checkpoint = Checkpoint(folder)
    for name, slot in slots.items():
        found = _shape(checkpoint, pruned[name])
        if found is not None and list(found) != slot["shape"]:
            raise Violation(f"{name}: shape {list(found)}, pruned as {slot['shape']}")
    for name, zeros in count_zeros(checkpoint, pruned).items():
        if zeros != slots[name]["zeros"]:
            raise Violation(f"{name}: {zeros:,} zeros, {slots[name]['zeros']:,} were written")
    return len(slots)


def _view(slot: dict[str, Any]) -> View:
    return View(slot.get("expert"), slot.get("transposed", False))


def _shape(checkpoint: Checkpoint, weight: Pruned) -> tuple[int, ...] | None:
    """The stored weight's shape, None if it is not there."""
    import torch

    entry = checkpoint.tensors.get(weight.key)
    return weight.in_file.shape_in(torch.empty(entry.shape, device="meta")) if entry else None


def _pattern(slot: dict[str, Any]) -> Pattern:
    if "scope" in slot:
        return Ratio(Fraction(slot["pattern"]), Scope(slot["scope"]))
    return parse_sparsity(slot["pattern"], Scope.row)
