"""Making the residual stream narrower: how wide it stays, what the new folder must say, and whether it computes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ace_cli.core.errors import AceError
from ace_cli.methods.metrics.slicegpt import SliceGPT
from ace_cli.methods.patterns import Ratio
from ace_cli.model import uneven
from ace_cli.model.auto import auto_class
from ace_cli.model.calls import Batch
from ace_cli.model.configuration import transformers_config
from ace_cli.model.files import Checkpoint, CheckpointWriter, shard_plan
from ace_cli.model.header import DTYPES
from ace_cli.model.pruned import Smaller
from ace_cli.model.sliced import SHORTCUTS, source_of
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.slicing import Slicer

if TYPE_CHECKING:
    from ace_cli.run.config import RunConfig


def slicer_of(config: RunConfig, model: StreamedModel) -> Slicer:
    """Raises AceError where the model cannot be sliced, or nothing would be left."""
    assert isinstance(config.metric, SliceGPT)
    assert isinstance(config.pattern, Ratio)
    hidden, multiple = int(model.skeleton.get_input_embeddings().weight.shape[1]), config.unit.multiple
    width = int(hidden * (1 - config.pattern.p)) // multiple * multiple if config.pattern.p else hidden
    if width <= 0:
        raise AceError(
            f"sparsity={config.pattern} leaves none of the {hidden} directions.",
            f"Lower unit.multiple ({multiple}), or choose another share.",
        )
    return Slicer(model, width, config.metric.basis)


def slicer_files(slicer: Slicer) -> list[str]:
    """Files of the new folder beside those of any other."""
    return [uneven.FILE, *shard_plan(slicer.entries())]


def write_sliced(slicer: Slicer, writer: CheckpointWriter, tensors: dict[str, Tensor]) -> None:
    """New tensors, in the dtypes of the files."""
    for key, tensor in tensors.items():
        dtype = getattr(torch, DTYPES[writer.entries[key].dtype][0])
        writer.write(key, tensor.to(dtype).cpu().contiguous())


def sliced(slicer: Slicer, writer: CheckpointWriter) -> Smaller:
    """What the folder needs beside its weights; epsilons of norms go with the width, the head is its own."""
    model = slicer.model
    raw, grown = model.checkpoint.config(), slicer.hidden / slicer.width
    complete = transformers_config(model.checkpoint.folder).to_dict()
    epsilons = {
        name: value * grown
        for name, value in complete.items()
        if name.endswith(("norm_eps", "norm_epsilon")) and isinstance(value, float)
    }
    auto, kind = auto_class(model.skeleton.config).__name__, type(model.skeleton).__name__
    config: dict[str, Any] = {**raw, **epsilons, "tie_word_embeddings": False}
    config["auto_map"] = {auto: f"{Path(uneven.FILE).stem}.{uneven.CLASS}"}
    source = model.checkpoint.tensors
    changed = {name: e for name, e in writer.entries.items() if name not in source or e.shape != source[name].shape}
    total = sum(entry.numel for entry in source.values()) - sum(entry.numel for entry in writer.entries.values())
    cut = {
        "name": "hidden", "units": slicer.hidden, "pattern": f"{slicer.width} of {slicer.hidden} directions",
        "fewer": total, "kept": list(range(slicer.width)),
        "tensors": {key: {"shape": list(e.shape), "xxh3": writer.digests[key]} for key, e in changed.items()},
    }  # fmt: skip
    noted = {uneven.RESIZED: slicer.shapes(), SHORTCUTS: slicer.pairs()}
    return Smaller(writer.entries, config, noted, {uneven.FILE: source_of(kind)}, [cut])


def check_sliced(slicer: Slicer, folder: Path, end: Batch) -> None:
    """AceError unless the written model brings the first windows of calibration to where slicing did (``end``)."""
    assert slicer.last_HD is not None
    some = slice(0, 8)
    expected_BLD = end.hidden_BLH[some].double() @ slicer.last_HD
    written = StreamedModel(Checkpoint(folder), slicer.model.device, slicer.model.dtype)
    (batch,) = written.batches(end.ids_BL[some], tokens=end.ids_BL[some].numel())
    written.run([batch])
    off = float((batch.hidden_BLH.double() - expected_BLD).norm() / expected_BLD.norm())
    if not off <= max(1e-3, 64 * torch.finfo(slicer.model.dtype).eps):
        raise AceError(
            f"{type(slicer.model.skeleton).__name__} does not compute in another basis what it did: off by {off:.1e}.",
            "Use unit=channel, or unit=rank.",
        )
