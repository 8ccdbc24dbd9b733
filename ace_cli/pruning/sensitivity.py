"""How much a block's output changes when one of its weights alone becomes a thinner product."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from ace_cli.core.errors import AceError
from ace_cli.methods.low_rank import Factorisation, rank_of
from ace_cli.methods.statistics import Seen
from ace_cli.model.calls import Batch
from ace_cli.model.slots import Slot
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.observer import Observer, hooked


def sensitivities(
    model: StreamedModel, batches: list[Batch], metric: Factorisation, shares: Sequence[Fraction],
    on_block: Callable[[], object],
) -> list[dict[str, list[float]]]:  # fmt: skip
    """Of every block, slot name -> for each of ``shares``, ascending, the mean over tokens of ||y - y'||^2 / ||y||^2.

    Dense weights and dense inputs; leaves ``batches`` as they are. One decomposition serves all shares: a product of
    lower rank is the first part of one of higher rank. AceError where a block has experts.
    """
    batches, found = [copy.copy(batch) for batch in batches], []
    with torch.no_grad():
        for index in model.one_by_one():
            block = model.blocks[index]
            if block.experts:
                raise AceError("allocation=sensitivity does not try single experts yet.", "Use allocation=uniform.")
            seen, outputs = _observed(model, index, batches, metric)
            found.append(_of_block(model, index, batches, outputs, seen, metric, shares))
            for batch, out_BLH in zip(batches, outputs, strict=True):
                batch.hidden_BLH = out_BLH
            on_block()
    return found


def _observed(
    model: StreamedModel, index: int, batches: list[Batch], metric: Factorisation
) -> tuple[Mapping[str, Seen], list[Tensor]]:
    """What the slots of a loaded block see, and its outputs."""
    layers = model.blocks[index].layers
    observer = Observer({slot.name: Seen(metric.needs()) for slot in layers})

    def watch(slot: Slot, x: Tensor, y: Tensor) -> None:
        observer.update(slot, x, lambda: y)

    with hooked(layers, watch, before=False):
        outputs = [model.forward(index, batch) for batch in batches]
    return observer.seen, outputs


def _of_block(
    model: StreamedModel, index: int, batches: list[Batch], outputs: list[Tensor], seen: Mapping[str, Seen],
    metric: Factorisation, shares: Sequence[Fraction],
) -> dict[str, list[float]]:  # fmt: skip
    found: dict[str, list[float]] = {}
    for slot in model.blocks[index].layers:
        dense_OI = slot.weight_OI.clone()
        ranks = [rank_of(*slot.shape, share) for share in shares]
        try:
            up_OR, down_RI, _ = metric.factors(dense_OI.float(), seen[slot.name], max(ranks))
        except ArithmeticError as fault:
            raise AceError(f"{slot.name}: {fault}", "Use more windows, or metric=asvd.") from fault
        found[slot.name] = []
        for rank in ranks:
            slot.put((up_OR[:, :rank] @ down_RI[:rank]).to(dense_OI.dtype))
            found[slot.name].append(_error(model, index, batches, outputs))
        slot.put(dense_OI)
    return found


def _error(model: StreamedModel, index: int, batches: list[Batch], outputs: list[Tensor]) -> float:
    total, tokens = 0.0, 0
    for batch, out_BLH in zip(batches, outputs, strict=True):
        off_BLH = (model.forward(index, batch) - out_BLH).float()
        size_BL = out_BLH.float().square().sum(-1).clamp(min=1e-12)
        total += float((off_BLH.square().sum(-1) / size_BL).sum(dtype=torch.float64))
        tokens += size_BL.numel()
    return total / tokens
