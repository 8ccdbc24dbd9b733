"""From a dense checkpoint to a pruned one on disk: the step of a run that takes hours, and can be continued."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ace_cli.core import workers as group
from ace_cli.core.errors import AceError, TransientError
from ace_cli.core.typed_json import typed
from ace_cli.core.workers import ONE, Workers
from ace_cli.data.calibration import ExpertTokens
from ace_cli.data.documents import fingerprint
from ace_cli.methods.allocation.sensitivity import SHARES
from ace_cli.methods.gradients import Source
from ace_cli.methods.low_rank import Factorisation
from ace_cli.methods.patterns import Pattern
from ace_cli.methods.statistics import Seen
from ace_cli.model.calls import Batch
from ace_cli.model.files import Checkpoint, CheckpointWriter, NoWriter
from ace_cli.model.header import TensorEntry
from ace_cli.model.pruned import (
    RECOVERED,
    Pruned,
    Rereading,
    Smaller,
    count_zeros,
    manifest_entry,
    verify,
    write_metadata,
)
from ace_cli.model.spill import Spill, kept
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.dense_states import DenseInputs
from ace_cli.pruning.engine import prune, replay
from ace_cli.pruning.facts import BlockFacts
from ace_cli.pruning.gradients import backward_of, model_gradients, steps_of
from ace_cli.pruning.recipe import Permute, Propagate, Recipe
from ace_cli.pruning.recovering import Recovering
from ace_cli.pruning.sensitivity import sensitivities
from ace_cli.pruning.survey import survey
from ace_cli.recovery.base import RecoveryFacts
from ace_cli.recovery.training import training_steps
from ace_cli.report.card import card_of, model_card
from ace_cli.report.terminal import Terminal
from ace_cli.run.assemble import summary_of, versions, with_options
from ace_cli.run.checks import loops_of
from ace_cli.run.config import RunConfig
from ace_cli.run.context import RunContext, Texts
from ace_cli.run.cut import check_loads, settle, smaller, with_new_hashes
from ace_cli.run.forecast import PRUNING, VERIFYING
from ace_cli.run.journal import Work
from ace_cli.run.low_rank import products_of, ranks_of
from ace_cli.run.recover_checkpoint import forget_training, help_training, recorded, recover_checkpoint
from ace_cli.run.slice import check_sliced, sliced, write_sliced
from ace_cli.run.split import is_split, own_windows


def identity_of(config: RunConfig, model: StreamedModel, texts: Texts) -> dict[str, Any]:
    """What decides every byte of the checkpoint: an interrupted run continues only if all of it is the same."""
    choices = {
        group: with_options(group, getattr(config, group))
        for group in ("metric", "allocation", "repair", "quantize", "recover")
    }
    found = versions()
    return {
        "model": model.checkpoint.fingerprint(),
        **choices,
        "sparsity": f"{config.pattern!r}" if config.keep is None else config.requested,
        "unit": with_options("unit", config.unit),
        "propagate": config.propagate.value,
        "permute": config.permute.value,
        "catch_up": config.catch_up,
        "slots": hashlib.sha256("\n".join(slot.name for b in model.blocks for slot in b.slots).encode()).hexdigest(),
        "experts": [config.calib.experts.value, config.calib.min_tokens],
        "calibration": _named(texts.windows_NL),
        **({} if texts.training_NL is None else {"trained on": [_named(texts.training_NL), _named(texts.held_NL)]}),
        "device": _device(config, model.device),
        **({"workers": f"{group.size()}, each with its own windows"} if is_split(config, group.size()) else {}),
        "dtype": str(model.dtype),
        "threads": _threads(config),
        "versions": {name: found[name] for name in ("ace-prune", "torch", "transformers", "numba", "scipy")},
        "loops": loops_of(config, model),
    }


def _named(windows_NL: Tensor | None) -> list[Any] | str:
    return [*windows_NL.shape, fingerprint(windows_NL)] if windows_NL is not None else "none"


def _device(config: RunConfig, device: torch.device) -> str:
    """With the number of workers where that decides how sums are rounded, but not which GPU this one has."""
    alike = group.size() == 1 or (device.type == "cpu" and not config.recover.acts)
    return str(device) if alike else f"{group.size()} x {device.type}"


def _threads(config: RunConfig) -> int | str:
    """How many round the sums of matrix products; "any" where there are none: rows are selected alike by any number."""
    return torch.get_num_threads() if config.needs_data or config.allocation.surveys else "any"


def prune_checkpoint(run: RunContext, work: Work) -> None:
    """Prune into ``checkpoint.partial``, verify what was written, and rename it into place.

    Workers share the blocks, and the training of the whole. Products of thinner weights and a narrower stream are made
    by the first one, while the others wait.
    """
    if work.news:
        run.terminal.say(work.news)
    if run.workers.from_first(lambda: work.complete):
        return
    if run.workers.first:
        _publish(run, work)
        run.workers.done(f"pruned {run.folder}")
        return
    if run.slicer is None and not run.config.unit.ranks:
        (_prune if run.cutting is None else _cut)(run, work)
    if run.texts.training_NL is not None:
        help_training(run, work)
    run.workers.await_first(f"pruned {run.folder}")


def _publish(run: RunContext, work: Work) -> None:
    try:
        step = _slice if run.slicer else _factor if run.config.unit.ranks else _prune if run.cutting is None else _cut
        step(run, work)
        run.model.checkpoint.check_unchanged()
        if warning := work.publish():
            run.terminal.say(f"Warning: {warning}", "yellow")
    except TransientError:
        raise
    except AceError:
        work.discard()  # the fault is in the model or the data: there is nothing to continue
        raise


def _prune(run: RunContext, work: Work) -> None:
    model, clock = run.model, run.inner
    workers = run.workers
    writer = _begin(run, work)
    done = len(work.finished)
    batches, compared = _batches(run, work)
    patterns = _allocate(run, batches)
    recipe = dataclasses.replace(_recipe(run, patterns), gradients=_gradients(run, model))
    recovering, beside = _recovering(run, model, done), _dense_inputs(run, batches, done)
    if not recipe.wanted and recovering is None:  # nothing looks at inputs, but what compares blocks
        batches = [copy.copy(compared)] if compared is not None else []
    if batches and 0 < done < len(model.blocks):
        weights = model.checkpoint if recipe.propagate is Propagate.dense else Checkpoint(work.partial, bare=True)
        replay(model.reading(weights), batches, done, clock)
    if not workers.first:
        _stream(run, work, done, batches, recipe, writer, None, recovering, beside, workers=run.workers)
        return
    slots = [slot for block in model.blocks for slot in block.slots]
    pruned = {slot.name: Pruned(slot.key, slot.in_file, patterns[slot.name]) for slot in slots}
    with Rereading(work.partial, pruned) as written:

        def on_disk(block: BlockFacts) -> None:
            written.check(slot.name for slot in block.slots)

        _stream(run, work, done, batches, recipe, writer, compared, recovering, beside, on_disk, workers)
        with clock("verify"), run.terminal.waiting(VERIFYING):
            zeros = written.zeros()
    recovered = recorded(work)
    _describe(run, work, pruned, patterns, zeros, recovered)
    if run.texts.training_NL is not None:
        with clock("recover"):
            recovered = recover_checkpoint(run, work)
        with clock("verify"), run.terminal.waiting(VERIFYING):
            zeros = count_zeros(Checkpoint(work.partial), pruned)
        _describe(run, work, pruned, patterns, zeros, recovered)
        forget_training(work)


def _describe(
    run: RunContext, work: Work, pruned: dict[str, Pruned], patterns: dict[str, Pattern], zeros: dict[str, int],
    recovered: RecoveryFacts | None = None,
) -> None:  # fmt: skip
    """Write everything but the weights."""
    with run.inner("write"):
        slots = [slot for block in run.model.blocks for slot in block.slots]
        entries = [manifest_entry(slot, patterns[slot.name], zeros[slot.name]) for slot in slots]
        sparsity = sum(zeros.values()) / run.plan.slot_weights
        summary = summary_of(run.config, run.command, run.texts.windows_NL, sparsity)
        if recovered is not None:
            summary[RECOVERED] = dataclasses.asdict(recovered)
        source, base = run.model.checkpoint, run.config.model
        card = model_card(base.name, base.on_hub, summary["command"], summary, card_of(source.folder))
        write_metadata(source, work.partial, summary, entries, card, work.digest)


def _cut(run: RunContext, work: Work) -> None:
    """The same for units that are cut out: tensors get smaller, config.json says so."""
    model, clock, cutting = run.model, run.inner, run.cutting
    assert cutting is not None
    batches, compared = _batches(run, work)
    gradients = _gradients(run, cutting.model)
    settle(run, cutting, batches, gradients)
    writer = _begin(run, work, cutting.entries())
    done = len(work.finished)
    recipe = dataclasses.replace(_recipe(run, {}), cutting=cutting, gradients=gradients)
    beside = _dense_inputs(run, batches, done)
    recovering = _recovering(run, cutting.model, done)  # all weights are trained, not those alone that read units
    if not recipe.wanted and not run.config.metric.of_states and recovering is None:
        batches = [copy.copy(compared)] if compared is not None else []
    if batches and 0 < done < len(model.blocks):
        with clock("replay"):
            dense = recipe.propagate is Propagate.dense
            cutting.replay(batches, work.finished, Checkpoint(work.partial, bare=True), dense)
    if not run.workers.first:
        _stream(run, work, done, batches, recipe, writer, None, recovering, beside, workers=run.workers)
        return
    _stream(run, work, done, batches, recipe, writer, compared, recovering, beside, workers=run.workers)
    _describe_cut(run, work, writer.entries, recorded(work))
    if run.texts.training_NL is not None:
        with clock("recover"):
            recovered = recover_checkpoint(run, work)
        _describe_cut(run, work, writer.entries, recovered)
        forget_training(work)


def _describe_cut(
    run: RunContext, work: Work, entries: Mapping[str, TensorEntry], recovered: RecoveryFacts | None
) -> None:
    """Write everything but the weights, and check that the folder holds and computes what it says."""
    source, cutting = run.model.checkpoint, run.cutting
    assert cutting is not None
    with run.inner("write"):
        manifest = cutting.manifest(work.finished, entries)
        if work.is_trained:
            manifest = with_new_hashes(manifest, Checkpoint(work.partial, bare=True))
        sparsity = 1 - sum(entry.numel for entry in entries.values()) / run.plan.parameters
        summary = summary_of(run.config, run.command, run.texts.windows_NL, sparsity)
        if recovered is not None:
            summary[RECOVERED] = dataclasses.asdict(recovered)
        base = run.config.model
        card = model_card(base.name, base.on_hub, summary["command"], summary, card_of(source.folder))
        write_metadata(source, work.partial, summary, [], card, work.digest, smaller(cutting, entries, manifest))
    with run.inner("verify"), run.terminal.waiting(VERIFYING):
        verify(work.partial)
        check_loads(run.model, work.partial, run.plan.host_bytes)


def _factor(run: RunContext, work: Work) -> None:
    """The same for weights that become products of thinner ones; shapes, names and config.json stay."""
    model, clock, source = run.model, run.inner, run.model.checkpoint
    with clock("write"):
        writer = _writer(model, work, run.terminal)
    done = len(work.finished)
    batches, compared = _batches(run, work)
    shapes = {slot.name: slot.shape for block in model.blocks for slot in block.slots}
    ranks = {name: ranks_of(shapes[name], pattern) for name, pattern in _allocate(run, batches).items()}
    recipe = dataclasses.replace(_recipe(run, {}), ranks=ranks)
    if batches and 0 < done < len(model.blocks):
        weights = source if recipe.propagate is Propagate.dense else Checkpoint(work.partial, bare=True)
        replay(model.reading(weights), batches, done, clock)
    _stream(run, work, done, batches, recipe, writer, compared)
    with clock("write"):
        cuts = products_of(work.finished, writer.entries)
        sparsity = sum(cut["fewer"] for cut in cuts) / run.plan.slot_weights
        summary = summary_of(run.config, run.command, run.texts.windows_NL, sparsity)
        base = run.config.model
        card = model_card(base.name, base.on_hub, summary["command"], summary, card_of(source.folder))
        same = Smaller(writer.entries, source.config(), {}, {}, cuts)
        write_metadata(source, work.partial, summary, [], card, work.digest, same)
    with clock("verify"), run.terminal.waiting(VERIFYING):
        verify(work.partial)


def _slice(run: RunContext, work: Work) -> None:
    """The same for a residual stream that gets narrower. Nothing is kept of an interrupted one: it begins anew."""
    model, clock, source, slicer = run.model, run.inner, run.model.checkpoint, run.slicer
    assert slicer is not None
    work.restart()
    with clock("write"):
        writer = CheckpointWriter(source, work.partial, slicer.entries())
    batches, _ = _batches(run, work)
    end = batches[0]
    with clock("observe"), run.terminal.progress("slicing", len(model.blocks)) as step:
        for tensors in slicer.run(batches, step):
            with clock("write"):
                write_sliced(slicer, writer, tensors)
    with clock("write"):
        writer.finish()
        work.finished += [BlockFacts(index, block.name, [], 0.0) for index, block in enumerate(model.blocks)]
        gone = 1 - sum(entry.numel for entry in writer.entries.values()) / run.plan.parameters
        summary = summary_of(run.config, run.command, run.texts.windows_NL, gone)
        base = run.config.model
        card = model_card(base.name, base.on_hub, summary["command"], summary, card_of(source.folder))
        write_metadata(source, work.partial, summary, [], card, work.digest, sliced(slicer, writer))
    with clock("verify"), run.terminal.waiting(VERIFYING):
        verify(work.partial)
        check_sliced(slicer, work.partial, end)
        check_loads(model, work.partial, run.plan.host_bytes)


def _stream(
    run: RunContext,
    work: Work,
    done: int,
    batches: list[Batch],
    recipe: Recipe,
    writer: CheckpointWriter,
    compared: Batch | None,
    recovering: Recovering | None = None,
    beside: DenseInputs | None = None,
    on_disk: Callable[[BlockFacts], None] = lambda _: None,
    workers: Workers = ONE,
) -> None:
    """All blocks after the ``done`` first ones; ``on_disk`` hears of each that is safely on disk."""
    model = run.model

    def record(block: BlockFacts) -> None:
        work.record(block, writer)
        on_disk(block)

    with run.terminal.progress(PRUNING, len(model.blocks), done) as step:
        for block in prune(
            model, batches, recipe, writer, run.inner, done, record, compared, recovering, workers, beside
        ):
            work.finished.append(block)
            step()
    with run.inner("write"):
        writer.finish()
        model.checkpoint.check_unchanged()


def _batches(run: RunContext, work: Work) -> tuple[list[Batch], Batch | None]:
    """This worker's calibration windows, embedded; and the first of them once more, to compare blocks' outputs on."""
    windows_NL = run.texts.windows_NL
    if windows_NL is None:
        return [], None
    if run.workers.apart:
        windows_NL = windows_NL[own_windows(run.config, run.workers)]
    again = run.config.observe.windows
    with run.inner("embed"):
        spill = Spill(work.folder) if run.plan.spills(run.plan.tokens) else None
        batches = kept(run.model.batches(windows_NL, again), spill)
        return batches, batches.pop() if again else None


def _recovering(run: RunContext, model: StreamedModel, done: int) -> Recovering | None:
    """What trains each block of ``model``, its windows in batches of a training step; None if nothing is trained."""
    recovery, windows_NL = run.config.recover, run.texts.windows_NL
    if not (recovery.acts and recovery.in_stream) or windows_NL is None:
        return None
    steps = training_steps(len(windows_NL), windows_NL.shape[1], recovery.batch)
    with run.inner("embed"):
        dense = done if recovery.carries_dense else None
        return Recovering(model, recovery, windows_NL, steps, dense, run.workers, run.cutting)


def _dense_inputs(run: RunContext, batches: list[Batch], done: int) -> DenseInputs | None:
    """What slots have in the dense model, ``done`` blocks of which are passed, if any are still to catch up with it.

    ``batches`` are still in front of block 0.
    """
    if not run.config.catch_up or done == len(run.model.blocks):
        return None
    with run.inner("replay"):
        return DenseInputs(run.model, batches, done)


def _gradients(run: RunContext, model: StreamedModel) -> dict[str, Seen]:
    """What the slots of ``model`` see of the whole model's loss, if a method asks for it."""
    wanted, windows_NL = run.config.statistics, run.texts.windows_NL
    if not backward_of(wanted, Source.model) or windows_NL is None:
        return {}
    with run.inner("observe"), run.terminal.progress("gradients", steps_of(model, windows_NL)) as step:
        return model_gradients(model, windows_NL, wanted, step)


def _recipe(run: RunContext, patterns: dict[str, Pattern]) -> Recipe:
    config, entries = run.config, run.model.checkpoint.tensors
    half = any(entries[slot.key].dtype == "F16" for block in run.model.blocks for slot in block.slots)
    repair = config.quantize.around(config.repair, half)
    return Recipe(
        config.metric, patterns, repair, config.propagate, config.permute is not Permute.none,
        config.calib.experts is ExpertTokens.all, config.calib.min_tokens, config.observe.tokens,
        catch_up=config.catch_up,
    )  # fmt: skip


def _begin(run: RunContext, work: Work, entries: Mapping[str, TensorEntry] | None = None) -> CheckpointWriter:
    """What writes the new checkpoint; of a worker that is not the first one it writes nothing.

    Every worker then knows the blocks that are finished.
    """
    workers, source = run.workers, run.model.checkpoint
    with run.inner("write"):
        writer = _writer(run.model, work, run.terminal, entries) if workers.first else NoWriter(source)
    if workers.several:
        told = workers.from_first(lambda: [dataclasses.asdict(block) for block in work.finished])
        work.finished = [typed(BlockFacts, each, "finished blocks") for each in told]
    return writer


def _writer(
    model: StreamedModel, work: Work, terminal: Terminal, entries: Mapping[str, TensorEntry] | None = None
) -> CheckpointWriter:
    """Begins the new checkpoint, or continues one whose finished blocks are on disk."""
    writer = CheckpointWriter(model.checkpoint, work.partial, entries)
    if work.finished and not writer.continued:
        terminal.say(f"{work.partial} is not as it was left: starting anew.")
        work.restart()
        writer = CheckpointWriter(model.checkpoint, work.partial, entries)
    writer.left -= {key for block in model.blocks[: len(work.finished)] for key in block.files}
    return writer


def _allocate(run: RunContext, batches: list[Batch]) -> dict[str, Pattern]:
    """Slot name -> its pattern, after a look at the dense model if the allocation asks for one."""
    model, allocation = run.model, run.config.allocation
    blocks = [{slot.name: slot.shape for slot in block.slots} for block in model.blocks]
    measures: list[Any] = [0.0] * len(blocks)
    if allocation.of_ranks:
        assert isinstance(run.config.metric, Factorisation)
        with run.inner("survey"), run.terminal.progress("surveying", len(blocks)) as step:
            measures = sensitivities(model, batches, run.config.metric, SHARES, step)
    elif allocation.surveys:
        with run.inner("survey"), run.terminal.progress("surveying", len(blocks)) as step:
            measures = survey(model, batches, allocation, lambda _: step(), workers=run.workers)
    return allocation.patterns(run.config.pattern, blocks, measures)
