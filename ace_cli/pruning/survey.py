"""One look at the dense model before anything is pruned: the number that an allocation asks of every block."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ace_cli.core.errors import AceError
from ace_cli.core.memory import Trimmer
from ace_cli.core.workers import ONE, Workers
from ace_cli.kernels.finite_checks import check_finite
from ace_cli.methods.allocation.base import Allocation
from ace_cli.methods.statistics import Seen, Statistic
from ace_cli.model.blocks import Block
from ace_cli.model.calls import Batch
from ace_cli.model.experts import ExpertCall
from ace_cli.model.slots import Slot
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.gradients import gradients_of
from ace_cli.pruning.observer import Observer, hooked, observe_expert, reached


@dataclass(frozen=True)
class UnitScores:
    """``score`` gives the scores (U,) of the units of a loaded block from what its slots have seen, with ``needs``.

    ``model``: the same one with all its slots, those that make units too; ``gradients``: what is known of them.
    """

    needs: tuple[Statistic, ...]
    score: Callable[[Block, Mapping[str, Seen]], Tensor]
    model: StreamedModel
    gradients: Mapping[str, Seen]


def survey(
    model: StreamedModel,
    batches: list[Batch],
    allocation: Allocation,
    on_block: Callable[[int], None] = lambda _: None,
    units: UnitScores | None = None,
    workers: Workers = ONE,
) -> list[Any]:
    """``allocation``'s measure of every block, dense weights and dense inputs; 0 for a block without slots.

    ``units``: how a block's units are scored, for a rule about units. ``workers`` all look at the same ``batches``, or
    at their own where they are apart: measures are of what all of them see.

    Leaves ``batches`` as they are; runs no block at all where the allocation needs no inputs. ``on_block`` is called
    with the index of each finished block. Raises AceError when a weight, an activation or a measure is not finite, or
    no token reached a slot.
    """
    batches = [copy.copy(batch) for batch in batches]  # hidden states are replaced, never changed in place
    measures, trimmer = [], Trimmer()
    with torch.no_grad():  # not in inference mode: a block may be led back through
        for index in model.one_by_one():
            block = model.blocks[index]
            before = [batch.hidden_BLH for batch in batches]
            of_units = {}
            if units is not None:
                of_units = gradients_of(units.model, index, batches, units.needs, units.gradients)
            needs = units.needs if units else allocation.needs()
            seen = _observe(model, index, batches, needs, allocation.of_states, workers)
            for name, gradients in of_units.items():
                seen.setdefault(name, Seen(())).take(gradients)
            if allocation.of_states:
                measure = allocation.measure_states(before, [batch.hidden_BLH for batch in batches])
                measures.append(_checked(block, measure))
            elif units is not None and block.slots:
                measures.append(allocation.measure_units(units.score(block, seen)))
            else:
                measures.append(_measure(block, seen, allocation) if block.slots else 0.0)
            del before
            trimmer()
            on_block(index)
    return measures


def _observe(
    model: StreamedModel, index: int, batches: list[Batch], needs: tuple[Statistic, ...], states: bool, workers: Workers
) -> dict[str, Seen]:
    """What the block's slots see, while the hidden states move on; they do so if anything, or ``states``, is needed."""
    block = model.blocks[index]
    apart = workers if workers.apart else ONE
    observer = Observer({slot.name: Seen(needs) for slot in block.layers}, apart)
    calls: dict[int, list[ExpertCall]] = {}

    def watch(slot: Slot, x: Tensor, y: Tensor) -> None:
        observer.update(slot, x, lambda: y)

    if needs or states:
        with (
            hooked(block.layers, watch, before=False),
            reached(block.experts, lambda experts, call: calls.setdefault(id(experts), []).append(call)),
        ):
            model.advance(index, batches)
        for batch in batches:
            check_finite(batch.hidden_BLH, f"the output of {block.name}")
    observer.settle()
    seen = observer.seen
    for experts in block.experts:
        for expert in range(experts.count):
            slots = [slot for stage in experts.stages(expert) for slot in stage]
            shown = calls.get(id(experts), [])
            idle = not sum(apart.told(experts.tokens(shown, expert)))  # seen on all tokens rather than on none
            seen |= observe_expert(experts, expert, slots, shown, idle, needs, apart)
    for each in seen.values():
        each.gather(own_rows=False)
    return seen


def _measure(block: Block, seen: dict[str, Seen], allocation: Allocation) -> float:
    for slot in block.slots:
        check_finite(slot.weight_OI, slot.name)
        if any(not statistic.tokens for statistic in seen[slot.name]):
            raise AceError(
                f"No calibration token reached {slot.name}.", "Use more windows, or allocation=alpha, atp or uniform."
            )
    measure = allocation.measure(
        [slot.weight_OI.float() for slot in block.slots], [seen[slot.name] for slot in block.slots]
    )
    return _checked(block, measure)


def _checked(block: Block, measure: float) -> float:
    if not math.isfinite(measure):
        raise AceError(f"The allocation finds no number for {block.name} (got {measure}).", "Use allocation=uniform.")
    return measure
