"""One run, readable top to bottom: open, plan, calibrate, prune, verify, evaluate, report."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ace_cli.core import memory
from ace_cli.core.device import choose_device, choose_dtype
from ace_cli.core.errors import AceError, TransientError, first_line
from ace_cli.core.registry import name_of
from ace_cli.core.timing import Clock, MemorySampler, Phases
from ace_cli.data.calibration.base import ExpertTokens
from ace_cli.data.documents import fingerprint
from ace_cli.evaluation.base import Evaluation, Windows
from ace_cli.evaluation.dense import DenseCache
from ace_cli.evaluation.zero_shot import harness
from ace_cli.methods.patterns import Pattern
from ace_cli.methods.row_pruning import by_rows
from ace_cli.model.files import Checkpoint, CheckpointWriter
from ace_cli.model.pruned import Pruned, Rereading, manifest_entry, write_metadata
from ace_cli.model.slots import Selection
from ace_cli.model.source import open_model
from ace_cli.model.spill import Spill, kept
from ace_cli.model.streamed import Batch, StreamedModel
from ace_cli.pruning.engine import prune, replay
from ace_cli.pruning.facts import BlockFacts
from ace_cli.pruning.recipe import Permute, Propagate, Recipe
from ace_cli.pruning.survey import survey
from ace_cli.report import facts
from ace_cli.report.html import render as page
from ace_cli.report.markdown import model_card, render
from ace_cli.report.terminal import Terminal, quiet_libraries
from ace_cli.report.trackers.base import choices_of, numbers_of
from ace_cli.run.assemble import (
    Measured,
    calibration_line,
    make_report,
    method_line,
    summary_of,
    versions,
    with_options,
)
from ace_cli.run.compare import evaluate, write_samples
from ace_cli.run.config import RunConfig
from ace_cli.run.journal import Work, find_unfinished, locked
from ace_cli.run.machine_limit import Limit, probe
from ace_cli.run.plan import Demand, Plan, check_room, make_plan


def run(config: RunConfig, command: str, terminal: Terminal, dense_cache: DenseCache) -> facts.Report | None:
    """Do what the configuration says; None for a dry run. Raises AceError for what the user can mend."""
    memory.one_heap()
    try:
        with MemorySampler() as sampler:
            return _run(config, command, terminal, dense_cache, sampler)
    except OSError as fault:
        where = fault.filename or config.output_dir
        raise AceError(
            f"{fault.strerror or fault}: {where}.", "Mend it, then repeat the command: finished blocks are kept."
        ) from fault


def _run(
    config: RunConfig, command: str, terminal: Terminal, dense_cache: DenseCache, sampler: MemorySampler
) -> facts.Report | None:
    start = datetime.datetime.now(datetime.UTC)
    device = choose_device(config.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    phases = Phases(Clock(torch.cuda.synchronize if device.type == "cuda" else lambda: None), sampler)
    quiet_libraries()
    with phases("import"):
        source = open_model(config.model)
        selection = Selection(config.include, config.exclude)
        model = StreamedModel(source, device, choose_dtype(config.dtype, device, source), selection)
    needs_data = any(part.needs() for part in (config.metric, config.repair, config.allocation))
    plan, limit = _plan(config, model, config.calib.tokens if needs_data else 0, terminal)
    if config.dry_run:
        return None

    with phases("calibrate"), terminal.waiting(f"calibration windows from {name_of('calib', config.calib)}"):
        windows_NL = config.calib.windows(source, str(device)) if needs_data else None
    # before hours of pruning: a missing evaluation text is found now
    with phases("evaluate"), terminal.waiting(f"evaluation windows from {name_of('eval', config.eval)}"):
        eval_windows = config.eval.windows(source, str(device)) if isinstance(config.eval, Evaluation) else None
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
        found = _measured(config, model, work.final, eval_windows, tasks, terminal, phases, dense_cache, plan)
        report = make_report(config, command, start, model, plan, limit, windows_NL, work, found, phases, inner)
        _write(config, report)
        _track(config, report, terminal)
        work.close()
        if not config.keep_checkpoint:
            shutil.rmtree(work.final)
        terminal.result(report)
        terminal.say(f"Results: {config.output_dir}")
    return report


def _plan(config: RunConfig, model: StreamedModel, tokens: int, terminal: Terminal) -> tuple[Plan, Limit]:
    """Everything that can be known to go wrong before work begins, and what the run will need, shown."""
    statistics = tuple(dict.fromkeys((*config.metric.needs(), *config.repair.needs())))
    alone = by_rows(config.metric, config.pattern, config.repair) and config.permute is Permute.none
    alone &= model.device.type == "cpu"

    def flops(rows: int, columns: int) -> int:
        return config.metric.flops(rows, columns) + config.repair.flops(rows, columns)

    demand = Demand(tokens, config.calib.length, statistics, config.propagate, config.allocation.surveys, alone, flops)
    # an allocation moves the weights to be pruned between blocks, but neither their number nor M
    patterns = {slot.name: config.pattern for block in model.blocks for slot in block.slots}
    plan = make_plan(model, patterns, demand, _budget(config.memory_gb, model.device))
    _check_length(model, config, tokens > 0)
    _check_not_source(model.checkpoint, config.output_dir)
    largest = max(rows * columns for rows, columns in plan.shapes.values())
    rates = probe(model.device, model.dtype, model.checkpoint, config.output_dir, config.pattern, largest)
    limit = plan.limit(rates, model.checkpoint.nbytes)
    terminal.plan(plan, limit, method_line(config), calibration_line(config) if tokens else "none needed")
    check_room(plan, config.output_dir)
    return plan, limit


def _measured(
    config: RunConfig, model: StreamedModel, pruned: Path, windows: Windows | None, tasks: harness.Tasks | None,
    terminal: Terminal, phases: Phases, cache: DenseCache, plan: Plan,
) -> Measured:  # fmt: skip
    """What was asked about the checkpoint in the folder ``pruned``."""
    found = Measured()
    if windows is not None:
        with phases("evaluate"):
            spill = Spill(config.output_dir) if plan.spills(windows.ids_NL.numel()) else None
            found.perplexity, found.fidelity = evaluate(config, model, pruned, windows, terminal, cache, spill)
    if tasks is not None:
        with phases("evaluate"):
            found.zero_shot = harness.dense_and_pruned(tasks, model, pruned, terminal, cache.tasks)
    if windows is not None and config.samples.wanted:
        with phases("samples"), terminal.waiting("samples of text, dense and pruned"):
            found.samples, why_not = write_samples(config.samples, model, pruned, cache)
            found.notes += [why_not] if why_not else []
    return found


def _write(config: RunConfig, report: facts.Report) -> None:
    facts.save(report, config.output_dir / "report.json")
    facts.write_whole(config.output_dir / "report.md", render(report))
    if config.html:
        facts.write_whole(config.output_dir / "report.html", page(dataclasses.asdict(report)))


def _track(config: RunConfig, report: facts.Report, terminal: Terminal) -> None:
    content = dataclasses.asdict(report)
    try:
        config.tracker.record(choices_of(content), numbers_of(content), config.output_dir)
    except Exception as fault:  # a server that is away must not take the run's result with it
        name = name_of("tracker", config.tracker)
        terminal.say(f"Warning: tracker={name} failed, the run's own files are whole: {first_line(fault)}", "yellow")


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
        "calibration": [*windows_NL.shape, fingerprint(windows_NL)] if windows_NL is not None else "none",
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
            writer = _writer(model, work, terminal)
        done = len(work.finished)
        with clock("embed"):
            spill, again = Spill(work.folder) if plan.spills(plan.tokens) else None, config.observe.windows
            batches = kept(model.batches(windows_NL, again), spill) if windows_NL is not None else []
            compared = batches.pop() if again and batches else None
        patterns = _allocate(config, model, batches, clock, terminal)
        permute = config.permute is not Permute.none
        recipe = Recipe(
            config.metric, patterns, config.repair, config.propagate, permute,
            config.calib.experts is ExpertTokens.all, config.calib.min_tokens, config.observe.tokens,
        )  # fmt: skip
        if not recipe.wanted:  # nothing looks at inputs, but what compares blocks
            batches = [copy.copy(compared)] if compared is not None else []
        if batches and 0 < done < len(model.blocks):
            weights = model.checkpoint if recipe.propagate is Propagate.dense else Checkpoint(work.partial, bare=True)
            replay(model.reading(weights), batches, done, clock)
        slots = [slot for block in model.blocks for slot in block.slots]
        pruned = {slot.name: Pruned(slot.key, slot.in_file, patterns[slot.name]) for slot in slots}
        with Rereading(work.partial, pruned) as written:

            def on_disk(block: BlockFacts) -> None:
                work.record(block)
                written.check(slot.name for slot in block.slots)

            with terminal.progress("pruning", len(model.blocks), done) as step:
                for block in prune(model, batches, recipe, writer, clock, done, on_disk, compared):
                    work.finished.append(block)
                    step()
            with clock("write"):
                writer.finish()
            with clock("verify"):
                zeros = written.zeros()
        with clock("write"):
            entries = [manifest_entry(slot, patterns[slot.name], zeros[slot.name]) for slot in slots]
            summary = summary_of(config, command, windows_NL, sum(zeros.values()) / plan.slot_weights)
            card = model_card(config.model.path, command, summary)
            write_metadata(model.checkpoint, work.partial, summary, entries, card, work.digest)
        work.publish()
    except TransientError:
        raise
    except AceError:
        work.discard()  # the fault is in the model or the data: there is nothing to continue
        raise


def _writer(model: StreamedModel, work: Work, terminal: Terminal) -> CheckpointWriter:
    """Begins the new checkpoint, or continues one whose finished blocks are on disk."""
    writer = CheckpointWriter(model.checkpoint, work.partial)
    if work.finished and not writer.continued:
        terminal.say(f"{work.partial} is not as it was left: starting anew.")
        work.restart()
        writer = CheckpointWriter(model.checkpoint, work.partial)
    writer.left -= {key for block in model.blocks[: len(work.finished)] for key in block.files}
    return writer


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


# --- checks and choices ------------------------------------------------------------------------------------------


def _budget(memory_gb: float | None, device: torch.device) -> float:
    """Bytes of the memory that computes which the run may use: as told, or nine tenths of what is free."""
    if memory_gb is not None:
        return memory_gb * 1e9
    free: int = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory.available()
    return 0.9 * free


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
