"""Perplexity by the protocol of SparseGPT and Wanda, streamed block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ace_cli.core.memory import Trimmer
from ace_cli.core.workers import ONE, Workers

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.model.spill import Spill
    from ace_cli.model.streamed import StreamedModel


def perplexity(losses: Sequence[float]) -> float:
    """exp of the mean over windows of what ``window_losses`` found; infinite where that overflows."""
    try:
        return math.exp(math.fsum(losses) / len(losses))
    except OverflowError:
        return math.inf


def window_losses(
    model: StreamedModel,
    windows_NL: Tensor,
    on_block: Callable[[int], None] = lambda _: None,
    watch: Callable[[Tensor, Tensor, Tensor], None] = lambda *_: None,
    spill: Spill | None = None,
    workers: Workers = ONE,
) -> list[float]:
    """Of each window the mean cross-entropy over its L - 1 targets, in nats; windows do not overlap.

    Each block is read once for all windows. Logits are taken to float32, one window at a time. ``watch`` is called for
    each window, in order, with its ids (L), its states after the last block (L, H) and its logits (L - 1, V), while the
    model's head is loaded. ``spill`` holds the hidden states, if they are not to stay in memory.
    Each of ``workers`` computes, and watches, ``shared_windows``; the losses are those that one alone would find.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from ace_cli.model.spill import kept

    mine = shared_windows(model, windows_NL, workers)
    if not mine:
        return _together({}, workers)
    batches, trimmer = kept(model.batches(windows_NL[mine], tokens=model.plain_tokens), spill), Trimmer()
    model.run(batches, on_block)
    losses = []
    with torch.inference_mode(), model.head_loaded():
        for batch in batches:
            for ids_L, hidden_LH in zip(batch.ids_BL, batch.hidden_BLH, strict=True):
                logits_LV = model.logits(ids_L[None], hidden_LH[None])[0, :-1].float()
                losses.append(cross_entropy(logits_LV, ids_L[1:]).double())
                watch(ids_L, hidden_LH, logits_LV)
                trimmer()
    return _together(dict(zip(mine, torch.stack(losses).tolist(), strict=True)), workers)


def shared_windows(model: StreamedModel, windows_NL: Tensor, workers: Workers) -> list[int]:
    """The numbers of the windows that this worker computes: whole batches, so that products have the same shapes."""
    count, step = len(windows_NL), model.windows_at_once(windows_NL.shape[1], model.plain_tokens)
    batches = workers.dealt(-(-count // step))
    return [number for batch in batches for number in range(batch * step, min((batch + 1) * step, count))]


def _together(losses: dict[int, float], workers: Workers) -> list[float]:
    """All workers' losses, in the order of the windows."""
    found = {number: loss for of_worker in workers.told(list(losses.items())) for number, loss in of_worker}
    return [found[number] for number in sorted(found)]
