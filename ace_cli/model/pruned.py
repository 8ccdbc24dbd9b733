"""A pruned checkpoint: what is written beside its weights, and how its pattern is checked again from the files.

The folder is a plain Hugging Face one. config.json gains a neutral "pruning" entry: engines refuse, or misread, a
``quantization_config`` or ``sparsity_config``. pruning.json lists every pruned weight.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ace_cli.core.errors import AceError, first_line
from ace_cli.core.json_reader import read_object
from ace_cli.core.typed_json import typed
from ace_cli.kernels.selection import loops_for
from ace_cli.kernels.threads import LARGEST_PIECE
from ace_cli.methods.grids import Grid
from ace_cli.methods.patterns import Pattern, Ratio, Scope, parse_sparsity
from ace_cli.model.adapted import ADAPTER_FILES
from ace_cli.model.files import Checkpoint, hash_of_tensor, shard_plan, write_index
from ace_cli.model.folder import INDEX, copy_other_files, other_files
from ace_cli.model.header import TensorEntry
from ace_cli.model.opening import open_folder
from ace_cli.model.slots import Slot, View

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "pruning.json"
#: Its entry that says what training the whole model did, and so that it is done.
RECOVERED = "recovery"


@dataclass(frozen=True)
class Smaller:
    """Beside the weights of a model that got smaller: the tensors' entries, config.json, what its "pruning" entry adds,
    other files by name, and what pruning.json tells of every cut.
    """

    entries: Mapping[str, TensorEntry]
    config: Mapping[str, Any]
    noted: Mapping[str, Any]
    files: Mapping[str, str]
    manifest: list[dict[str, Any]]


def write_metadata(
    source: Checkpoint,
    folder: Path,
    summary: dict[str, Any],
    slots: Iterable[dict[str, Any]],
    card: str,
    identity: str = "",
    cut: Smaller | None = None,
) -> None:
    """Everything but the weights: configuration, tokenizer, index, manifest and model card.

    ``identity`` tells the run that made it from any other. ``cut``: what else a model that got smaller needs.
    """
    write_index(source.tensors if cut is None else cut.entries, folder)
    copy_other_files(source.folder, folder)
    config = {**(source.config() if cut is None else cut.config), "pruning": summary}
    if cut is not None:
        config["pruning"] = {**summary, **cut.noted}
        for name, text in cut.files.items():
            (folder / name).write_text(text, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    adapter = [name for name in ADAPTER_FILES if (folder / name).is_file()]
    files = [*checkpoint_files(source, cut), *adapter]
    manifest = {"schema_version": 1, "identity": identity, **summary, "slots": list(slots), "files": files}
    manifest |= {"cuts": cut.manifest} if cut is not None else {}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def checkpoint_files(source: Checkpoint, cut: Smaller | None = None) -> list[str]:
    """Everything that is written into the folder of a pruned ``source``, weights and all, by the paths in it."""
    shards = shard_plan(source.tensors if cut is None else cut.entries)
    index, code = [INDEX] if len(shards) > 1 else [], [] if cut is None else cut.files
    return sorted({*shards, *index, *code, *other_files(source.folder), "config.json", MANIFEST, "README.md"})


@dataclass(frozen=True)
class Entry:
    """One pruned weight in pruning.json: see ``manifest_entry``."""

    name: str
    shape: tuple[int, int]
    pattern: str
    zeros: int
    scope: str | None = None
    tensor: str | None = None
    expert: int | None = None
    transposed: bool = False

    def weight(self) -> Pruned:
        """Where it lies and what it must look like. Raises ValueError or AceError where that says nothing."""
        rows, columns = self.shape
        if min(rows, columns) < 1 or not 0 <= self.zeros <= rows * columns or (self.expert or 0) < 0:
            raise ValueError(f"{self.zeros} zeros of {rows} x {columns} weights")
        if not re.fullmatch(r"\d{1,9}:\d{1,9}" if self.scope is None else r"\d{1,400}(/\d{1,400})?", self.pattern):
            raise ValueError(f"{self.pattern[:40]} is no pattern")
        pattern = parse_sparsity(self.pattern, Scope.row)
        if self.scope is not None:
            pattern = Ratio(Fraction(self.pattern), Scope(self.scope))
        return Pruned(self.tensor or self.name, View(self.expert, self.transposed), pattern)


@dataclass(frozen=True)
class CutTensor:
    """A tensor that got smaller, as it was written."""

    shape: list[int]
    xxh3: str


@dataclass(frozen=True)
class CutEntry:
    """The units of one weight: ``kept`` are those that stay of ``units``; it has ``fewer`` weights than it had."""

    name: str
    units: int
    pattern: str
    fewer: int
    kept: list[int]
    tensors: dict[str, CutTensor]


@dataclass(frozen=True)
class Manifest:
    """What pruning.json tells. ``files`` are all that were written with it; None where an older version wrote it.

    ``grid``: what every pruned weight was rounded to, None where nothing was.
    """

    identity: str
    slots: dict[str, Entry]
    files: list[str] | None
    cuts: list[CutEntry]
    grid: Grid | None = None

    def weights(self) -> dict[str, Pruned]:
        """Name -> where the weight lies and what it must look like."""
        return {name: entry.weight() for name, entry in self.slots.items()}


def read_manifest(folder: Path) -> Manifest:
    """The folder's pruning.json. Raises AceError if it is none, or lists no pruned weight."""
    file, hint = folder / MANIFEST, "Prune the model again, into another output_dir."
    found = read_object(file, hint)
    try:
        slots = typed(list[Entry], found.get("slots"), "slots")
        for place, entry in enumerate(slots):
            try:
                entry.weight()
            except (ValueError, ArithmeticError, AceError) as fault:
                raise ValueError(f"slots[{place}]: {first_line(fault)}") from None
        by_name = {entry.name: entry for entry in slots}
        cuts = typed(list[CutEntry], found.get("cuts", []), "cuts")
        if not (slots or cuts) or len(by_name) < len(slots):
            raise ValueError("it lists a weight twice" if slots else "it lists no pruned weight")
        files = typed(list[str], found["files"], "files") if "files" in found else None
        grid = typed(Grid, found["grid"], "grid") if "grid" in found else None
        return Manifest(typed(str, found.get("identity"), "identity"), by_name, files, cuts, grid)
    except ValueError as fault:
        raise AceError(f"{file} is no list of pruned weights: {fault}.", hint) from None


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

    @property
    def in_pieces(self) -> bool:
        """Whether some rows of it can be read and looked at without the others."""
        return self.pattern.by_rows and not self.in_file.transposed


def count_zeros(checkpoint: Checkpoint, pruned: Mapping[str, Pruned]) -> dict[str, int]:
    """Re-read every pruned weight: name -> its zeros. Raises Violation at the first that breaks its pattern."""
    zeros = {}
    last: tuple[str, Tensor] | None = None
    for name, weight in pruned.items():
        if weight.key not in checkpoint.tensors:
            raise Violation(f"{weight.key}: not in the checkpoint")
        if weight.in_pieces:
            zeros[name] = _zeros_by_rows(checkpoint, name, weight)
            continue
        if last is None or last[0] != weight.key:  # one tensor may hold many experts
            last = (weight.key, checkpoint.read(weight.key))
        zeros[name] = _zeros(name, weight, weight.in_file(last[1]))
    return zeros


class Rereading:
    """Counts the zeros of weights while others are still being pruned, on a thread of its own."""

    def __init__(self, folder: Path, pruned: Mapping[str, Pruned]) -> None:
        """``folder`` has its files, in their full length, but for now not all of their weights."""
        self._checkpoint = Checkpoint(folder, bare=True)
        self._left = dict(pruned)
        self._thread = ThreadPoolExecutor(1, "verify")
        self._found: list[Future[dict[str, int]]] = []

    def __enter__(self) -> Rereading:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def check(self, names: Iterable[str]) -> None:
        """These weights are on disk. Those that are not read in pieces, beside a block that fills the memory, wait."""
        now = {name: self._left.pop(name) for name in names if self._left[name].in_pieces}
        self._found.append(self._thread.submit(count_zeros, self._checkpoint, now))

    def zeros(self) -> dict[str, int]:
        """All weights are on disk: name -> its zeros. Raises Violation if one breaks its pattern."""
        zeros = {name: count for found in self._found for name, count in found.result().items()}
        return zeros | count_zeros(self._checkpoint, self._left)


def _zeros_by_rows(checkpoint: Checkpoint, name: str, weight: Pruned) -> int:
    """Read and looked at some rows at a time, in a CPU's caches."""
    *_, rows, columns = checkpoint.tensors[weight.key].shape
    before, step = rows * (weight.in_file.index or 0), max(1, LARGEST_PIECE // columns)
    loops, zeros = loops_for(rows * columns), 0
    with checkpoint.opened(weight.key) as read:
        for first in range(0, rows, step):
            count = min(step, rows - first)
            values_RI = read((before + first) * columns, count * columns).view(count, columns)
            zeros += _zeros(name, weight, values_RI, first, loops)
    return zeros


def _zeros(name: str, weight: Pruned, values_OI: Tensor, first: int = 0, loops: ModuleType | None = None) -> int:
    """Zeros of stored ``values_OI``, the weight or its rows from ``first`` on; Violation if they break the pattern."""
    zeros, problem = weight.pattern.check(values_OI, first, loops)
    if problem:
        raise Violation(f"{name} breaks {weight.pattern}: {problem}")
    return zeros


def verify(folder: Path) -> int:
    """Check a finished checkpoint against its manifest; returns how many weights were checked.

    Raises Violation at the first weight that is not as it was written, AceError if the folder cannot be read at all.
    """
    if not (folder / MANIFEST).is_file():
        raise AceError(f"{folder} has no {MANIFEST}.", "Give the checkpoint folder of an ace-prune run.")
    manifest = read_manifest(folder)
    pruned, checkpoint = manifest.weights(), open_folder(folder)
    for name, entry in manifest.slots.items():
        found = _shape(checkpoint, pruned[name])
        if found is not None and found != entry.shape:
            raise Violation(f"{name}: shape {list(found)}, pruned as {list(entry.shape)}")
    for name, zeros in count_zeros(checkpoint, pruned).items():
        if zeros != manifest.slots[name].zeros:
            raise Violation(f"{name}: {zeros:,} zeros, {manifest.slots[name].zeros:,} were written")
    if manifest.grid is not None:
        check_grid(checkpoint, pruned, manifest.grid)
    check_cuts(checkpoint, manifest.cuts)
    return len(pruned) + len(manifest.cuts)


def check_grid(checkpoint: Checkpoint, pruned: Mapping[str, Pruned], grid: Grid) -> None:
    """Re-read every rounded weight. Raises Violation at the first that is not codes times a scale for each group."""
    for name, weight in pruned.items():
        values_OI = weight.in_file(checkpoint.read(weight.key))
        if values_OI.shape[1] % grid.width(values_OI.shape[1]):
            raise Violation(f"{name}: {values_OI.shape[1]} inputs are no groups of {grid.group}")
        try:
            grid.scales_of(values_OI)
        except ValueError as fault:
            raise Violation(f"{name}: {fault}") from None


def check_cuts(checkpoint: Checkpoint, cuts: Iterable[CutEntry]) -> None:
    """Re-read tensors that got smaller. Raises Violation at the first whose shape or bytes are not as written."""
    for key, written in ((key, written) for cut in cuts for key, written in cut.tensors.items()):
        if key not in checkpoint.tensors:
            raise Violation(f"{key}: not in the checkpoint")
        shape = list(checkpoint.tensors[key].shape)
        if shape != written.shape:
            raise Violation(f"{key}: shape {shape}, cut to {written.shape}")
        if hash_of_tensor(checkpoint.read(key)) != written.xxh3:
            raise Violation(f"{key}: not the bytes that were written")


def _shape(checkpoint: Checkpoint, weight: Pruned) -> tuple[int, ...] | None:
    """The stored weight's shape, None if it is not there."""
    import torch

    entry = checkpoint.tensors.get(weight.key)
    return weight.in_file.shape_in(torch.empty(entry.shape, device="meta")) if entry else None
