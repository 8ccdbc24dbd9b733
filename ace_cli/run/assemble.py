"""What is known at the end of a run -> its report; and the words that the plan, the report and the model card share."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from ace_cli import __version__
from ace_cli.core.json_reader import read_object
from ace_cli.core.registry import name_of
from ace_cli.core.timing import Phases
from ace_cli.data.calibration import ExpertTokens
from ace_cli.data.documents import fingerprint
from ace_cli.evaluation.base import Windows
from ace_cli.methods.patterns import Ratio
from ace_cli.model import uneven
from ace_cli.model.files import Checkpoint
from ace_cli.model.pruned import MANIFEST, RECOVERED, Manifest, read_manifest
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.facts import BlockFacts, SlotFacts
from ace_cli.report import facts
from ace_cli.report.card import without_places
from ace_cli.run.checks import SPARSE, loops_of
from ace_cli.run.config import RunConfig
from ace_cli.run.plan import Plan
from ace_cli.run.target import Target

if TYPE_CHECKING:
    from ace_cli.run.context import RunContext
    from ace_cli.run.journal import Work


@dataclasses.dataclass
class Measured:
    """What was found out about the pruned model; nothing where it was not asked for."""

    perplexity: facts.Perplexity = dataclasses.field(default_factory=facts.Perplexity)
    fidelity: facts.Fidelity | None = None
    zero_shot: facts.ZeroShot | None = None
    speed: facts.Speed | None = None
    samples: list[facts.Sample] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


def make_report(run: RunContext, work: Work, measured: Measured, stages: dict[str, dict[str, Any]]) -> facts.Report:
    """The report of a run whose checkpoint is in place."""
    config, model, plan, windows_NL = run.config, run.model, run.plan, run.texts.windows_NL
    slots = [slot for block in work.finished for slot in block.slots]
    manifest, written = read_manifest(work.final), Checkpoint(work.final)
    size = _size(run, written, manifest) if _smaller(run) else None
    zeros = {name: entry.zeros for name, entry in manifest.slots.items()}
    zeros |= {cut.name: cut.fewer for cut in manifest.cuts}  # what is no longer there
    pruned = sum(zeros.values())
    dense = sum(slot.diagnosis.get("zeros_before", 0) for slot in slots) / plan.slot_weights
    seconds = _seconds(run)
    tokens = windows_NL.numel() if windows_NL is not None else 0
    loops = loops_of(config, model)
    return facts.Report(
        command=run.command,
        created=run.start.isoformat(timespec="seconds"),
        versions=versions(),
        hardware=_hardware(model.device) | {"loops": loops, "workers": run.workers.size},
        config={"yaml": config.text},
        model=_model(config, model, plan),
        method=_method(config, plan),
        calibration=_calibration(config, windows_NL) if windows_NL is not None else None,
        sparsity=_sparsity(run, size, pruned, dense),
        perplexity=measured.perplexity,
        fidelity=measured.fidelity,
        zero_shot=measured.zero_shot,
        seconds=seconds,
        phases=dict(run.inner.seconds),
        tokens_per_second={"prune": tokens / seconds["prune"]} if tokens and not work.resumed else {},
        efficiency=_efficiency(run, seconds) if not work.resumed else {},
        peak_memory_bytes=_peaks(model.device, run.phases),
        timeline=_timeline(run.phases),
        bytes_on_disk={"dense": model.checkpoint.file_bytes, "pruned": written.file_bytes},
        checkpoint=str(work.final),
        own_code=(work.final / uneven.FILE).is_file(),
        slots=[_slot(slot, zeros.get(slot.name, 0)) for slot in slots],
        blocks=[_block(block) for block in work.finished],
        samples=measured.samples,
        gate=_gate(config, measured),
        stages=stages,
        speed=measured.speed,
        recovery=read_object(work.final / MANIFEST).get(RECOVERED),
        warnings=[*_warnings(config, work.finished, plan, work, loops), *measured.notes],
        size=size,
        target=_target(config.target, work.final) if config.target is not None else None,
    )


def _sparsity(run: RunContext, size: facts.Size | None, zeros: int, dense: float) -> facts.Sparsity:
    """Shares of zeros; of a model that got smaller, the share of its parameters that is gone."""
    if size is not None:
        gone = 1 - size.parameters["pruned"] / run.plan.parameters
        return facts.Sparsity(run.config.requested, gone, gone)
    return facts.Sparsity(run.config.requested, zeros / run.plan.slot_weights, zeros / run.plan.parameters, dense)


def _smaller(run: RunContext) -> bool:
    return run.cutting is not None or run.config.unit.ranks or run.config.unit.slices


def _size(run: RunContext, written: Checkpoint, manifest: Manifest) -> facts.Size:
    """By what was written: a run that was continued behind its last block knows nothing else of the widths."""
    couplings = [] if run.cutting is None else [each for block in run.cutting.couplings for each in block]
    regions = {each.name: each.regions for each in couplings}
    stay = {cut.name: len(cut.kept) // regions.get(cut.name, 1) for cut in manifest.cuts}
    dense = run.plan.parameters
    if run.cutting is not None:
        left = sum(entry.numel for entry in written.tensors.values())
        return facts.Size(run.cutting.name, {"dense": dense, "pruned": left}, stay)
    left = dense - sum(cut.fewer for cut in manifest.cuts)
    name, ranks = ("rank", True) if run.config.unit.ranks else ("direction", False)
    return facts.Size(name, {"dense": dense, "pruned": left}, stay, as_products=ranks)


def _target(target: Target, checkpoint: Path) -> facts.TargetFacts:
    """What was asked, and the size of what was written."""
    written = Checkpoint(checkpoint.parent / target.form, bare=True)
    measured = written.file_bytes if target.in_bytes else sum(entry.numel for entry in written.tensors.values())
    of = "bytes" if target.in_bytes else "parameters"
    return facts.TargetFacts(target.asked, of, target.size, target.way, target.planned, measured, target.form)


def protocol_of(dataset: str, windows: Windows, dtype: torch.dtype) -> facts.Protocol:
    """What must be equal for two perplexities to be compared."""
    return facts.Protocol(
        dataset=dataset, seq_len=windows.ids_NL.shape[1], windows=len(windows.ids_NL), all_windows=windows.whole,
        tokens=windows.ids_NL.numel(), dtype=str(dtype).removeprefix("torch."), fingerprint=fingerprint(windows.ids_NL),
    )  # fmt: skip


def _seconds(run: RunContext) -> dict[str, float]:
    names = ("import", "calibrate", "prune", "write", "export", "evaluate", "samples", "bench")
    seconds = {name: run.phases.clock.seconds[name] for name in names}
    seconds["write"] = run.inner.seconds["write"] + run.inner.seconds["verify"]
    seconds["prune"] -= seconds["write"]
    seconds["total"] = (datetime.datetime.now(datetime.UTC) - run.start).total_seconds()
    return seconds


def _efficiency(run: RunContext, seconds: dict[str, float]) -> dict[str, Any]:
    """The products of the run itself are timed, too: where the machine shows more than it did in the probe."""
    inner = run.inner.seconds
    computing = inner["observe"] + inner["forward"] if run.model.device.type == "cpu" else 0.0  # others do not wait
    return run.limit.efficiency(seconds["prune"] + seconds["write"], computing or float("inf"))


def _model(config: RunConfig, model: StreamedModel, plan: Plan) -> dict[str, Any]:
    return {
        "path": config.model.path, "folder": plan.model, "architecture": plan.architecture,
        "parameters": plan.parameters, "fingerprint": model.checkpoint.fingerprint(),
        "stamps": model.checkpoint.origin, "digest": model.checkpoint.digest(), "blocks": plan.blocks,
        "slot_weights": plan.slot_weights, "coverage": plan.coverage, "left_dense": plan.left_dense,
        "copied": plan.copied,
    }  # fmt: skip


def _method(config: RunConfig, plan: Plan) -> dict[str, Any]:
    choices: dict[str, Any] = {}
    for group in ("metric", "repair", "quantize", "allocation", "recover"):
        choice = getattr(config, group)
        choices |= {group: name_of(group, choice), f"{group}_options": _options(choice)}
    return {
        **choices, "unit": name_of("unit", config.unit), "unit_options": _options(config.unit),
        "pattern": config.requested,
        "scope": config.pattern.scope.value if isinstance(config.pattern, Ratio) else None,
        "propagate": config.propagate.value, "permute": config.permute.value, "catch_up": config.catch_up,
        "device": plan.device, "dtype": plan.dtype,
    }  # fmt: skip


def _calibration(config: RunConfig, windows_NL: Tensor) -> facts.CalibrationFacts:
    calib = config.calib
    return facts.CalibrationFacts(
        name_of("calib", calib), calib.n_samples, calib.seq_len, calib.seed, windows_NL.numel(), fingerprint(windows_NL)
    )


def _peaks(device: torch.device, phases: Phases) -> dict[str, int]:
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {"host": max(phases.memory.values()), "device": on_device, **phases.memory}


def _block(block: BlockFacts) -> dict[str, Any]:
    output = dataclasses.asdict(block.output) if block.output is not None else None
    recovery = dataclasses.asdict(block.recovery) if block.recovery is not None else None
    return {"name": block.name, "seconds": block.seconds, "output": output, "recovery": recovery}


def _gate(config: RunConfig, measured: Measured) -> facts.GateFacts | None:
    if config.gate.max_ppl_ratio is None:
        return None
    return facts.GateFacts(config.gate.max_ppl_ratio, config.gate.objection(measured.perplexity.ratio) is None)


def _timeline(phases: Phases) -> facts.Timeline:
    phases.sampler.sample()
    seconds, sizes = zip(*phases.sampler.samples, strict=True)
    spans = [facts.PhaseSpan(name, round(start, 3), round(end, 3)) for name, start, end in phases.spans]
    return facts.Timeline([round(second, 3) for second in seconds], list(sizes), spans)


def _slot(slot: SlotFacts, zeros: int) -> dict[str, Any]:
    sparsity = zeros / (slot.shape[0] * slot.shape[1])
    known = dataclasses.asdict(dataclasses.replace(slot, digests={}))
    return {**known, "zeros": zeros, "sparsity": sparsity, "like_magnitude": _like_magnitude(slot)}


def _like_magnitude(slot: SlotFacts) -> bool:
    """The factors that multiply the weights hardly differ: the metric ranks as |W| does."""
    return slot.diagnosis.get("spread", 2.0) < 1.05


def _warnings(config: RunConfig, blocks: list[BlockFacts], plan: Plan, work: Work, loops: str) -> list[str]:
    slots = [slot for block in blocks for slot in block.slots]
    warnings = _notes(slots)
    if loops.startswith("not compiled"):
        warnings.append(f"Loops were {loops}. Pruning took longer than it has to: install numba.")
    before = sum(slot.diagnosis.get("zeros_before", 0) for slot in slots) / plan.slot_weights
    if before >= SPARSE:
        warnings.append(f"{before:.1%} of these weights were zero before: the model was pruned already.")
    if work.resumed:
        warnings.append("This run was interrupted and continued: its times are those of the last part alone.")
    flat = [slot.name for slot in slots if _like_magnitude(slot)]
    if flat:
        warnings.append(
            f"{len(flat)} of {len(slots)} weights see activations whose factors differ by less than 5 %: there, "
            f"{name_of('metric', config.metric)} is magnitude pruning (first: {flat[0]})."
        )
    few = [slot.name for slot in slots if slot.routed is not None and slot.routed < config.calib.min_tokens]
    if few and config.calib.experts is ExpertTokens.routed:
        warnings.append(
            f"Fewer than {config.calib.min_tokens} tokens are routed to the experts of {len(few)} of {len(slots)} "
            f"weights: they were observed on all tokens of their layer (first: {few[0]})."
        )
    same = [block.name for block in blocks if block.recovery is not None and not block.recovery.epochs]
    if same:
        warnings.append(
            f"{len(same)} of {len(blocks)} blocks got no better by training and stay as they were (first: {same[0]})."
        )
    if plan.copied:
        warnings.append(f"Copied as it was: {'; '.join(plan.copied)}.")
    if plan.left_dense:
        warnings.append(f"Left dense inside the blocks: {', '.join(plan.left_dense)}.")
    return warnings


def _notes(slots: list[SlotFacts]) -> list[str]:
    """What was noted of weights: once where many notes differ in their numbers alone."""
    alike: dict[str, list[str]] = {}
    for slot in slots:
        for note in slot.notes:
            alike.setdefault(re.sub(r"[\d.,e+-]*\d", "#", note), []).append(f"{slot.name}: {note}")
    return [
        first + (f" (so, or nearly so, {len(more)} other weights)" if more else "") for first, *more in alike.values()
    ]


def versions() -> dict[str, str]:
    """Of this tool, Python and the libraries that decide results."""
    names = ("torch", "transformers", "datasets", "safetensors", "hydra-core", "numpy", "numba", "scipy")
    return {
        "ace-prune": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in names},
    }


@functools.cache
def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _hardware(device: torch.device) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        **({"gpu": gpu} if gpu else {}),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


# --- words --------------------------------------------------------------------------------------------------------


def _options(choice: Any) -> dict[str, Any]:
    return {name: getattr(value, "value", value) for name, value in vars(choice).items()}


def with_options(group: str, choice: Any) -> str:
    """A choice as the plan names it: "varp (norm=share, form=norms, wpow=1)"."""
    options = ", ".join(f"{name}={value}" for name, value in _options(choice).items())
    return name_of(group, choice) + (f" ({options})" if options else "")


def method_line(config: RunConfig) -> str:
    """Metric, pattern, repair, allocation and orders in one line."""
    scope = f" of each {config.pattern.scope.value}" if isinstance(config.pattern, Ratio) else " (kept : of)"
    others = [
        f"{group} {with_options(group, getattr(config, group))}"
        for group in ("repair", "quantize", "allocation", "recover")
    ]
    asked = f"{config.pattern}{scope}"
    if config.unit.cuts:
        asked = f"{config.requested} of unit {with_options('unit', config.unit)}"
    parts = [with_options("metric", config.metric), asked, *others]
    parts += [f"propagate {config.propagate.value}", f"permute {config.permute.value}"]
    return ", ".join([*parts, f"catch_up {config.catch_up:g}"] if config.catch_up else parts)


def calibration_line(config: RunConfig) -> str:
    """The windows asked for, in one line."""
    calib = config.calib
    return f"{calib.n_samples} windows of {calib.seq_len} tokens, {with_options('calib', calib)}"


def summary_of(config: RunConfig, command: str, windows_NL: Tensor | None, sparsity: float) -> dict[str, Any]:
    """The "pruning" entry of config.json."""
    calibration = "none"
    if windows_NL is not None:
        calibration = (
            f"{name_of('calib', config.calib)}, {windows_NL.shape[0]} x {windows_NL.shape[1]} tokens, seed "
            f"{config.calib.seed}, sha256 {fingerprint(windows_NL)[:16]}"
        )
    grid = {"grid": {"bits": config.quantize.bits, "group": config.quantize.group}} if config.quantize.acts else {}
    return {
        **grid,
        "tool": f"ace-prune {__version__}",
        "command": without_places(command),
        "method": name_of("metric", config.metric),
        "repair": name_of("repair", config.repair),
        "quantize": name_of("quantize", config.quantize),
        "recover": name_of("recover", config.recover),
        "allocation": name_of("allocation", config.allocation),
        "permute": config.permute.value,
        "catch_up": config.catch_up,
        "unit": name_of("unit", config.unit),
        "pattern": config.requested,
        "sparsity": sparsity,
        "base_model": config.model.name,
        "calibration": calibration,
    }
