"""``unit.factors=true``: a checkpoint of products as their factors, really smaller, with a modelling file.

The factors are those of the written products: each, of known rank, is decomposed exactly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ace_cli.core.errors import AceError
from ace_cli.core.json_reader import read_object
from ace_cli.core.stage import Progress, Stage
from ace_cli.methods.low_rank import truncated
from ace_cli.model.files import Checkpoint, CheckpointWriter, write_index
from ace_cli.model.folder import copy_other_files
from ace_cli.model.header import DTYPES, TensorEntry

if TYPE_CHECKING:
    from ace_cli.model.streamed import StreamedModel

#: How far a product may be from the weight that it is of, relatively, by the dtype of the files.
_ROUNDING = {"F32": 1e-4, "F16": 1e-2, "BF16": 5e-2}


@dataclass(frozen=True)
class Factors(Stage):
    """The factors of a checkpoint whose weights are products."""

    name: ClassVar[str] = "factors"

    def identity(self) -> dict[str, Any]:
        return {"format": 1}

    def refusal(self, source: Path) -> str | None:
        from ace_cli.model.slots import View

        model = _model(source)
        slots = [slot for block in model.blocks for slot in block.slots]
        odd = [slot.name for slot in slots if slot.in_module != View() or slot.in_file != View()]
        return f"unit.factors=true: {odd[0]} is no linear layer of its own." if odd else None

    def run(self, source: Path, target: Path, progress: Progress) -> dict[str, Any]:
        checkpoint, model = Checkpoint(source), _model(source)
        ranks = {cut["name"]: len(cut["kept"]) for cut in read_object(source / "pruning.json")["cuts"]}
        entries = factored_entries(checkpoint.tensors, ranks)
        writer = CheckpointWriter(checkpoint, target, entries)
        writer.moved |= dict.fromkeys(checkpoint.tensors.keys() - entries.keys(), "")  # their factors come instead
        with progress("factoring", len(ranks)) as step:
            for key, rank in ranks.items():
                for name, tensor in zip(_names(key), truncated(checkpoint.read(key), rank), strict=True):
                    writer.write(name, tensor.to(_dtype(entries[name])).contiguous())
                if (bias := f"{_path(key)}.bias") in checkpoint.tensors:
                    writer.write(f"{_path(key)}.up.bias", checkpoint.read(bias))
                step()
        writer.finish()
        write_index(entries, target)
        copy_other_files(source, target)
        _write_config(checkpoint, model, target, ranks)
        sizes = {"dense": checkpoint.nbytes, "factored": Checkpoint(target, bare=True).nbytes}
        return {"products": len(ranks), **{f"{name}_bytes": nbytes for name, nbytes in sizes.items()}}

    def summary(self, facts: dict[str, Any]) -> str:
        return (
            f"{facts['products']} products as their factors, {facts['factored_bytes'] / 1e9:.2f} GB where they took "
            f"{facts['dense_bytes'] / 1e9:.2f} GB; transformers loads them with trust_remote_code=True"
        )

    def verify(self, source: Path, target: Path) -> None:
        checkpoint, written = Checkpoint(source), Checkpoint(target, bare=True)
        for cut in read_object(source / "pruning.json")["cuts"]:
            up_OR, down_RI = (written.read(name).double() for name in _names(cut["name"]))
            weight_OI = checkpoint.read(cut["name"]).double()
            off = float((up_OR @ down_RI - weight_OI).norm() / weight_OI.norm().clamp(min=1e-30))
            if not off <= _ROUNDING.get(written.tensors[_names(cut["name"])[0]].dtype, 0.0):
                raise AceError(f"The factors of {cut['name']} in {target} are off by {off:.1e}.", "Is the disk sound?")


def factored_entries(tensors: Mapping[str, TensorEntry], ranks: Mapping[str, int]) -> dict[str, TensorEntry]:
    """The tensors of the new files: of every weight in ``ranks`` its factors; the others as they are."""
    found = {}
    biases = {f"{_path(key)}.bias": f"{_path(key)}.up.bias" for key in ranks}
    for name, entry in tensors.items():
        if name in ranks:
            (rows, columns), rank = entry.shape, ranks[name]
            for part, shape in zip(_names(name), ((rows, rank), (rank, columns)), strict=True):
                resized = replace(entry, name=part, shape=shape)
                found[part] = replace(resized, nbytes=resized.numel * DTYPES[entry.dtype][1])
        else:
            new = biases.get(name, name)
            found[new] = replace(entry, name=new)
    return found


def _write_config(checkpoint: Checkpoint, model: StreamedModel, target: Path, ranks: dict[str, int]) -> None:
    from ace_cli.model import uneven
    from ace_cli.model.auto import auto_class
    from ace_cli.model.factored import FACTORED, source_of

    kind, auto = type(model.skeleton).__name__, auto_class(model.skeleton.config).__name__
    places = {
        slot.name: f"{block.name}.{path}"
        for block in model.blocks
        for slot in block.slots
        for path, module in block.module.named_modules()
        if module is slot.module
    }
    raw = checkpoint.config()
    factored = {places[key]: rank for key, rank in ranks.items()}
    config = {
        **raw, "auto_map": {auto: f"{Path(uneven.FILE).stem}.{uneven.CLASS}"},
        "pruning": {**raw.get("pruning", {}), FACTORED: factored},
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (target / uneven.FILE).write_text(source_of(kind), encoding="utf-8")


def _model(folder: Path) -> StreamedModel:
    """By its headers alone."""
    import torch

    from ace_cli.model.streamed import StreamedModel

    return StreamedModel(Checkpoint(folder), torch.device("cpu"), torch.float32)


def _path(key: str) -> str:
    return key.removesuffix(".weight")


def _names(key: str) -> tuple[str, str]:
    return f"{_path(key)}.up.weight", f"{_path(key)}.down.weight"


def _dtype(entry: TensorEntry) -> Any:
    import torch

    return getattr(torch, DTYPES[entry.dtype][0])
