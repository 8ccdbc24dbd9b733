"""The one loop over the blocks of a model. For each block:

1. read its weights, on a background thread, while the block before is computed;
2. load them into the model;
3. run a few windows through the dense block, to be compared with;
4. observe its inputs, prune its slots and move the hidden states on, in the order that the recipe asks for;
5. train what was kept, if a recovery is chosen;
6. run the same windows through the pruned block;
7. write the new weights, on the background thread, while the next block is computed;
8. yield what became of the block.

Knows the base types of metrics, patterns and repairs, never a concrete one; prints nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch import Tensor

from ace_cli.core.memory import Trimmer
from ace_cli.core.timing import Clock
from ace_cli.core.workers import ONE, Workers
from ace_cli.kernels.finite_checks import FiniteChecks
from ace_cli.model.blocks import Block
from ace_cli.model.calls import Batch
from ace_cli.model.files import CheckpointWriter
from ace_cli.model.links import LinkFinder
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.dense_states import DenseInputs
from ace_cli.pruning.diagnostics import BlockComparison
from ace_cli.pruning.facts import BlockFacts
from ace_cli.pruning.gradients import gradients_of
from ace_cli.pruning.orders import order_of
from ace_cli.pruning.rank_pruner import RankPruner
from ace_cli.pruning.recipe import Propagate, Recipe
from ace_cli.pruning.recovering import Recovering
from ace_cli.pruning.shares import held
from ace_cli.pruning.slot_errors import SlotErrors
from ace_cli.pruning.slot_pruner import SlotPruner


def prune(
    model: StreamedModel,
    batches: list[Batch],
    recipe: Recipe,
    writer: CheckpointWriter,
    clock: Clock,
    finished: int = 0,
    on_disk: Callable[[BlockFacts], None] = lambda _: None,
    compared: Batch | None = None,
    recovering: Recovering | None = None,
    workers: Workers = ONE,
    beside: DenseInputs | None = None,
) -> Iterator[BlockFacts]:
    """Prune every slot of ``model`` from block ``finished`` on; replaces the hidden states in ``batches``.

    ``batches`` hold what goes into block ``finished``; ``compared`` is the first batch's first windows once more, on
    which each block's dense and pruned outputs are compared. ``on_disk`` is called, from the background thread, when a
    block's weights have been forced to disk. ``recovering`` trains each pruned block.
    ``workers`` share what takes long, and compare what they hold after each block; ``batches`` are a worker's own where
    they are apart. ``beside``: what slots have in the dense model, where the recipe asks for it.

    Raises AceError when weights or activations are not finite.
    """
    with ThreadPoolExecutor(1) as background:
        written: Future[None] | None = None
        trimmer = Trimmer()
        with clock("permute"):
            finder = LinkFinder(model) if recipe.permute and finished < len(model.blocks) else None
        comparison = BlockComparison(model, compared)
        ahead = background.submit(model.read, model.blocks[finished]) if finished < len(model.blocks) else None
        if ahead is not None:  # now, while there is something to compute, not when all else is done
            inside = {name for block in model.blocks for name in block.files}
            written = background.submit(writer.copy, sorted(writer.left - inside))
        for index in range(finished, len(model.blocks)):
            block, before, last = model.blocks[index], sum(clock.seconds.values()), index == len(model.blocks) - 1
            with clock("read"):  # what reading and writing cost beyond the computation they overlap
                assert ahead is not None
                tensors = ahead.result()
            if not last:  # queued behind the last block's writes: two blocks in memory, not three
                ahead = background.submit(model.read, model.blocks[index + 1])
            with torch.no_grad(), model.loaded(block, tensors):
                del tensors
                with clock("permute"):
                    links = finder.links(index) if finder is not None else []
                finite = FiniteChecks(model.device)
                pruner = _pruner_of(recipe)(model, block, recipe, clock, finite, links, workers)
                errors = SlotErrors(block)
                with clock("compare"), errors.watching() if compared is not None else nullcontext():
                    comparison.before(index, batches)
                if recovering is not None:
                    with clock("recover"):
                        recovering.before(index, batches)
                with clock("observe"):
                    dense = model if recipe.cutting is None else recipe.cutting.model
                    pruner.gradients = gradients_of(dense, index, batches, recipe.wanted, recipe.gradients)
                    if beside is not None:
                        beside.before(index)
                outputs_wanted = not last and recovering is None
                order_of(recipe)(model, index, batches, recipe, clock, finite, pruner, not outputs_wanted, beside).run()
                if beside is not None and not last:
                    with clock("forward"):
                        beside.after()
                recovered = None
                if recovering is not None:
                    with clock("recover"):
                        recovered = recovering.after(index, batches, pruner)
                    with clock("forward"):
                        model.advance(index, batches if not last and recovering.runs(index) else [])
                with clock("compare"):
                    moved = recipe.propagate is not Propagate.dense and not last
                    output = comparison.after(index, batches[0].hidden_BLH if moved and batches else None)
                    if not pruner.orders.found:  # what a weight reads would have to be reordered as it was
                        pruner.facts = errors.told(pruner.facts)
                del errors
            with clock("write"):
                _check(written)
            trimmer()
            with clock("mask"):
                weights = pruner.take_weights()
            if workers.several:
                with clock("agree"):
                    workers.agree(f"after {block.name}", held(weights, [] if last or workers.apart else batches))
            facts = BlockFacts(index, block.name, pruner.facts, sum(clock.seconds.values()) - before, output, recovered)
            written = background.submit(_write_block, writer, block, weights, pruner.moved, facts, on_disk)
            del weights, pruner
            yield facts
        with clock("write"):
            _check(written)


def _pruner_of(recipe: Recipe) -> type[SlotPruner]:
    if recipe.cutting is not None:
        return recipe.cutting.pruner
    return RankPruner if recipe.ranks else SlotPruner


def replay(model: StreamedModel, batches: list[Batch], blocks: int, clock: Clock) -> None:
    """Bring ``batches`` to where they were after ``blocks`` finished blocks, whose weights ``model`` reads."""
    with clock("replay"), torch.no_grad():
        for index in model.one_by_one(blocks):
            model.advance(index, batches)


def _write_block(
    writer: CheckpointWriter,
    block: Block,
    weights: dict[str, Tensor],
    moved: dict[str, str],
    facts: BlockFacts,
    on_disk: Callable[[BlockFacts], None],
) -> None:
    writer.moved |= moved
    for name, weight in weights.items():
        writer.write(name, weight)
    writer.copy(sorted(set(block.files) - weights.keys()))
    weights.clear()
    writer.sync(block.files)
    on_disk(facts)


def _check(written: Future[None] | None) -> None:
    if written is not None:
        written.result()
