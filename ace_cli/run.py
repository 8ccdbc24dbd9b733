"""One run, readable top to bottom: open, plan, calibrate, prune, verify, evaluate, report."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ace_cli.calibration.base import ExpertTokens
from ace_cli.clock import Clock
from ace_cli.config import Dtype, Permute, RunConfig
from ace_cli.engine import Recipe, prune, replay
from ace_cli.errors import AceError, TransientError
from ace_cli.evaluation.base import Evaluation
from ace_cli.evaluation.perplexity import perplexity
from ace_cli.hardware import has_bfloat16_units
from ace_cli.model.files import Checkpoint, CheckpointWriter
from ace_cli.model.pruned import Pruned, count_zeros, manifest_entry, write_metadata
from ace_cli.model.slots import Selection
from ace_cli.model.source import open_model
from ace_cli.model.streamed import Batch, StreamedModel
from ace_cli.patterns import Pattern
from ace_cli.phases import Phases
from ace_cli.plan import Plan, check_disk, make_plan
from ace_cli.propagate import Propagate
from ace_cli.registry import name_of
from ace_cli.report import facts
from ace_cli.report.assemble import (
    calibration_line,
    make_report,
    method_line,
    protocol_of,
    summary_of,
    versions,
    with_options,
)
from ace_cli.report.markdown import model_card, render
from ace_cli.report.terminal import Terminal
from ace_cli.survey import survey
from ace_cli.texts import fingerprint
from ace_cli.work import Work, find_unfinished, locked
from ace_cli.zero_shot import harness

#: What this process already measured, by model and protocol: a sweep measures the dense model once.
DenseCache = dict[tuple[Any, ...], Any]


def run(config: RunConfig, command: str, terminal: Terminal, dense_cache: DenseCache) -> facts.Report | None:
    """Do what the configuration says; None for a dry run. Raises AceError for what the user can mend."""
    try:
        return _run(config, command, terminal, dense_cache)
    except OSError as fault:
        where = fault.filename or config.output_dir
        raise AceError(
            f"{fault.strerror or fault}: {where}.", "Mend it, then repeat the command: finished blocks are kept."
        ) from fault


def _run(config: RunConfig, command: str, terminal: Terminal, dense_cache: DenseCache) -> facts.Report | None:
    start = datetime.datetime.now(datetime.UTC)
    device = choose_device(config.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    phases = Phases(Clock(torch.cuda.synchronize if device.type == "cuda" else lambda: None))
    quiet_libraries()
    with phases("import"):
        source = open_model(config.model)
        selection = Selection(config.include, config.exclude)
        model = StreamedModel(source, device, choose_dtype(config.dtype, device, source), selection)
    shapes = {slot.name: slot.shape for block in model.blocks for slot in block.slots}
    needs_data = any(part.needs() for part in (config.metric, config.repair, config.allocation))
    tokens = config.calib.tokens if needs_data else 0
    # an allocation moves the weights to be pruned between blocks, but neither their number nor M
    plan = make_plan(model, dict.fromkeys(shapes, config.pattern), tokens, tokens)
    _check_length(model, config, needs_data)
    _check_not_source(source, config.output_dir)
    check_disk(config.output_dir, plan.disk_bytes)
    terminal.plan(plan, method_line(config), calibration_line(config) if needs_data else "none needed")
    if config.dry_run:
        return None

    with phases("calibrate"), terminal.waiting(f"calibration windows from {name_of('calib', config.calib)}"):
        windows_NL = config.calib.windows(source, str(device)) if needs_data else None
    # before hours of pruning: a missing evaluation text is found now
    with phases("evaluate"), terminal.waiting(f"evaluation windows from {name_of('eval', config.eval)}"):
        eval_NL = config.eval.windows(source, str(device)) if isinstance(config.eval, Evaluation) else None
    with phases("evaluate"), terminal.waiting("data of the zero-shot tasks"):
        tasks = harness.load(config.eval, source)

    identity = _identity(config, model, windows_NL)
    if not config.output_dir_given and (unfinished := find_unfinished(config.output_dir.parent, identity)):
        config = dataclasses.replace(config, output_dir=unfinished)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    with locked(config.output_dir), terminal.logging_to(config.output_dir / "run.log"):
        terminal.say(f"$ {command}")
        work = Work(config.output_dir, identity)
        inner = Clock()  # without waiting for a device: what it still computes counts where its result is needed
        with phases("prune"):
            _prune(config, model, windows_NL, work, inner, terminal, command, plan)
        numbers = facts.Perplexity()
        if eval_NL is not None:
            with phases("evaluate"):
                numbers = _evaluate(config, model, work.final, eval_NL, terminal, dense_cache)
        zero_shot = None
        if tasks is not None:
            with phases("evaluate"):
                zero_shot = harness.dense_and_pruned(tasks, model, work.final, terminal, dense_cache)
        report = make_report(config, command, start, model, plan, windows_NL, work, numbers, phases, inner)
        report.zero_shot = zero_shot
        facts.save(report, config.output_dir / "report.json")
        facts.write_whole(config.output_dir / "report.md", render(report))
        work.close()
        if not config.keep_checkpoint:
            shutil.rmtree(work.final)
        terminal.result(report)
        terminal.say(f"Results: {config.output_dir}")
    return report


def _identity(config: RunConfig, model: StreamedModel, windows_NL: Tensor | None) -> dict[str, Any]:
    """What decides every byte of the checkpoint: an interrupted run continues only if all of it is the same."""
    choices = {group: with_options(group, getattr(config, group)) for group in ("metric", "allocation", "repair")}
    found = versions()
    return {
        "model": model.checkpoint.fingerprint(),
        **choices,
        "sparsity": f"{config.pattern!r}",
        "propagate": config.propagate.value,
        "permute": config.permute.value,
        "slots": hashlib.sha256("\n".join(slot.name for b in model.blocks for slot in b.slots).encode()).hexdigest(),
        "experts": [config.calib.experts.value, config.calib.min_tokens],
        "calibration": fingerprint(windows_NL) if windows_NL is not None else "none",
        "device": str(model.device),
        "dtype": str(model.dtype),
        "threads": torch.get_num_threads(),
        "versions": {name: found[name] for name in ("ace-prune", "torch", "transformers")},
    }


def _prune(
    config: RunConfig,
    model: StreamedModel,
    windows_NL: Tensor | None,
    work: Work,
    clock: Clock,
    terminal: Terminal,
    command: str,
    plan: Plan,
) -> None:
    """Prune into ``checkpoint.partial``, verify what was written, and rename it into place."""
    if work.news:
        terminal.say(work.news)
    if work.complete:
        return
    try:
        with clock("write"):
            writer = CheckpointWriter(model.checkpoint, work.partial)
            if work.finished and not writer.continued:
                terminal.say(f"{work.partial} is not as it was left: starting anew.")
                work.restart()
                writer = CheckpointWriter(model.checkpoint, work.partial)
            done = len(work.finished)
            writer.left -= {key for block in model.blocks[:done] for key in block.files}
        with clock("embed"):
            batches = list(model.batches(windows_NL)) if windows_NL is not None else []
        patterns = _allocate(config, model, batches, clock, terminal)
        permute = config.permute is not Permute.none
        recipe = Recipe(
            config.metric, patterns, config.repair, config.propagate, permute,
            config.calib.experts is ExpertTokens.all, config.calib.min_tokens,
        )  # fmt: skip
        if recipe.wanted and 0 < done < len(model.blocks):
            weights = model.checkpoint if recipe.propagate is Propagate.dense else Checkpoint(work.partial, bare=True)
            replay(model.reading(weights), batches, done, clock)
        with terminal.progress("pruning", len(model.blocks), done) as step:
            for block in prune(model, batches, recipe, writer, clock, done, work.record):
                work.finished.append(block)
                step()
        with clock("write"):
            writer.finish()
        with clock("verify"):
            slots = [slot for block in model.blocks for slot in block.slots]
            pruned = {slot.name: Pruned(slot.key, slot.in_file, recipe.patterns[slot.name]) for slot in slots}
            zeros = count_zeros(Checkpoint(work.partial, bare=True), pruned)
        with clock("write"):
            entries = [manifest_entry(slot, recipe.patterns[slot.name], zeros[slot.name]) for slot in slots]
            summary = summary_of(config, command, windows_NL, sum(zeros.values()) / plan.slot_weights)
            card = model_card(config.model.path, command, summary)
            write_metadata(model.checkpoint, work.partial, summary, entries, card, work.digest)
        work.publish()
    except TransientError:
        raise
    except AceError:
        work.discard()  # the fault is in the model or the data: there is nothing to continue
        raise


def _allocate(
    config: RunConfig, model: StreamedModel, batches: list[Batch], clock: Clock, terminal: Terminal
) -> dict[str, Pattern]:
    """Slot name -> its pattern, after a look at the dense model if the allocation asks for one."""
    blocks = [{slot.name: slot.shape for slot in block.slots} for block in model.blocks]
    measures = [0.0] * len(blocks)
    if config.allocation.surveys:
        with clock("survey"), terminal.progress("surveying", len(blocks)) as step:
            measures = survey(model, batches, config.allocation, lambda _: step())
    return config.allocation.patterns(config.pattern, blocks, measures)


def _evaluate(
    config: RunConfig, model: StreamedModel, folder: Path, eval_NL: Tensor, terminal: Terminal, cache: DenseCache
) -> facts.Perplexity:
    """Dense and pruned perplexity from their files, same windows, same dtype."""
    assert isinstance(config.eval, Evaluation)
    protocol = protocol_of(config.eval, eval_NL, model.dtype)
    key = (model.checkpoint.fingerprint(), protocol.fingerprint, protocol.seq_len, f"{protocol.dtype} {model.device}")
    pruned = StreamedModel(Checkpoint(folder), model.device, model.dtype)
    todo = [("pruned", pruned)] if key in cache else [("dense", model), ("pruned", pruned)]
    values = {"dense": cache.get(key)}
    for name, which in todo:
        with terminal.progress(f"evaluating {name}", len(which.blocks)) as step:
            values[name] = perplexity(which, eval_NL, lambda _, step=step: step())  # type: ignore[misc]
    dense, after = float(values["dense"] or 0), float(values["pruned"] or 0)
    if not (0 < dense < float("inf") and 0 < after < float("inf")):
        raise AceError(f"Perplexity is not finite (dense {dense}, pruned {after}).", "Try dtype=float32.")
    cache[key] = dense
    return facts.Perplexity(dense, after, after / dense, protocol)


# --- checks and choices ------------------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """``auto``: a GPU where there is one. Raises AceError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda"):
        count = torch.cuda.device_count()
        index = int(name.partition(":")[2] or 0)
        if index >= count:
            raise AceError(f"device={name}: this machine shows torch {count} CUDA devices.", "Use device=cpu, or auto.")
    return torch.device(name)


def choose_dtype(choice: Dtype, device: torch.device, source: Checkpoint) -> torch.dtype:
    """``auto``: the stored 16-bit dtype where it is computed fast, else float32."""
    if choice is not Dtype.auto:
        return getattr(torch, choice.value)  # type: ignore[no-any-return]
    if device.type == "cpu" and not has_bfloat16_units():
        return torch.float32
    stored = {"F16": torch.float16, "BF16": torch.bfloat16} if device.type != "cpu" else {"BF16": torch.bfloat16}
    kinds = {entry.dtype for entry in source.tensors.values() if len(entry.shape) >= 2}
    return stored.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def _check_not_source(source: Checkpoint, output_dir: Path) -> None:
    """Writing a checkpoint over the one being read would destroy it."""
    folder = source.folder.resolve()
    for name in ("checkpoint", "checkpoint.partial", "checkpoint.old"):
        if folder.is_relative_to((output_dir / name).resolve()):
            raise AceError(
                f"The model lies in {output_dir / name}, where the result would go.", "Choose another output_dir."
            )


def _check_length(model: StreamedModel, config: RunConfig, needs_data: bool) -> None:
    limit = getattr(model.skeleton.config.get_text_config(), "max_position_embeddings", None) or float("inf")
    lengths = {"calib.seq_len": config.calib.length if needs_data else 0}
    if isinstance(config.eval, Evaluation):
        lengths["eval.seq_len"] = config.eval.seq_len
    for name, length in lengths.items():
        if length > limit:
            raise AceError(f"{name}={length}: the model has {limit} positions.", f"Use {name}={limit} or less.")


def quiet_libraries() -> None:
    """Our own bar is the only one, and other libraries' remarks about files they read are not for the user."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
