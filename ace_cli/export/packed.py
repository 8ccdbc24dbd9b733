"""``pack=true``: a checkpoint with many zeros in fewer bytes, exact to unpack.

Every matrix that takes fewer bytes as a bit mask and values is stored so, every other tensor as it is. Of weights that
``quantize=`` rounded the values are codes of 8 bits, with a scale for each group. What was written is read again and
compared bit for bit before it gets its name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ace_cli.core.errors import AceError
from ace_cli.core.stage import Progress, Stage
from ace_cli.export.quantised import scales_in
from ace_cli.model import disk
from ace_cli.model.files import Checkpoint, shard_plan
from ace_cli.model.header import DTYPES, TensorEntry
from ace_cli.model.packed import PACKED, PackedCheckpoint, compressed, is_packed, told, zstandard
from ace_cli.model.plain_again import check_reads_back, copy_beside

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.grids import Grid

_PACKABLE = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Pack(Stage):
    """The packed form of a checkpoint; with ``zstd`` compressed on top of it."""

    name: ClassVar[str] = "packed"
    zstd: bool = False

    def identity(self) -> dict[str, Any]:
        return {"zstd": self.zstd, "codes": True}

    def refusal(self, source: Path) -> str | None:
        if self.zstd:
            zstandard()
        return None

    def disk_bytes(self, source_bytes: int) -> int:
        return source_bytes  # at most: it may all be dense

    def run(self, source: Path, target: Path, progress: Progress) -> dict[str, Any]:
        checkpoint = Checkpoint(source)
        parts = _Parts(checkpoint, self.zstd, grids_of(source))
        with progress("packing", len(checkpoint.tensors)) as step:
            for file, entries in shard_plan(checkpoint.tensors).items():
                _write_shard(parts, entries, target / file.replace("model", "packed", 1), step)
        _write_rest(checkpoint, target)
        return _facts(checkpoint, target, self.zstd)

    def summary(self, facts: dict[str, Any]) -> str:
        files, matrices = (facts[f"packed_{of}"] / max(1, facts[f"dense_{of}"]) for of in ("bytes", "matrix_bytes"))
        return (
            f"{facts['packed_bytes'] / 1e9:.2f} GB, {files:.3f} of the dense files; its {facts['matrices']} packed "
            f"matrices take {matrices:.3f} of their dense bytes{', as codes of 8 bits' if facts['of_codes'] else ''}"
        )

    def verify(self, source: Path, target: Path) -> None:
        check_reads_back(Checkpoint(source), PackedCheckpoint(target))


def pack_folder(source: Path, target: Path, zstd: bool = False) -> dict[str, Any]:
    """Pack the checkpoint in ``source`` into the folder ``target``, replacing a packed one; what came of it.

    Bytes of all weight files, and of the ``matrices`` that are packed, before and after. Memory is two tensors. Raises
    AceError for a source that cannot be read or is packed already, a target that is something else, too little disk,
    and a file that does not read back as it was written: then ``target`` is as it was.
    """
    from contextlib import nullcontext

    stage = Pack(zstd)
    _check(source, target)
    stage.refusal(source)
    work = target.with_name(f"{target.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        facts = stage.run(source, work, lambda *_: nullcontext(lambda: None))
        stage.verify(source, work)
    except AceError:
        shutil.rmtree(work)
        raise
    shutil.rmtree(target, ignore_errors=True)
    os.rename(work, target)
    return facts


def _check(source: Path, target: Path) -> None:
    if is_packed(source):
        raise AceError(f"{source} is packed already.", "Give the plain checkpoint.")
    if target.exists() and not is_packed(target):
        raise AceError(f"{target} exists and was not made by packing.", "Choose another folder.")
    needed, free = Checkpoint(source).nbytes, shutil.disk_usage(target.parent).free
    if free < needed:
        raise AceError(
            f"Packing may take {needed / 1e9:.1f} GB of disk, {target.parent} has {free / 1e9:.1f} GB free.",
            "Free some space, or choose another folder.",
        )


def grids_of(source: Path) -> dict[str, Grid]:
    """Tensor -> the grid that its values were rounded to, of a checkpoint that was pruned here."""
    from ace_cli.model.pruned import MANIFEST, read_manifest

    manifest = read_manifest(source) if (source / MANIFEST).is_file() else None
    return {} if manifest is None or manifest.grid is None else dict.fromkeys(manifest.slots, manifest.grid)


def _write_shard(parts: _Parts, entries: list[TensorEntry], file: Path, step: Callable[[], None]) -> None:
    """One safetensors file of these tensors, packed.

    Its header, which tells where each tensor ends, comes before them: room is left for the longest that it can be.
    """
    start = _start(entries, parts.grids)
    stored = []
    with open(file, "wb") as stream:
        stream.seek(start)
        for entry in entries:
            for end, tensor in parts.of(entry):
                raw = _bytes(tensor)
                stored.append((f"{entry.name}{end}", _dtype_name(tensor), tuple(tensor.shape), len(raw)))
                stream.write(raw)
            step()
        header = _header(stored)
        stream.seek(0)
        stream.write((start - 8).to_bytes(8, "little") + header.ljust(start - 8))
        stream.flush()
        os.fsync(stream.fileno())


def packed_file_bytes(
    tensors: Mapping[str, TensorEntry], nonzeros: Mapping[str, int], grids: Mapping[str, Grid]
) -> int:
    """Bytes of the packed files of tensors of which some have so many values that are not zero, some on a grid."""
    return sum(
        _start(entries, grids)
        + sum(_stored_bytes(entry, nonzeros.get(entry.name), grids.get(entry.name)) for entry in entries)
        for entries in shard_plan(tensors).values()
    )


def _stored_bytes(entry: TensorEntry, nonzeros: int | None, grid: Grid | None) -> int:
    """Of a tensor with so many values, None: one that is not pruned."""
    from ace_cli.kernels.bitmask import packed_bytes

    if nonzeros is None or entry.dtype not in _PACKABLE:
        return entry.nbytes
    rows, columns = entry.numel // entry.shape[-1], entry.shape[-1]
    scales = 0 if grid is None else 2 * rows * (columns // grid.width(columns))
    width = DTYPES[entry.dtype][1] if grid is None else 1
    return min(entry.nbytes, packed_bytes((rows, columns), nonzeros, width) + scales)


def _start(entries: list[TensorEntry], grids: Mapping[str, Grid]) -> int:
    """Where data starts in a file: behind the longest header that it can have."""
    ends = (".bitmask", ".values", ".scales")
    parts = [f"{entry.name}{end}" for entry in entries for end in (ends if entry.name in grids else ends[:2])]
    longest = _header((part, "BF16", (*[10**12] * 8,), 10**12) for part in parts)
    return -(-len(longest) // disk.PAGE) * disk.PAGE


@dataclass(frozen=True)
class _Parts:
    """What is stored of the tensors of ``checkpoint``; ``grids``: of those that were rounded."""

    checkpoint: Checkpoint
    zstd: bool
    grids: Mapping[str, Grid]

    def of(self, entry: TensorEntry) -> Iterable[tuple[str, Tensor]]:
        """The end of its name -> the part."""
        from ace_cli.kernels.bitmask import bits_of, pack

        tensor = self.checkpoint.read(entry.name)
        if entry.dtype not in _PACKABLE or len(entry.shape) < 2 or not entry.numel:
            return [("", tensor)]
        matrix, scales = tensor.view(-1, entry.shape[-1]), []
        grid = self.grids.get(entry.name)
        if _stored_bytes(entry, int(bits_of(matrix).count_nonzero()), grid) >= entry.nbytes:
            return [(".zstd", compressed(tensor))] if self.zstd else [("", tensor)]
        if grid is not None:
            scale_OG = scales_in(self.checkpoint, entry.name, tensor, grid)
            matrix, scales = grid.codes(matrix, scale_OG), [(".scales", scale_OG.bfloat16())]
        packed = pack(matrix)
        values = (".zstd", compressed(packed.values)) if self.zstd else (".values", packed.values)
        return [(".bitmask", packed.mask), values, *scales]


def _header(stored: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape, nbytes in stored:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    return json.dumps(header, separators=(",", ":")).encode()


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _dtype_name(tensor: Tensor) -> str:
    return next(name for name, (kind, _) in DTYPES.items() if str(tensor.dtype) == f"torch.{kind}")


def _write_rest(checkpoint: Checkpoint, target: Path) -> None:
    copy_beside(checkpoint.folder, target)
    held = set(Checkpoint(target).tensors)
    packed = {name for name in checkpoint.tensors if f"{name}.bitmask" in held}
    (target / PACKED).write_text(json.dumps(told(checkpoint.tensors, packed), indent=1) + "\n", encoding="utf-8")
    (target / "README.md").write_text(_CARD, encoding="utf-8")


_CARD = """# A packed checkpoint

Matrices are stored as a bit mask and the values that are not zero (packed.json tells which); rounded ones as codes of
8 bits with scales. No other engine reads this folder: `ace_cli.sparse.load(FOLDER)` gives a transformers model that
computes with the packed matrices, `ace_cli.model.packed.unpack_folder(FOLDER, NEW_FOLDER)` the plain checkpoint, bit
for bit.
"""


def _facts(checkpoint: Checkpoint, target: Path, zstd: bool) -> dict[str, Any]:
    packed = PackedCheckpoint(target)
    names = [name for name in packed.tensors if packed.holds_packed(name)]
    parts = [f"{name}{end}" for name in names for end in (".bitmask", ".zstd", ".values", ".scales")]
    return {
        "matrices": len(names),
        "of_codes": sum(map(packed.holds_codes, names)),
        "dense_bytes": checkpoint.file_bytes,
        "packed_bytes": packed.file_bytes,
        "dense_matrix_bytes": sum(packed.tensors[name].nbytes for name in names),
        "packed_matrix_bytes": sum(packed.stored[part].nbytes for part in parts if part in packed.stored),
        "zstd": zstd,
    }
