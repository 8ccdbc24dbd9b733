"""Dense and pruned from their files on the same windows: perplexity, and how alike their predictions are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ace_cli.core.errors import AceError, first_line, wider_than
from ace_cli.core.workers import Workers
from ace_cli.evaluation.base import Evaluation, Windows
from ace_cli.evaluation.dense import Dense, DenseCache
from ace_cli.evaluation.fidelity import DenseStates, FidelityMeter, looked_at
from ace_cli.evaluation.perplexity import perplexity, shared_windows, window_losses
from ace_cli.evaluation.samples import Samples, write_on
from ace_cli.model.adapted import with_adapter
from ace_cli.model.spill import Spill
from ace_cli.model.streamed import StreamedModel
from ace_cli.report import facts
from ace_cli.report.terminal import Terminal
from ace_cli.run.assemble import protocol_of
from ace_cli.run.context import RunContext
from ace_cli.run.forecast import DENSE, DENSE_WRITES, PRUNED, PRUNED_WRITES


def evaluate(run: RunContext, folder: Path, windows: Windows) -> tuple[facts.Perplexity, facts.Fidelity | None]:
    """Perplexities and fidelity of the checkpoint in ``folder``: same windows, same dtype, its files read anew.

    No fidelity where the residual stream is another one: it is measured with one head for both models.
    """
    assert isinstance(run.config.eval, Evaluation)
    model, terminal = run.model, run.terminal
    spill = Spill(run.folder) if run.plan.spills(windows.ids_NL.numel()) else None
    protocol = protocol_of(run.config.eval.dataset, windows, model.dtype)
    key = (
        model.checkpoint.key,
        protocol.fingerprint,
        str(protocol.seq_len),
        protocol.dtype,
        str(model.device),
    )

    workers = run.workers
    mine = shared_windows(model, windows.ids_NL, workers)
    compared = [number for number in mine if number < looked_at(windows.ids_NL.shape[1])]

    def measure() -> Dense:
        states = DenseStates(most=len(compared))
        with _evaluating(DENSE, model, terminal) as step:
            return Dense(window_losses(model, windows.ids_NL, lambda _: step(), states, spill, workers), states)

    dense = run.dense.windows(key, measure)
    pruned = StreamedModel(with_adapter(folder), model.device, model.dtype)
    comparison = FidelityMeter(pruned, dense.states) if run.slicer is None else None
    with _evaluating(PRUNED, pruned, terminal) as step:
        watch = comparison or (lambda *_: None)
        losses = window_losses(pruned, windows.ids_NL, lambda _: step(), watch, spill, workers)
    fidelity = _fidelity(comparison, compared, workers) if comparison is not None else None
    return _perplexity(dense.losses, losses, protocol), fidelity


@contextmanager
def _evaluating(what: str, model: StreamedModel, terminal: Terminal) -> Iterator[Callable[[], None]]:
    """A bar of the blocks, and of the head as one more."""
    with terminal.progress(what, len(model.blocks) + 1) as step:
        yield step
        step()


def write_samples(
    options: Samples, model: StreamedModel, folder: Path, cache: DenseCache, terminal: Terminal
) -> tuple[list[facts.Sample], str | None]:
    """The prompts written on by both models; and, where there is nothing to show, why."""
    if why_not := options.refusal(sum(tensor.numel for tensor in model.checkpoint.tensors.values()), model.dtype):
        return [], why_not
    key = (model.checkpoint.key, str(options), f"{model.dtype} {model.device}")
    try:
        with terminal.waiting(DENSE_WRITES) as steps:
            measure = partial(write_on, model.checkpoint, options, model.device, model.dtype, steps)
            dense = cache.samples(key, measure)
        with terminal.waiting(PRUNED_WRITES) as steps:
            pruned = write_on(with_adapter(folder), options, model.device, model.dtype, steps)
    except Exception as fault:  # libraries fail in many ways; what was measured so far is worth more than samples
        return [], f"No samples: {first_line(fault)}"
    greedy = zip(dense.greedy, pruned.greedy, dense.greedy_loops, pruned.greedy_loops, strict=True)
    drawn = zip(dense.sampled, pruned.sampled, dense.sampled_loops, pruned.sampled_loops, strict=True)
    samples = [
        facts.Sample(prompt, sampled, before, after, {"dense": of_dense, "pruned": of_pruned})
        for sampled, written in ((False, greedy), (True, drawn))
        for prompt, (before, after, of_dense, of_pruned) in zip(options.prompts, written, strict=True)
    ]
    return samples, None


def _perplexity(dense: list[float], pruned: list[float], protocol: facts.Protocol) -> facts.Perplexity:
    before, after = perplexity(dense), perplexity(pruned)
    ratios = [perplexity([loss - least]) for least, loss in zip(dense, pruned, strict=True)]
    if not all(map(math.isfinite, (before, after, *ratios))):
        raise AceError(f"Perplexity is not finite (dense {before}, pruned {after}).", wider_than(protocol.dtype))
    return facts.Perplexity(before, after, after / before, protocol, ratios)


def _fidelity(comparison: FidelityMeter, numbers: list[int], workers: Workers) -> facts.Fidelity:
    """``numbers``: the windows that this worker compared."""
    mine = list(zip(numbers, comparison.kl, comparison.agreement, comparison.cosine, strict=True))
    windows = sorted(window for of_worker in workers.told(mine) for window in of_worker)
    kls, *others = ([window[place] for window in windows] for place in (1, 2, 3))
    agreement, cosine = map(statistics.fmean, others)
    tokens = sum(workers.told(comparison.tokens))
    return facts.Fidelity(statistics.fmean(kls), agreement, cosine, len(kls), tokens, kls)
