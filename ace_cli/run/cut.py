"""Cutting units out of a model: how many stay, what the new folder must say, and whether it loads."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ace_cli.core import memory
from ace_cli.core.errors import AceError
from ace_cli.core.registry import name_of
from ace_cli.data.generation import whole_model
from ace_cli.methods.allocation.base import MOST
from ace_cli.methods.patterns import Ratio
from ace_cli.methods.statistics import Seen
from ace_cli.methods.units import uneven_widths
from ace_cli.model import uneven
from ace_cli.model.auto import auto_class
from ace_cli.model.blocks import Block
from ace_cli.model.files import Checkpoint, hash_of_tensor, shard_plan
from ace_cli.model.header import TensorEntry
from ace_cli.model.proven_config import changed
from ace_cli.model.pruned import Smaller
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.cutting import Cutting
from ace_cli.pruning.survey import UnitScores, survey
from ace_cli.pruning.unit_pruner import unit_scores

if TYPE_CHECKING:
    from ace_cli.run.config import RunConfig
    from ace_cli.run.context import RunContext

#: So many tokens go through the finished folder, as transformers loads it, and through the streamed model.
_TOKENS = 16
#: A model that takes more than this share of the planned memory is not loaded whole: streaming is there to save it.
#: Its blocks, of each kind one, were compared before work began.
_WHOLE_SHARE = 0.3


def begin(config: RunConfig, model: StreamedModel) -> Cutting:
    """The units of the model, and how many would stay if all blocks kept the same share.

    Raises AceError where the model has no such units, no width fits, or no configuration of its class says it.
    """
    cutting = config.unit.cutting(model, name_of("unit", config.unit))
    cutting.ask(config.pattern.p if isinstance(config.pattern, Ratio) else Fraction(0), config.keep)
    if not config.unit.uneven:
        _check_said(cutting)
    return cutting


def _check_said(cutting: Cutting) -> None:
    if cutting.changes() is None:
        raise AceError(
            f"{type(cutting.model.skeleton).__name__} has no key in its configuration for so few {cutting.name}s"
            f"{cutting.why_not}.",
            "Add unit.uneven=true: a modelling file is then written into the folder."
            if "uneven" in vars(cutting.unit)
            else "Choose another unit, or another number.",
        )


def describe(cutting: Cutting, config: RunConfig) -> str:
    """What is cut, in words: "1216 of 1536 channels stay in 30 blocks, each"."""
    return cutting.described(on_average=config.unit.uneven and config.allocation.surveys)


def settle(run: RunContext, cutting: Cutting, batches: list[Any], gradients: Mapping[str, Seen]) -> None:
    """Find what is to be known before the first block is cut: widths of their own, or which blocks go."""
    if cutting.looks:
        _choose_blocks(run, cutting, batches)
    elif run.config.allocation.surveys:
        cutting.stay = widths(run, cutting, batches, gradients)


def _choose_blocks(run: RunContext, cutting: Cutting, batches: list[Any]) -> None:
    steps = sum(len(run.model.blocks) - look for look in range(cutting.looks))
    with run.inner("survey"), run.terminal.progress("surveying", steps) as step:
        goes = cutting.choose(batches, run.config.metric, lambda _: step())
    _check_said(cutting)
    run.terminal.say(f"{'goes':12} {'block' if len(goes) == 1 else 'blocks'} {', '.join(map(str, goes))}")


def widths(run: RunContext, cutting: Cutting, batches: list[Any], gradients: Mapping[str, Seen]) -> dict[str, int]:
    """Coupling's name -> how many units of each region stay, after a look at the dense model.

    ``gradients``: what slots saw of the whole model's loss.
    """
    config, allocation, equal = run.config, run.config.allocation, cutting.stay
    scores = None
    if allocation.units_only:
        scores = UnitScores(config.metric.needs(), _scorer(config, cutting), cutting.model, gradients)
    with run.inner("survey"), run.terminal.progress("surveying", len(run.model.blocks)) as step:
        measures = survey(run.model, batches, allocation, lambda _: step(), scores, run.workers)
    assert isinstance(config.pattern, Ratio)
    filled = [index for index, block in enumerate(cutting.couplings) if block]
    sizes = [sum(each.width * each.regions for each in cutting.couplings[index]) for index in filled]
    shares = allocation.shares(float(config.pattern.p), sizes, [measures[index] for index in filled], MOST)
    found, of_block = dict(equal), dict(zip(filled, shares, strict=True))
    pairs = [(index, each) for index in filled for each in cutting.couplings[index]]
    counts = uneven_widths(
        [each.width for _, each in pairs], [equal[each.name] for _, each in pairs],
        [of_block[index] for index, _ in pairs], config.unit.multiple,
    )  # fmt: skip
    return found | {each.name: count for (_, each), count in zip(pairs, counts, strict=True)}


def with_new_hashes(manifest: list[dict[str, Any]], trained: Checkpoint) -> list[dict[str, Any]]:
    """What pruning.json tells of every cut, of files whose weights were trained since."""
    return [
        {
            **cut,
            "tensors": {
                key: {**written, "xxh3": hash_of_tensor(trained.read(key))} for key, written in cut["tensors"].items()
            },
        }
        for cut in manifest
    ]


def smaller(cutting: Cutting, entries: Mapping[str, TensorEntry], manifest: list[dict[str, Any]]) -> Smaller:
    """What the folder needs beside its weights: config.json of the stock class, or a modelling file as well."""
    model = cutting.model
    raw = model.checkpoint.config()
    changes = None if cutting.uneven else cutting.changes()
    if changes is not None:
        return Smaller(entries, changed(raw, changes), {}, {}, manifest)
    kind, auto = type(model.skeleton), auto_class(model.skeleton.config).__name__
    config = {**raw, "auto_map": {auto: f"{Path(uneven.FILE).stem}.{uneven.CLASS}"}}
    files = {uneven.FILE: uneven.source_of(kind.__name__)}
    return Smaller(entries, config, {uneven.RESIZED: _resized(model, cutting.resized(), entries)}, files, manifest)


def own_files(cutting: Cutting) -> list[str]:
    """Files that the folder of a smaller model may hold beside those of a zeroed one."""
    shards = shard_plan(cutting.entries())
    return [uneven.FILE, *shards]


def check_loads(model: StreamedModel, folder: Path, planned_bytes: int) -> None:
    """The folder as transformers loads it, against the model streamed from it; where it is small.

    Raises AceError if their logits differ by more than rounding: then this tool wrote what it did not mean.
    """
    written = Checkpoint(folder)
    need = sum(entry.numel for entry in written.tensors.values()) * model.dtype.itemsize
    if need > min(_WHOLE_SHARE * planned_bytes, memory.free() / 2):
        return
    ids_1L = (torch.arange(_TOKENS) % model.skeleton.get_input_embeddings().weight.shape[0])[None]
    streamed = StreamedModel(written, model.device, model.dtype)
    batches = [*streamed.batches(ids_1L)]
    streamed.run(batches)
    with streamed.head_loaded():
        ours_1LV = streamed.logits(ids_1L, batches[0].hidden_BLH).float()
    whole = whole_model(written, model.dtype, model.device, "This is a fault of ace-prune: please report it.")
    with torch.inference_mode():
        theirs_1LV = whole(input_ids=ids_1L.to(model.device), use_cache=False).logits.float()
    off = float((ours_1LV - theirs_1LV).norm() / theirs_1LV.norm().clamp(min=1e-30))
    if not off <= max(1e-4, 32 * torch.finfo(model.dtype).eps):
        raise AceError(
            f"{folder} does not compute, loaded by transformers, what was written: logits are off by {off:.1e}.",
            "This is a fault of ace-prune: please report it.",
        )


def _scorer(config: RunConfig, cutting: Cutting) -> Any:
    index = {block.name: number for number, block in enumerate(cutting.model.blocks)}

    def score(block: Block, seen: Mapping[str, Seen]) -> Tensor:
        slots = {slot.name: slot for slot in block.slots}
        scores = [
            unit_scores(
                config.metric, slots[each.name].weight_OI.float(), seen[each.name],
                cutting.units(block.name, each, seen), each.name,
            )
            for each in cutting.couplings[index[block.name]]
        ]  # fmt: skip
        return torch.cat(scores)

    return score


def _resized(model: StreamedModel, keys: set[str], entries: Mapping[str, TensorEntry]) -> dict[str, list[int]]:
    """Parameter -> shape, of those that are not as the stock class builds them."""
    return {
        f"{block.name}.{inner}": list(entries[parts[0].key].shape)
        for block in model.blocks
        for inner, parts in block.parts.items()
        if parts[0].key in keys
    }
