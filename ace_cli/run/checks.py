"""What can be known to go wrong before work begins, beside what the plan adds up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ace_cli.core import memory
from ace_cli.core.device import with_others
from ace_cli.core.errors import AceError
from ace_cli.core.registry import name_of
from ace_cli.core.workers import on_this_machine, size
from ace_cli.data.documents import load_tokenizer
from ace_cli.data.token_ids import check_ids
from ace_cli.evaluation.base import Evaluation
from ace_cli.kernels import loops
from ace_cli.kernels.selection import LARGE
from ace_cli.methods.patterns import Pattern
from ace_cli.methods.row_pruning import by_rows
from ace_cli.model.files import Checkpoint
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.gradients import model_bytes
from ace_cli.pruning.recipe import Permute
from ace_cli.run.config import RunConfig
from ace_cli.run.context import Texts
from ace_cli.run.plan import Plan

#: A source with at least this share of zeros was pruned before: training alone leaves next to none.
SPARSE = 0.05


def memory_budget(memory_gb: float | None, device: torch.device) -> float:
    """Bytes of the memory that computes for this worker: as told, or its share of nine tenths of what is free."""
    if memory_gb is not None:
        return memory_gb * 1e9
    return 0.9 * (on_device(device) if device.type == "cuda" else memory.available() / on_this_machine()[1])


def on_device(device: torch.device) -> int:
    """Bytes of a CUDA device that this process may take in all: what is free, and what torch has reserved there."""
    free: int = torch.cuda.mem_get_info(device)[0]
    return free + torch.cuda.memory_reserved(device)


def pruned_by_rows(config: RunConfig, model: StreamedModel) -> bool:
    """Whether every slot is scored and pruned row by row, with nothing of a weight's size beside it."""
    alone = by_rows(config.metric, config.pattern, config.repairing) and config.permute is Permute.none
    return alone and not config.catch_up and model.device.type == "cpu"


def loops_of(config: RunConfig, model: StreamedModel) -> str:
    """How this run prunes on a CPU, for its identity and report: other loops round other sums."""
    largest = max(slot.shape[0] * slot.shape[1] for block in model.blocks for slot in block.slots)
    if model.device.type != "cpu" or (pruned_by_rows(config, model) and largest < LARGE):
        return "not needed"
    why = loops.why_not()
    return f"not compiled: {why}" if why else "compiled"


def check_inputs_stay(source: Checkpoint, config: RunConfig) -> None:
    """AceError if anything that is read, the model or a text, lies where the result will go: it would be replaced."""
    named = {"model.path": config.model, "calib": config.calib, "eval": config.eval}
    paths = [("model.path", source.folder)]
    for group, choice in named.items():
        for name, value in vars(choice).items():
            if isinstance(value, str) and value and len(value) < 4096:
                paths.append((group if group == "model.path" else f"{group}.{name}", Path(value).expanduser()))
    for option, path in paths:
        for name in ("checkpoint", "checkpoint.partial", "checkpoint.old", "checkpoint.training"):
            target = config.output_dir / name
            if path.resolve().is_relative_to(target.resolve()) and path.exists():
                raise AceError(
                    f"{option}: {path} lies in {target}, where the result would go.", "Choose another output_dir."
                )


def already_sparse(model: StreamedModel, pattern: Pattern) -> str | None:
    """What to say of a source that holds many zeros, by its first, middle and last block's smallest slots."""
    blocks = [block for block in model.blocks if block.slots]
    zeros = total = 0
    for block in {id(block): block for block in (blocks[0], blocks[len(blocks) // 2], blocks[-1])}.values():
        slot = min(block.slots, key=lambda slot: slot.shape[0] * slot.shape[1])
        weight_OI = slot.in_file(model.checkpoint.read(slot.key))
        zeros, total = zeros + int((weight_OI == 0).sum()), total + weight_OI.numel()
    if zeros < SPARSE * total:
        return None
    share, asked = zeros / total, pattern.pruned(*slot.shape) / (slot.shape[0] * slot.shape[1])
    what = "prunes next to nothing more" if asked <= share else "counts them as pruned"
    return f"about {share:.0%} of the source's weights are zero already: sparsity={pattern} {what}"


def check_training(config: RunConfig, plan: Plan, model: StreamedModel) -> None:
    """AceError if the memory has no room for a whole model in training, or a package is missing for it."""
    recovery = config.recover
    recovery.check_installed()
    if not recovery.whole:
        return
    needed = recovery.whole_bytes(plan.parameters, _trained(config, plan), list(plan.shapes.values()))
    others = with_others(model.device)[1:] if size() == 1 else []
    places = _devices_to_spread_over(others, plan) if recovery.spread else 1
    if places > 1:
        # the fullest device has an even share and the largest part at most: what lies outside of the blocks, or a
        # block with its gradients and moments
        outside = 4 * (plan.parameters - plan.slot_weights)
        needed = needed // places + max(outside, (4 + 17) * plan.slot_weights // plan.blocks)
    elif model.device.type == "cpu":
        tokens = sum(recovery.trained_on(config.calib.rows)) * config.calib.length
        needed += 2 * tokens * plan.token_bytes  # states of the dense model, on the host
    room = min(memory_budget(config.memory_gb, each) for each in (model.device, *others[: places - 1]))
    if needed > room:
        name = name_of("recover", recovery)
        where = " on each GPU" if places > 1 else ""
        more = "; recover.spread=true takes all GPUs" if others and places == 1 else ""
        raise AceError(
            f"recover={name} needs {needed / 1e9:.1f} GB of memory{where}, {room / 1e9:.1f} GB may be used.",
            f"Use recover=blocks, which trains one block at a time{more}.",
        )


def disk_of_training(config: RunConfig, plan: Plan) -> int:
    """Bytes that a training of the whole model has beside the checkpoint: its state, and the files it ends with."""
    if not config.recover.whole:
        return 0
    return plan.bytes_source + config.recover.disk_bytes(_trained(config, plan), list(plan.shapes.values()))


def _trained(config: RunConfig, plan: Plan) -> int:
    """Weights that a training of the whole model may change, at most."""
    return plan.parameters if config.unit.cuts else plan.slot_weights


def _devices_to_spread_over(others: Sequence[torch.device], plan: Plan) -> int:
    """How many there are; AceError where there is one, or none, or where the model cannot be read to share it out."""
    if size() > 1:
        raise AceError("recover.spread=true: of several workers each has one GPU.", "Start one, or leave it out.")
    if not others:
        fault = f"recover.spread=true: device={plan.device} has no other beside it on this machine."
        raise AceError(fault, "Leave it out.")
    read, free = 4 * plan.parameters, memory.available()
    if read > 0.9 * free:
        raise AceError(
            f"recover.spread=true reads the model into memory first: {read / 1e9:.1f} GB; {free / 1e9:.1f} GB is free.",
            "Use recover=blocks, which trains one block at a time.",
        )
    return 1 + len(others)


def check_gradients(config: RunConfig, model: StreamedModel, plan: Plan) -> None:
    """AceError where gradients are asked for and cannot be taken: inside experts, or of a model that does not fit."""
    if not any(statistic.needs_backward for statistic in config.statistics):
        return
    name = name_of("metric", config.metric)
    if any(block.experts for block in model.blocks):
        hint = "Use a metric that needs no gradients."
        raise AceError(f"metric={name}: gradients of single experts are not taken yet.", hint)
    needed = model_bytes(model, config.statistics, config.calib.length)
    if needed > plan.budget_bytes:
        raise AceError(
            f"metric={name} metric.source=model needs {needed / 1e9:.1f} GB of memory, "
            f"{plan.budget_bytes / 1e9:.1f} GB may be used.",
            "Use metric.source=block, which needs one block at a time.",
        )


def check_catch_up(config: RunConfig, model: StreamedModel) -> None:
    """AceError where slots do not see the tokens that they see in the dense model: routers may send those elsewhere."""
    if config.catch_up and not config.metric.of_states and any(block.experts for block in model.blocks):
        raise AceError(
            f"catch_up={config.catch_up:g}: experts see other tokens than in the dense model.",
            'Leave catch_up=0, or the experts dense: exclude="*.experts.*".',
        )


def check_left(model: StreamedModel, config: RunConfig) -> None:
    """AceError if ``exclude`` leaves nothing to prune."""
    if config.exclude and not any(block.slots for block in model.blocks):
        raise AceError(f"exclude={','.join(config.exclude)} leaves no weight to prune.", "Exclude fewer.")


def check_tokens(model: StreamedModel, texts: Texts) -> None:
    """AceError if a text that will go through the model, after hours perhaps, has a token that the model lacks."""
    windows = {"the calibration text": texts.windows_NL, "the text to train on": texts.training_NL}
    windows["the text held out of training"] = texts.held_NL
    windows["the evaluation text"] = None if texts.evaluation is None else texts.evaluation.ids_NL
    for where, ids_NL in windows.items():
        if ids_NL is not None:
            check_ids(ids_NL, model.vocabulary, model.checkpoint, where)
    if texts.tasks is None:
        return
    tokenizer = load_tokenizer(model.checkpoint)
    if max(tokenizer.get_vocab().values(), default=0) < model.vocabulary:
        return
    for task, text in texts.tasks.words():
        if ids := tokenizer(text)["input_ids"]:
            check_ids(torch.tensor(ids), model.vocabulary, model.checkpoint, f"task {task}")


def check_length(model: StreamedModel, config: RunConfig, needs_data: bool) -> None:
    """AceError if calibration or evaluation windows are longer than the model has positions."""
    limit = getattr(model.skeleton.config.get_text_config(), "max_position_embeddings", None) or float("inf")
    lengths = {config.calib.length_option: config.calib.length if needs_data else 0}
    if isinstance(config.eval, Evaluation):
        lengths["eval.seq_len"] = config.eval.seq_len
    for name, length in lengths.items():
        if length > limit:
            raise AceError(f"{name}={length}: the model has {limit} positions.", f"Use {name}={limit} or less.")
