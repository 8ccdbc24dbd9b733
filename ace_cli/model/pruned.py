"""A pruned checkpoint: what is written beside its weights, and how its pattern is checked again from the files.

The folder is a plain Hugging Face one. config.json gains a neutral "pruning" entry: engines refuse, or misread, a
``quantization_config`` or ``sparsity_config``. pruning.json lists every pruned weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from ace_cli.errors import AceError
from ace_cli.model.files import Checkpoint, copy_other_files, read_json, write_index
from ace_cli.patterns import Pattern, Ratio, Scope, parse_sparsity

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


def manifest_entry(name: str, shape: tuple[int, int], pattern: Pattern, zeros: int) -> dict[str, Any]:
    """One pruned weight, as pruning.json records it. Ratios are kept exact ("1/2")."""
    entry: dict[str, Any] = {"name": name, "shape": list(shape), "pattern": str(pattern), "zeros": zeros}
    if isinstance(pattern, Ratio):
        entry |= {"pattern": str(pattern.p), "scope": pattern.scope.value}
    return entry


class Violation(Exception):
    """A stored weight that is not what it should be."""


def count_zeros(checkpoint: Checkpoint, patterns: Mapping[str, Pattern]) -> dict[str, int]:
    """Re-read every pruned weight: name -> its zeros. Raises Violation at the first that breaks its pattern."""
    zeros = {}
    for name, pattern in patterns.items():
        if name not in checkpoint.tensors:
            raise Violation(f"{name}: not in the checkpoint")
        weight_OI = checkpoint.read(name)
        if problem := pattern.violation(weight_OI):
            raise Violation(f"{name} breaks {pattern}: {problem}")
        zeros[name] = int((weight_OI == 0).view(-1).byte().sum())
    return zeros


def verify(folder: Path) -> int:
    """Check a finished checkpoint against its manifest; returns how many weights were checked.

    Raises Violation at the first weight that is not as it was written, AceError if the folder cannot be read at all.
    """
    if not (folder / MANIFEST).is_file():
        raise AceError(f"{folder} has no {MANIFEST}.", "Give the checkpoint folder of an ace-prune run.")
    slots = {slot["name"]: slot for slot in read_json(folder / MANIFEST)["slots"]}
    checkpoint = Checkpoint(folder)
    for name, slot in slots.items():
        if name in checkpoint.tensors and list(checkpoint.tensors[name].shape) != slot["shape"]:
            raise Violation(f"{name}: shape {list(checkpoint.tensors[name].shape)}, pruned as {slot['shape']}")
    for name, zeros in count_zeros(checkpoint, {name: _pattern(slot) for name, slot in slots.items()}).items():
        if zeros != slots[name]["zeros"]:
            raise Violation(f"{name}: {zeros:,} zeros, {slots[name]['zeros']:,} were written")
    return len(slots)


def _pattern(slot: dict[str, Any]) -> Pattern:
    if "scope" in slot:
        return Ratio(Fraction(slot["pattern"]), Scope(slot["scope"]))
    return parse_sparsity(slot["pattern"], Scope.row)
