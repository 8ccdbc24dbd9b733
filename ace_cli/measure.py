"""Dense and pruned from their files on the same windows: perplexity, and how alike their predictions are."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ace_cli.config import RunConfig
from ace_cli.errors import AceError
from ace_cli.evaluation.base import Evaluation
from ace_cli.evaluation.fidelity import Comparison, DenseStates
from ace_cli.evaluation.perplexity import perplexity
from ace_cli.model.files import Checkpoint
from ace_cli.model.streamed import StreamedModel
from ace_cli.report import facts
from ace_cli.report.terminal import Terminal
from ace_cli.texts import fingerprint


@dataclass
class Dense:
    """What is kept of the dense model: its perplexity, and its last states on the windows that fidelity looks at."""

    perplexity: float
    states: DenseStates


#: Dense models measured by this process, by model and protocol: a sweep measures each once.
DenseCache = dict[tuple[str, ...], Dense]
#: Bytes of states that are kept; the oldest models are forgotten, and measured again when they return.
CACHE_BYTES = 1 << 30


def evaluate(
    config: RunConfig, model: StreamedModel, folder: Path, eval_NL: Tensor, terminal: Terminal, cache: DenseCache
) -> tuple[facts.Perplexity, facts.Fidelity]:
    """Perplexities and fidelity of the checkpoint in ``folder``: same windows, same dtype, its files read anew."""
    protocol = _protocol(config, model, eval_NL)
    key = (
        model.checkpoint.fingerprint(),
        protocol.fingerprint,
        str(protocol.seq_len),
        protocol.dtype,
        str(model.device),
    )
    dense = cache.get(key)
    if dense is None:
        states = DenseStates()
        with terminal.progress("evaluating dense", len(model.blocks)) as step:
            dense = Dense(perplexity(model, eval_NL, lambda _: step(), states), states)
    pruned = StreamedModel(Checkpoint(folder), model.device, model.dtype)
    comparison = Comparison(pruned, dense.states)
    with terminal.progress("evaluating pruned", len(pruned.blocks)) as step:
        after = perplexity(pruned, eval_NL, lambda _: step(), comparison)
    if not (0 < dense.perplexity < float("inf") and 0 < after < float("inf")):
        raise AceError(f"Perplexity is not finite (dense {dense.perplexity}, pruned {after}).", "Try dtype=float32.")
    _remember(cache, key, dense)
    return facts.Perplexity(dense.perplexity, after, after / dense.perplexity, protocol), _fidelity(comparison)


def _protocol(config: RunConfig, model: StreamedModel, eval_NL: Tensor) -> facts.Protocol:
    assert isinstance(config.eval, Evaluation)
    return facts.Protocol(
        dataset=config.eval.dataset, seq_len=eval_NL.shape[1], windows=len(eval_NL),
        all_windows=config.eval.max_windows is None or len(eval_NL) < config.eval.max_windows,
        tokens=eval_NL.numel(), dtype=str(model.dtype).removeprefix("torch."), fingerprint=fingerprint(eval_NL),
    )  # fmt: skip


def _remember(cache: DenseCache, key: tuple[str, ...], dense: Dense) -> None:
    cache[key] = dense
    while len(cache) > 1 and sum(kept.states.nbytes for kept in cache.values()) > CACHE_BYTES:
        del cache[next(iter(cache))]


def _fidelity(comparison: Comparison) -> facts.Fidelity:
    kl, agreement, cosine = (
        statistics.fmean(values) for values in (comparison.kl, comparison.agreement, comparison.cosine)
    )
    return facts.Fidelity(kl, agreement, cosine, len(comparison.kl), comparison.tokens, comparison.kl)
