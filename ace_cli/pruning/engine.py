"""The one loop: load a block, observe its inputs, score, select, repair, write, move on.

Knows the base types of metrics, patterns and repairs, never a concrete one; prints nothing; yields a fact per block.
Reading the next block and writing the last one happen on one background thread while the current one computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ace_cli.core.errors import AceError
from ace_cli.core.memory import Trimmer
from ace_cli.core.timing import Clock
from ace_cli.kernels.finite_checks import FiniteChecks
from ace_cli.methods.patterns import NofM
from ace_cli.methods.row_pruning import by_rows, masked, prune_rows
from ace_cli.methods.statistics import Seen
from ace_cli.model.experts import ExpertCall, Experts
from ace_cli.model.files import DTYPES, CheckpointWriter
from ace_cli.model.slots import Slot, View
from ace_cli.model.streamed import Batch, Block, StreamedModel
from ace_cli.pruning.diagnostics import ActivationFacts, Activations, BlockComparison, OutputChange
from ace_cli.pruning.observer import Observer, hooked, observe_expert, reached
from ace_cli.pruning.permutation import Link, LinkFinder, best_order, kept_score, permute
from ace_cli.pruning.recipe import Propagate, Recipe


@dataclass(frozen=True)
class SlotFacts:
    """What became of one slot; ``tokens`` is what its statistics saw, ``seconds`` what scoring to masking took.

    ``routed``: of an expert, how many of the calibration tokens the model sends to it.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    tokens: int
    diagnosis: dict[str, float]
    notes: list[str]
    seconds: float
    routed: int | None = None
    activations: ActivationFacts | None = None


@dataclass(frozen=True)
class BlockFacts:
    """One finished block; ``output`` is what pruning it did to what it puts out."""

    index: int
    name: str
    slots: list[SlotFacts]
    seconds: float
    output: OutputChange | None = None


def prune(
    model: StreamedModel,
    batches: list[Batch],
    recipe: Recipe,
    writer: CheckpointWriter,
    clock: Clock,
    finished: int = 0,
    on_disk: Callable[[BlockFacts], None] = lambda _: None,
    compared: Batch | None = None,
) -> Iterator[BlockFacts]:
    """Prune every slot of ``model`` from block ``finished`` on; replaces the hidden states in ``batches``.

    ``batches`` hold what goes into block ``finished``; ``compared`` is the first batch's first windows once more, on
    which each block's dense and pruned outputs are compared. ``on_disk`` is called, from the background thread, when a
    block's weights have been forced to disk. Raises AceError when weights or activations are not finite.
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
            block, before = model.blocks[index], sum(clock.seconds.values())
            with clock("read"):  # what reading and writing cost beyond the computation they overlap
                assert ahead is not None
                tensors = ahead.result()
            if index + 1 < len(model.blocks):  # queued behind the last block's writes: two blocks in memory, not three
                ahead = background.submit(model.read, model.blocks[index + 1])
            job = _BlockJob(model, index, batches, recipe, clock)
            with torch.inference_mode(), model.loaded(block, tensors):
                del tensors
                if finder is not None:
                    with clock("permute"):
                        job.permutable(finder.links(index))
                with clock("compare"):
                    comparison.before(index, batches)
                job.run(last=index == len(model.blocks) - 1)
                with clock("compare"):
                    moved = recipe.propagate is not Propagate.dense and index + 1 < len(model.blocks)
                    output = comparison.after(index, batches[0].hidden_BLH if moved and batches else None)
            with clock("write"):
                _check(written)
            trimmer()
            with clock("mask"):
                weights = job.take_weights()
            facts = BlockFacts(index, block.name, job.facts, sum(clock.seconds.values()) - before, output)
            written = background.submit(_write_block, writer, block, weights, facts, on_disk)
            del weights
            yield facts
        with clock("write"):
            _check(written)


def replay(model: StreamedModel, batches: list[Batch], blocks: int, clock: Clock) -> None:
    """Bring ``batches`` to where they were after ``blocks`` finished blocks, whose weights ``model`` reads."""
    for index in range(blocks):
        with clock("replay"), torch.inference_mode(), model.loaded(model.blocks[index]):
            model.advance(index, batches)


def _write_block(
    writer: CheckpointWriter,
    block: Block,
    weights: dict[str, Tensor],
    facts: BlockFacts,
    on_disk: Callable[[BlockFacts], None],
) -> None:
    for name, weight in weights.items():
        writer.write(name, weight)
    writer.copy(sorted(set(block.files) - weights.keys()))
    weights.clear()
    writer.sync(block.files)
    on_disk(facts)


def _check(written: Future[None] | None) -> None:
    if written is not None:
        written.result()


class _Stop(Exception):
    """Enough of the block has run."""


class _BlockJob:
    """Observes and prunes one loaded block."""

    def __init__(self, model: StreamedModel, index: int, batches: list[Batch], recipe: Recipe, clock: Clock) -> None:
        self.model = model
        self.index = index
        self.block = model.blocks[index]
        self.batches = batches
        self.recipe = recipe
        self.clock = clock
        self.facts: list[SlotFacts] = []
        self._weights: dict[str, Tensor] = {}
        self._links: dict[str, Link] = {}  # by the consumer's slot
        self._orders: dict[str, Tensor] = {}
        self._finite = FiniteChecks(self.model.device)
        self._activations = Activations(recipe.observed_tokens) if recipe.observed_tokens else None
        self._looks: dict[str, Activations] = {}
        self._wanted = (*recipe.wanted, *((self._activations,) if self._activations is not None else ()))
        self._observer = Observer({slot.name: Seen(self._wanted) for slot in self.block.layers})

    def permutable(self, links: list[Link]) -> None:
        """Let the inputs of these links' consumers be reordered, where their pattern is N:M and fits."""
        for link in links:
            name = self.block.parts[f"{link.consumer}.weight"][0].key
            pattern = self.recipe.patterns[name]
            if isinstance(pattern, NofM) and link.misfit(pattern) is None:
                self._links[name] = link

    def run(self, last: bool) -> None:
        """Prune every slot and move the hidden states on; the ``last`` block's outputs are not needed."""
        if not self.recipe.wanted:
            self._prune(self.block.slots)
        elif self.recipe.propagate is Propagate.sublayer:
            self._run_sublayer(last)
        else:
            self._run_whole(last)

    def take_weights(self) -> dict[str, Tensor]:
        """File tensor -> its content with pruned weights in it, on the CPU; handed over once.

        Here, once a block, a device is waited for: until now nothing has looked at what it computes.
        """
        self._finite.settle()
        for fact in self.facts:
            fact.diagnosis.update((name, float(value)) for name, value in fact.diagnosis.items())
        looks = {name: seen.facts() for name, seen in self._looks.items()}
        self.facts = [replace(fact, activations=looks.get(fact.name)) for fact in self.facts]
        weights, self._weights = self._weights, {}
        return {name: weight.cpu() for name, weight in weights.items()}

    # --- block order -----------------------------------------------------------------------------------------------

    def _run_whole(self, last: bool) -> None:
        """Observe the whole dense block, then prune it."""
        dense = self.recipe.propagate is Propagate.dense
        calls: dict[int, list[ExpertCall]] = {}

        def keep(experts: Experts, call: ExpertCall) -> None:
            calls.setdefault(id(experts), []).append(call)

        with (
            self.clock("observe"),
            hooked(self.block.layers, self._watch, before=False),
            reached(self.block.experts, keep),
        ):
            for batch in self.batches:
                out_BLH = self._forward(batch)
                if dense:
                    batch.hidden_BLH = out_BLH
        self._prune(self.block.layers)
        for experts in self.block.experts:
            self._prune_experts(experts, calls.pop(id(experts), []), together=True)
        if not dense and not last:
            with self.clock("forward"):
                self.model.advance(self.index, self.batches)

    # --- sublayer order ------------------------------------------------------------------------------------------

    def _run_sublayer(self, last: bool) -> None:
        left = list(self.block.slots)
        if len(self.batches) == 1:  # every input is complete when it arrives: prune inside the one forward

            def done(slots: list[Slot]) -> None:
                left[:] = [slot for slot in left if slot not in slots]
                if last and not left:
                    raise _Stop

            def prune_now(slot: Slot, x: Tensor) -> Tensor | None:
                self._note(slot, x)
                self._prune([slot])
                done([slot])
                order_I = self._orders.get(slot.name)  # what made this input ran before it was reordered
                return None if order_I is None else x[..., order_I]

            def prune_experts_now(experts: Experts, call: ExpertCall) -> None:
                self._prune_experts(experts, [call])
                done(experts.slots)

            with (
                self.clock("observe"),
                hooked(self.block.layers, prune_now, before=True),
                reached(self.block.experts, prune_experts_now),
            ):
                out_BLH = self._forward(self.batches[0])
                if out_BLH is not None:
                    self.batches[0].hidden_BLH = out_BLH
        while left:  # several batches: stop each at the first slots not yet pruned
            group = self._prune_group(left)
            left = [slot for slot in left if slot not in group]
        if len(self.batches) > 1 and not last:
            with self.clock("forward"):
                self.model.advance(self.index, self.batches)

    def _prune_group(self, left: list[Slot]) -> list[Slot]:
        """Observe and prune the first of ``left`` that the block reaches: those that read one tensor, or experts."""
        group: list[Slot] = []
        inputs: list[Tensor] = []
        calls: list[tuple[Experts, ExpertCall]] = []

        def note_first(slot: Slot, x: Tensor) -> None:
            if inputs and inputs[0] is not x:
                raise _Stop
            inputs[:] = [x]
            if slot not in group:
                group.append(slot)
            self._note(slot, x)

        def note_experts(experts: Experts, call: ExpertCall) -> None:
            if not inputs:
                calls.append((experts, call))
            raise _Stop

        names = {slot.name for slot in left}
        layers = [slot for slot in self.block.layers if slot.name in names]
        experts_left = [experts for experts in self.block.experts if experts.slots[0].name in names]
        with self.clock("observe"), hooked(layers, note_first, before=True), reached(experts_left, note_experts):
            for batch in self.batches:
                inputs.clear()
                self._forward(batch)
        if calls:
            self._prune_experts(calls[0][0], [call for _, call in calls])
            return calls[0][0].slots
        self._prune(group or left)  # slots that no token reaches are refused, by name, when they are pruned
        return group or left

    # --- experts -------------------------------------------------------------------------------------------------

    def _prune_experts(self, experts: Experts, calls: list[ExpertCall], together: bool = False) -> None:
        """One expert after the other, each from its own tokens: what leads into it, then what leads out of it.

        ``together``: both from what the dense expert computes.
        """
        for expert in range(experts.count):
            routed = experts.tokens(calls, expert)
            everyone = self.recipe.all_experts or routed < self.recipe.min_tokens
            stages = experts.stages(expert)
            for stage in [[slot for slots in stages for slot in slots]] if together else stages:
                with self.clock("observe"):
                    seen = observe_expert(experts, expert, stage, calls, everyone, self._wanted)
                self.facts += [self._prune_slot(slot, seen[slot.name], routed) for slot in stage]

    # --- shared --------------------------------------------------------------------------------------------------

    def _forward(self, batch: Batch) -> Any:
        try:
            out_BLH = self.model.forward(self.index, batch)
        except _Stop:
            return None
        self._finite.expect(out_BLH, f"the output of {self.block.name}")
        return out_BLH

    def _watch(self, slot: Slot, x: Tensor, y: Tensor) -> None:
        self._observer.update(slot, x, lambda: y)

    def _note(self, slot: Slot, x: Tensor) -> None:
        self._observer.update(slot, x, lambda: slot.output(x))

    def _prune(self, slots: list[Slot]) -> None:
        for slot in slots:
            self.facts.append(self._prune_slot(slot, self._observer.seen[slot.name]))
        for slot in slots:  # only now: a producer may be pruned after its consumer
            if slot.name in self._orders:
                self._reorder_producers(self._links[slot.name], self._orders[slot.name])

    def _reorder_producers(self, link: Link, order_I: Tensor) -> None:
        """The rows of the producers, loaded and as they will be written; biases are written because of this."""
        with self.clock("permute"):
            slots = {slot.name: slot for slot in self.block.slots}
            for name, order_O in permute(self.block, link, order_I, columns=False).items():
                key = self.block.parts[name][0].key
                rows = slots[key].in_file(self._stored(key)) if key in slots else self._stored(key)
                rows.copy_(rows[order_O])

    def _order(self, slot: Slot, score_OI: Tensor) -> Tensor | None:
        """The order of the inputs that keeps more of the score; None to leave them as they are."""
        pattern = self.recipe.patterns[slot.name]
        if slot.name not in self._links or not isinstance(pattern, NofM):
            return None
        order_I = best_order(score_OI, self._links[slot.name].channels_RWC, pattern)
        return None if torch.equal(order_I, order_I.sort().values) else order_I

    def _stored(self, key: str) -> Tensor:
        """A tensor of the files that will be written anew, as far as it is known."""
        if key not in self._weights:
            self._weights[key] = self.model.checkpoint.read(key).to(self.model.device)
        return self._weights[key]

    def _store(self, slot: Slot, new_OI: Tensor) -> None:
        if slot.in_file == View():
            self._weights[slot.key] = new_OI
        else:
            slot.in_file(self._stored(slot.key)).copy_(new_OI)

    def _stored_dtype(self, slot: Slot) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, DTYPES[self.model.checkpoint.tensors[slot.key].dtype][0])
        return dtype

    def _stored_weight(self, slot: Slot) -> Tensor:
        """The slot's weight as the file has it, (O, I): read again where the compute dtype has fewer digits."""
        return slot.weight_OI if self._exact(slot) else slot.in_file(self._stored(slot.key))

    def _exact(self, slot: Slot) -> bool:
        """Whether the loaded weight has all digits of the file's."""
        return self.model.dtype in (torch.float32, self._stored_dtype(slot))

    def _prune_slot(self, slot: Slot, seen: Seen, routed: int | None = None) -> SlotFacts:
        start = time.perf_counter()
        metric, pattern = self.recipe.metric, self.recipe.patterns[slot.name]
        tokens = max((statistic.tokens for statistic in seen), default=0)
        if metric.needs() and not tokens:
            raise AceError(f"No calibration token reached {slot.name}.", "Use more windows, or metric=magnitude.")
        diagnosis: dict[str, Any] = {**metric.diagnose(seen)}
        notes = [] if self._prune_rows(slot, seen) else self._prune_whole(slot, seen, diagnosis)
        seconds = time.perf_counter() - start
        if self._activations is not None and seen[self._activations].tokens:
            self._looks[slot.name] = seen[self._activations]
        return SlotFacts(slot.name, slot.shape, str(pattern), tokens, diagnosis, notes, seconds, routed)

    def _prune_rows(self, slot: Slot, seen: Seen) -> bool:
        """Prune without anything of the weight's size beside it; False where the choices, or the device, need that."""
        metric, pattern = self.recipe.metric, self.recipe.patterns[slot.name]
        whole = slot.name in self._links or self.model.device.type != "cpu"
        if whole or not by_rows(metric, pattern, self.recipe.repair):
            return False
        with self.clock("score"):
            weight_OI = self._stored_weight(slot)
            scores = metric.scores_of_rows(weight_OI, seen)
        with self.clock("mask"):
            prune_rows(weight_OI, scores, pattern, f"{slot.name} or the score of its weights")
            if not self._exact(slot):
                slot.put(weight_OI)
            self._store(slot, weight_OI.to(self._stored_dtype(slot)))
        return True

    def _prune_whole(self, slot: Slot, seen: Seen, diagnosis: dict[str, Any]) -> list[str]:
        """Score, permute, select, repair and mask, one after the other; what the repair noted."""
        metric, pattern = self.recipe.metric, self.recipe.patterns[slot.name]
        with self.clock("score"):
            dense_OI = self._stored_weight(slot).to(self.model.device, torch.float32).contiguous()
            score_OI = metric.score(dense_OI, seen)
            self._finite.expect(score_OI, f"{slot.name} or the score of its weights")
        with self.clock("permute"):
            order_I = self._order(slot, score_OI)
            if order_I is not None:
                self._orders[slot.name] = order_I
                assert isinstance(pattern, NofM)
                as_it_was = kept_score(score_OI, pattern)
                dense_OI, score_OI, seen = dense_OI[:, order_I], score_OI[:, order_I], seen.reordered(order_I)
                diagnosis["permutation_gain"] = kept_score(score_OI, pattern) / as_it_was - 1
        with self.clock("select"):
            keep_OI = pattern.keep(score_OI)
        try:
            with self.clock("refine"):
                keep_OI = metric.refine(dense_OI, keep_OI, seen, pattern)
            with self.clock("repair"):
                repaired = self.recipe.repair.repair(dense_OI, keep_OI, seen, pattern)
        except ArithmeticError as fault:
            hint = "Use more windows, or repair=none and a metric that looks at single weights."
            raise AceError(f"{slot.name}: {fault}", hint) from fault
        with self.clock("mask"):
            new_OI = masked(repaired.weight_OI, repaired.keep_OI, self._stored_dtype(slot))
            slot.put(new_OI)
            self._store(slot, new_OI)
        if repaired.loss_before is not None and repaired.loss_after is not None:
            diagnosis |= {"loss_before": repaired.loss_before, "loss_after": repaired.loss_after}
        return repaired.notes
