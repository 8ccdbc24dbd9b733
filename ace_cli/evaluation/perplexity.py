"""Perplexity by the protocol of SparseGPT and Wanda, streamed block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ace_cli.core.memory import Trimmer

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
) -> list[float]:
    """Of each window the mean cross-entropy over its L - 1 targets, in nats; windows do not overlap.

    Each block is read once for all windows. Logits are taken to float32, one window at a time. ``watch`` is called for
    each window, in order, with its ids (L), its states after the last block (L, H) and its logits (L - 1, V), while the
    model's head is loaded. ``spill`` holds the hidden states, if they are not to stay in memory.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from ace_cli.model.spill import kept

    batches, trimmer = kept(model.batches(windows_NL, tokens=model.plain_tokens), spill), Trimmer()
    model.run(batches, on_block)
    losses = []
    with torch.inference_mode(), model.head_loaded():
        for batch in batches:
            for ids_L, hidden_LH in zip(batch.ids_BL, batch.hidden_BLH, strict=True):
                logits_LV = model.logits(ids_L[None], hidden_LH[None])[0, :-1].float()
                losses.append(cross_entropy(logits_LV, ids_L[1:]).double())
                watch(ids_L, hidden_LH, logits_LV)
                trimmer()
    return torch.stack(losses).tolist()
