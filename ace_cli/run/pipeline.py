"""One run, readable top to bottom: open, plan, calibrate, prune, verify, evaluate, report."""

from __future__ import annotations

import dataclasses
import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ace_cli.core import memory
from ace_cli.core import workers as group
from ace_cli.core.device import choose_device, choose_dtype
from ace_cli.core.errors import AceError, first_line
from ace_cli.core.locks import fresh_folder, locked
from ace_cli.core.registry import name_of
from ace_cli.core.steps import Steps
from ace_cli.core.timing import Clock, MemorySampler, Phases
from ace_cli.core.workers import ONE, Workers
from ace_cli.data.documents import TooFewWindows
from ace_cli.evaluation.base import Evaluation
from ace_cli.evaluation.dense import DenseCache
from ace_cli.evaluation.zero_shot import harness
from ace_cli.methods import catch_up
from ace_cli.model.files import Checkpoint
from ace_cli.model.slots import SlotFilter
from ace_cli.model.source import open_model
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.cutting import Cutting
from ace_cli.pruning.slicing import Slicer
from ace_cli.report import facts, near
from ace_cli.report.html import render as page
from ace_cli.report.markdown import render
from ace_cli.report.terminal import Terminal, quiet_libraries
from ace_cli.report.trackers.base import choices_of, numbers_of
from ace_cli.run import forecast, hub
from ace_cli.run.assemble import Measured, make_report
from ace_cli.run.at_scale import lines_at_scale, rates_of
from ace_cli.run.checks import (
    already_sparse,
    check_catch_up,
    check_gradients,
    check_inputs_stay,
    check_left,
    check_length,
    check_tokens,
    check_training,
    disk_of_training,
    loops_of,
    memory_budget,
    pruned_by_rows,
)
from ace_cli.run.compare import evaluate, write_samples
from ace_cli.run.config import RunConfig
from ace_cli.run.context import RunContext, Texts
from ace_cli.run.cut import begin, describe, own_files
from ace_cli.run.journal import Followed, Work, find_unfinished
from ace_cli.run.machine_limit import Limit, probe
from ace_cli.run.meeting import met, told
from ace_cli.run.plan import Demand, Plan, check_room, make_plan
from ace_cli.run.prune_checkpoint import identity_of, prune_checkpoint
from ace_cli.run.quantised import check_grid, rounded
from ace_cli.run.slice import slicer_files, slicer_of
from ace_cli.run.speed import check_bench, measure_speed
from ace_cli.run.split import check_split, is_split, most_tokens
from ace_cli.run.stages import run_stage
from ace_cli.run.words import chosen, details

#: Seconds that a person waits without a thought of what would be cheaper.
_A_WAIT = 30.0
#: What to do where there is too little of it.
LESS_MEMORY = (
    "Lower calib.n_samples, calib.seq_len or eval.seq_len, set memory_gb so that hidden states go to disk, or use "
    "repair=none, dtype=bfloat16 or device=cpu. Finished blocks are kept."
)


def run(
    config: RunConfig, command: str, terminal: Terminal, dense_cache: DenseCache, workers: Workers = ONE
) -> facts.Report | None:
    """Do what the configuration says; None for a dry run, and for all ``workers`` but the first one.

    Raises AceError for what the user can mend.
    """
    memory.one_heap()
    try:
        with MemorySampler() as sampler, memory.lack_in_one_line(LESS_MEMORY):
            return _run(config, command, terminal, dense_cache, sampler, workers)
    except OSError as fault:
        where = fault.filename or config.output_dir
        raise AceError(
            f"{fault.strerror or fault}: {where}.", "Mend it, then repeat the command: finished blocks are kept."
        ) from fault


def _run(
    config: RunConfig, command: str, terminal: Terminal, dense_cache: DenseCache, sampler: MemorySampler,
    workers: Workers,
) -> facts.Report | None:  # fmt: skip
    start = datetime.datetime.now(datetime.UTC)
    device = choose_device(config.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    phases = Phases(Clock(partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None), sampler)
    quiet_libraries()
    if config.push_to_hub is not None and not config.dry_run:
        hub.check(config.push_to_hub)
    with phases("import"), terminal.waiting("opening the model") as steps:
        model = _open(config, device, steps)
        config = met(config, model)
        if config.hardware is not None:  # for a plan: nothing is computed
            model.device = torch.device(config.hardware.device)
            model.dtype = choose_dtype(config.dtype, model.device, model.checkpoint)
        cutting = begin(config, model) if config.unit.cuts else None
        model = model if cutting is None else cutting.watched
        slicer = slicer_of(config, model) if config.unit.slices else None
    plan, limit = _plan(config, model, cutting, slicer, terminal)
    if config.dry_run:
        return None
    texts = _texts(config, model.checkpoint, device, terminal, phases)
    check_tokens(model, texts)
    identity = identity_of(config, model, texts)
    workers.agree("before pruning", identity)
    workers = dataclasses.replace(workers, apart=is_split(config, workers.size))
    folder = Path(workers.from_first(lambda: str(_output_folder(config, identity))))
    config = dataclasses.replace(config, output_dir=folder)
    run = RunContext(
        config, command, terminal, dense_cache, phases, model, plan, limit, texts, cutting, start, workers, slicer
    )
    if not workers.first:
        _follow(run, Followed(run.folder, identity, model))
        return None
    expected = forecast.of_run(run)
    with locked(run.folder) as alone, terminal.logging_to(run.folder / "run.log"):
        terminal.note(f"$ {command}")
        terminal.aside(f"{'expects':12} {expected.line(config.verbose)}")
        terminal.expect(expected.bars())
        if not alone:
            terminal.say(f"Warning: {run.folder} has no file locks: start no second run in it.", "yellow")
        more = slicer_files(slicer) if slicer else () if cutting is None else own_files(cutting)
        more = (*more, *config.recover.files)
        work = Work(run.folder, identity, model, config.keep_checkpoint, more)
        try:
            report = _do(run, work)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(work.kept) from None
        terminal.result(report, run.folder, config.html, config.verbose)
        if config.push_to_hub is not None:
            with terminal.waiting(f"uploading to {config.push_to_hub}"):
                address = hub.push(config.push_to_hub, work.final, report)
            terminal.place("Hub", address)
    return report


def _follow(run: RunContext, work: Work) -> None:
    """What a worker does that is not the first one: its share of pruning and of evaluation."""
    prune_checkpoint(run, work)
    run.workers.await_first(f"staged {run.folder}")
    _measured(run, work.final, {})


def _do(run: RunContext, work: Work) -> facts.Report:
    """Prune, measure, report: what can be interrupted and continued."""
    with run.phases("prune"):
        prune_checkpoint(run, work)
    stages = _staged(run, work)
    run.workers.done(f"staged {run.folder}")
    measured = _measured(run, work.final, stages)
    run.model.checkpoint.check_unchanged()  # or what was measured of the dense model is of two
    report = make_report(run, work, measured, stages)
    with run.terminal.waiting("writing the report"):
        _write(run.config, report)
    _track(run.config, report, run.terminal)
    if warning := work.close():
        run.terminal.say(f"Warning: {warning}", "yellow")
    return report


def _open(config: RunConfig, device: torch.device, steps: Steps) -> StreamedModel:
    source = open_model(config.model, steps)
    selection = SlotFilter(config.include, config.exclude)
    return StreamedModel(source, device, choose_dtype(config.dtype, device, source), selection)


def _plan(
    config: RunConfig, model: StreamedModel, cutting: Cutting | None, slicer: Slicer | None, terminal: Terminal
) -> tuple[Plan, Limit]:
    """Everything that can be known to go wrong before work begins, and what the run will need, shown."""
    check_left(model, config)
    check_catch_up(config, model)
    if config.quantize.acts:
        check_grid(config.quantize, model)
    count = config.workers or group.size()
    check_split(config, count)
    tokens, repair = most_tokens(config, count), config.repairing
    alone = pruned_by_rows(config, model) and cutting is None

    by_slots, planned = cutting is None or cutting.by_slots, model if cutting is None else cutting.planned

    def flops(rows: int, columns: int) -> int:
        moving = catch_up.flops(rows, columns) if config.catch_up else 0
        return by_slots * (config.metric.flops(rows, columns) + repair.flops(rows, columns) + moving)

    def nbytes(rows: int, columns: int) -> int:
        held = repair.nbytes(rows, columns) if cutting is None or cutting.repairs else 0
        most = max(by_slots * config.metric.nbytes(rows, columns), held)
        return max(most + 4 * rows * columns, catch_up.nbytes(rows, columns)) if config.catch_up else most

    demand = Demand(
        tokens, config.calib.length, config.statistics if by_slots else (), config.propagate,
        config.allocation.surveys if cutting is None else config.allocation.surveys + cutting.looks, alone, flops,
        config.forwards_of_training, config.recover.bytes_per_weight(),
        nbytes,
        config.eval.seq_len if isinstance(config.eval, Evaluation) else 0,
        0 if cutting is None else cutting.beside,
        config.catch_up > 0,
    )  # fmt: skip
    # an allocation moves the weights to be pruned between blocks, but neither their number nor M
    patterns = {slot.name: config.pattern for block in planned.blocks for slot in block.slots}
    budget = _budget(config, model.device)
    dense = model if cutting is None else cutting.model
    plan = make_plan(planned, patterns, demand, budget, dense)
    if cutting is not None:
        plan = plan.smaller(cutting.entries(), describe(cutting, config), cutting.speeds)
    if slicer is not None:
        plan = plan.smaller(slicer.entries(), f"{slicer.width} of {slicer.hidden} directions stay", True)
    if config.quantize.acts:
        plan = dataclasses.replace(plan, rounds=rounded(config.quantize, model))
    more = _stage_bytes(config, model.checkpoint) + disk_of_training(config, plan)
    plan = dataclasses.replace(plan, disk_bytes=plan.disk_bytes + more)
    check_length(model, config, tokens > 0)
    check_inputs_stay(model.checkpoint, config)
    largest = max(rows * columns for rows, columns in plan.shapes.values())
    if config.hardware is not None:
        rates = rates_of(config.hardware)
    else:
        with terminal.waiting("timing this machine"):
            rates = probe(model.device, model.dtype, model.checkpoint, config.output_dir, config.pattern, largest)
    limit = plan.limit(rates, model.checkpoint.nbytes)
    takes = forecast.span(forecast.pruning(plan, limit))
    rows = details(config, plan, limit, takes) if config.verbose or config.dry_run else {}
    if config.target is not None:
        rows["target"] = told(config.target)
    if instead := _instead(config, plan, limit):
        rows["cheaper"] = instead
    terminal.plan(plan, chosen(config), rows)
    if config.workers is not None or config.hardware is not None:
        whole = dataclasses.replace(demand, tokens=most_tokens(config, 1))
        of_one = make_plan(planned, patterns, whole, budget, dense)
        for name, line in lines_at_scale(config, model, plan, of_one, rates).items():
            terminal.say(f"{name:12} {line}")
        return plan, limit  # whether this machine has room for it says nothing about those
    if config.bench is not None:
        check_bench(config.bench, model.checkpoint)
    check_room(plan, config.output_dir)
    check_training(config, plan, model)
    check_gradients(config, dense, plan)
    if sparse := already_sparse(model, config.pattern):
        terminal.say(f"Warning: {sparse}.", "yellow")
    if (loops := loops_of(config, model)).startswith("not compiled"):
        terminal.say(f"Warning: loops are {loops}. Pruning takes several times as long: install numba.", "yellow")
    return plan, limit


def _budget(config: RunConfig, device: torch.device) -> float:
    """Bytes that the plan may count on: of this machine, or of one on a card."""
    if config.hardware is not None and config.memory_gb is None:
        return 0.9e9 * config.hardware.memory_gb
    return memory_budget(config.memory_gb, device)


def _output_folder(config: RunConfig, identity: dict[str, Any]) -> Path:
    """The folder that was named; else one where the same run was interrupted, or a new one that no other run has."""
    if config.output_dir_given:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        return config.output_dir
    return find_unfinished(config.output_dir.parent, identity) or fresh_folder(config.output_dir)


def _instead(config: RunConfig, plan: Plan, limit: Limit) -> str:
    """What would be much cheaper than the metric, and what that loses; empty where nothing is."""
    plain = dataclasses.replace(plan, method_flops=0, by_rows=True)
    least = dataclasses.replace(limit, method_flops=0)
    seconds = plan.seconds(limit)
    if not config.metric.cheaper or seconds < max(_A_WAIT, 2 * plain.seconds(least)):
        return ""
    return f"{config.metric.cheaper}: {forecast.span(forecast.pruning(plain, least))}"


def _texts(config: RunConfig, source: Checkpoint, device: torch.device, terminal: Terminal, phases: Phases) -> Texts:
    """All that will be read, before hours of pruning: a missing evaluation text is found now."""
    with phases("calibrate"), terminal.waiting(f"calibration windows from {name_of('calib', config.calib)}") as steps:
        windows_NL, training_NL, held_NL, few = _calibration(config, source, str(device), steps)
    if few:
        terminal.say(f"Warning: {few}.", "yellow")
    with phases("evaluate"), terminal.waiting(f"evaluation windows from {name_of('eval', config.eval)}") as steps:
        texts = config.eval if isinstance(config.eval, Evaluation) else None
        evaluation = texts.windows(source, str(device), steps) if texts is not None else None
    with phases("evaluate"), terminal.waiting("data of the zero-shot tasks") as steps:
        tasks = harness.load(config.eval, source, steps)
    return Texts(windows_NL, training_NL, held_NL, evaluation, tasks)


def _calibration(
    config: RunConfig, source: Checkpoint, device: str, steps: Steps
) -> tuple[Tensor | None, Tensor | None, Tensor | None, str]:
    """Windows that prune; to train the whole model on, and held out, if it is; what to say where a text has few."""
    calib, recovery = config.calib, config.recover
    if not config.needs_data:
        return None, None, None, ""
    if not recovery.whole:
        return calib.windows(source, device, steps), None, None, ""
    trained, held = recovery.trained_on(calib.rows)
    try:
        all_NL = calib.windows(source, device, steps, more=max(0, trained + held - calib.rows))
        return all_NL[: calib.rows], all_NL[:trained], all_NL[trained : trained + held], ""
    except TooFewWindows:
        if recovery.insists:
            raise
    windows_NL = calib.windows(source, device, steps)
    trained = max(1, len(windows_NL) - held)
    few = "the text has no more windows: those held out of training are some that pruning sees"
    return windows_NL, windows_NL[:trained], windows_NL[min(trained, len(windows_NL) - 1) :], few


def _stage_bytes(config: RunConfig, source: Checkpoint) -> int:
    """Bytes of disk that the stages take. AceError where one of them cannot be done with this model."""
    for stage in config.stages:
        if reason := stage.refusal(source.folder):
            raise AceError(reason)
    return sum(stage.disk_bytes(source.nbytes) for stage in config.stages)


def _staged(run: RunContext, work: Work) -> dict[str, dict[str, Any]]:
    """Name of each stage -> its facts, in one folder each beside the checkpoint."""
    found = {}
    for stage in run.config.stages:
        with run.phases("export"):
            facts = run_stage(stage, work.final, work.digest, run.folder, run.terminal.progress)
        result = run.folder / stage.name / facts.get("file", "")
        found[stage.name] = {**facts, "result": str(result), "summary": stage.summary(facts)}
    return found


def _measured(run: RunContext, pruned: Path, stages: dict[str, dict[str, Any]]) -> Measured:
    """What was asked about the checkpoint in the folder ``pruned``."""
    found, texts = Measured(), run.texts
    if texts.evaluation is not None:
        with run.phases("evaluate"):
            found.perplexity, found.fidelity = evaluate(run, pruned, texts.evaluation)
    if texts.tasks is not None:
        with run.phases("evaluate"):
            found.zero_shot = harness.dense_and_pruned(
                texts.tasks, run.model, pruned, run.terminal, run.dense, run.workers
            )
    if not run.workers.first:
        return found
    if texts.evaluation is not None and run.config.samples.wanted:
        with run.phases("samples"):
            found.samples, why_not = write_samples(run.config.samples, run.model, pruned, run.dense, run.terminal)
            found.notes += [why_not] if why_not else []
    if run.config.bench is not None:
        with run.phases("bench"):
            found.speed = measure_speed(run, run.config.bench, pruned, stages)
    return found


def _write(config: RunConfig, report: facts.Report) -> None:
    facts.save(report, config.output_dir / "report.json")
    facts.write_whole(config.output_dir / "report.md", render(report))
    if config.html:
        others = near.place(near.beside(config.output_dir), config.output_dir)
        facts.write_whole(config.output_dir / "report.html", page(dataclasses.asdict(report), others))


def _track(config: RunConfig, report: facts.Report, terminal: Terminal) -> None:
    content = dataclasses.asdict(dataclasses.replace(report, slots=[], blocks=[]))
    try:
        config.tracker.record(choices_of(content), numbers_of(content), config.output_dir)
    except Exception as fault:  # a server that is away must not take the run's result with it
        name = name_of("tracker", config.tracker)
        terminal.say(f"Warning: tracker={name} failed, the run's own files are whole: {first_line(fault)}", "yellow")
