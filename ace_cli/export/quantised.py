"""What ``quantize=intN`` adds: the rounded checkpoint as codes and scales, in compressed-tensors' ``pack-quantized``.

The checkpoint itself holds code * scale as plain numbers, which every tool reads and judges; this is what to keep. The
scales are found again in those numbers, and what was written is read again and compared with them bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ace_cli.core.errors import AceError
from ace_cli.core.stage import Progress, Stage
from ace_cli.methods.grids import Grid
from ace_cli.model import compressed_tensors_api
from ace_cli.model.files import Checkpoint, CheckpointWriter, write_index
from ace_cli.model.header import DTYPES, TensorEntry
from ace_cli.model.plain_again import check_reads_back, copy_beside
from ace_cli.model.quantised import FORMAT, QUANTISED, SETTINGS, QuantisedCheckpoint, parts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Quantised(Stage):
    """The quantised form of a checkpoint whose weights are on a grid of ``bits``, ``group`` inputs a scale."""

    name: ClassVar[str] = "quantised"
    bits: int
    group: int | None

    @property
    def _grid(self) -> Grid:
        return Grid(self.bits, self.group)

    def identity(self) -> dict[str, Any]:
        library = compressed_tensors_api.library()
        return {"bits": self.bits, "group": self.group, "compressed-tensors": library.__version__}

    def refusal(self, source: Path) -> str | None:
        compressed_tensors_api.library()
        return None

    def run(self, source: Path, target: Path, progress: Progress) -> dict[str, Any]:
        from ace_cli.model.pruned import read_manifest

        checkpoint = Checkpoint(source)
        names = sorted(read_manifest(source).slots)
        entries = stored_entries(checkpoint.tensors, names, self._grid)
        writer = CheckpointWriter(checkpoint, target, entries)
        writer.moved = dict.fromkeys(names, "")  # their parts are written instead
        with progress("quantising", len(names)) as step:
            for name in names:
                for part, tensor in zip(parts(name), self._parts(checkpoint, name), strict=True):
                    writer.write(part, tensor)
                step()
        writer.finish()
        write_index(entries, target)
        self._write_rest(checkpoint, names, target)
        return {
            "matrices": len(names), "bits": self.bits, "group": self.group,
            "bits_per_weight": _bits(checkpoint, names, entries), "dense_bytes": checkpoint.file_bytes,
            "quantised_bytes": Checkpoint(target).file_bytes,
        }  # fmt: skip

    def summary(self, facts: dict[str, Any]) -> str:
        share = facts["quantised_bytes"] / max(1, facts["dense_bytes"])
        return (
            f"{facts['quantised_bytes'] / 1e9:.3f} GB, {share:.3f} of the dense files; {facts['matrices']} matrices at "
            f"{facts['bits_per_weight']:.2f} bits a weight; loads with transformers"
        )

    def verify(self, source: Path, target: Path) -> None:
        check_reads_back(Checkpoint(source), QuantisedCheckpoint(target))

    def _parts(self, checkpoint: Checkpoint, name: str) -> tuple[Tensor, Tensor, Tensor]:
        import torch

        values_OI, grid = checkpoint.read(name), self._grid
        scale_OG = scales_in(checkpoint, name, values_OI, grid)
        codes_OI = grid.codes(values_OI, scale_OG)
        dtype = getattr(torch, DTYPES[_scale_dtype(checkpoint.tensors[name])][0])
        return (
            compressed_tensors_api.packed(codes_OI, self.bits), scale_OG.to(dtype), torch.tensor(values_OI.shape)
        )  # fmt: skip

    def _write_rest(self, checkpoint: Checkpoint, names: list[str], target: Path) -> None:
        copy_beside(checkpoint.folder, target)
        told = {
            name: {"dtype": entry.dtype, "shape": list(entry.shape), "quantised": name in names}
            for name, entry in checkpoint.tensors.items()
        }
        content = {"format": FORMAT, "bits": self.bits, "group": self.group, "tensors": told}
        settings = compressed_tensors_api.settings(self.bits, self.group, _left(checkpoint, names))
        config = {**checkpoint.config(), SETTINGS: settings}
        for file, text in ((QUANTISED, json.dumps(content, indent=1)), ("config.json", json.dumps(config, indent=2))):
            (target / file).write_text(text + "\n", encoding="utf-8")
        (target / "README.md").write_text(_CARD.format(bits=self.bits), encoding="utf-8")


def scales_in(checkpoint: Checkpoint, name: str, values_OI: Tensor, grid: Grid) -> Tensor:
    """The scales (O, G), float32, of values of ``checkpoint`` on a grid; AceError if they are on none."""
    try:
        return grid.scales_of(values_OI)
    except ValueError as fault:
        raise AceError(f"{checkpoint.folder}: {name}: {fault}.", "Prune and quantise the model again.") from None


def stored_entries(tensors: Mapping[str, TensorEntry], names: list[str], grid: Grid) -> dict[str, TensorEntry]:
    """The tensors of the new files: of every one of ``names``, (O, I), its parts; the others as they are."""
    found, quantised = {}, set(names)
    for name, entry in tensors.items():
        if name not in quantised:
            found[name] = entry
            continue
        rows, columns = entry.shape
        shapes = ((rows, -(-columns * grid.bits // 32)), (rows, columns // grid.width(columns)), (2,))
        for part, dtype, shape in zip(parts(name), ("I32", _scale_dtype(entry), "I64"), shapes, strict=True):
            size = DTYPES[dtype][1]
            for axis in shape:
                size *= axis
            found[part] = replace(entry, name=part, dtype=dtype, shape=shape, nbytes=size)
    return found


def _scale_dtype(entry: TensorEntry) -> str:
    """Of its scales, which have eight significant bits: what the weight is stored in, or bfloat16 for a wider one."""
    return "F16" if entry.dtype == "F16" else "BF16"


def _bits(checkpoint: Checkpoint, names: list[str], entries: Mapping[str, TensorEntry]) -> float:
    nbytes = sum(entries[part].nbytes for name in names for part in parts(name))
    return 8 * nbytes / sum(checkpoint.tensors[name].numel for name in names)


def _left(checkpoint: Checkpoint, names: list[str]) -> list[str]:
    """Linear layers that stay as they are, by the names of their modules and, where others, those in the files."""
    import torch

    from ace_cli.model.streamed import StreamedModel

    model, quantised, left = StreamedModel(checkpoint, torch.device("cpu"), torch.float32), set(names), []
    for module, layer in model.skeleton.named_modules():
        if isinstance(layer, torch.nn.Linear) and (key := model.stored_as(f"{module}.weight")) not in quantised:
            left += [module, *([key.removesuffix(".weight")] if key else [])]
    return list(dict.fromkeys(left))


_CARD = """# A quantised checkpoint

Weights of {bits} bits in compressed-tensors' `pack-quantized`: `AutoModelForCausalLM.from_pretrained(FOLDER)` loads it
where `compressed-tensors` is installed. vLLM reads this format, too; that is untried here.
ace-eval, ace-bench and ace-verify read it, too; README.plain.md tells how it was made.
"""
