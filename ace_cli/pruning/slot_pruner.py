"""What happens to one slot: score, permute, select, refine, repair, store.

The weights of a loaded block are pruned in place, for what runs next, and kept as the files will have them, for the
checkpoint. Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from ace_cli.core.errors import AceError
from ace_cli.core.timing import Clock
from ace_cli.core.typed_json import typed
from ace_cli.core.workers import ONE, Workers
from ace_cli.kernels.finite_checks import FiniteChecks
from ace_cli.methods.catch_up import caught_up
from ace_cli.methods.metrics.base import Metric, scored
from ace_cli.methods.repair.base import Repaired
from ace_cli.methods.repair.least_squares import factors_of
from ace_cli.methods.row_pruning import by_rows, masked, prune_rows
from ace_cli.methods.statistics import Gram, Seen
from ace_cli.model.blocks import Block
from ace_cli.model.links import Link
from ace_cli.model.slots import Slot
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.diagnostics import Activations
from ace_cli.pruning.facts import SlotFacts
from ace_cli.pruning.input_orders import InputOrders
from ace_cli.pruning.new_weights import NewWeights
from ace_cli.pruning.recipe import Recipe
from ace_cli.pruning.shares import by_pieces


class SlotPruner:
    """Prunes the slots of one loaded block; ``facts`` has what became of each, in the order they were pruned.

    ``links`` are the block's slots whose inputs may be reordered. ``finite`` is told of every score.
    """

    def __init__(
        self, model: StreamedModel, block: Block, recipe: Recipe, clock: Clock, finite: FiniteChecks,
        links: list[Link], workers: Workers = ONE,
    ) -> None:  # fmt: skip
        self.facts: list[SlotFacts] = []
        #: The block's tensors as they will be written.
        self.new = NewWeights(model, block)
        #: The orders that inputs were put in.
        self.orders = InputOrders(block, links, recipe.patterns, self.new)
        #: Slot name -> its statistics of gradients, of the dense block.
        self.gradients: Mapping[str, Seen] = {}
        #: Tensor of the block -> its name in the new files, empty if it is gone; where that is not its own.
        self.moved: dict[str, str] = {}
        self._model = model
        self._block = block
        self._recipe = recipe
        self._clock = clock
        self._finite = finite
        #: Who shares what is observed and done now.
        self.workers = workers
        self._looked_at = Activations(recipe.observed_tokens) if recipe.observed_tokens else None
        self._activations: dict[str, Activations] = {}

    def prune(self, slots: list[Slot], seen: MutableMapping[str, Seen], routed: int | None = None) -> None:
        """Prune ``slots`` from what each of them has ``seen``, which is let go of: one slot's may be gigabytes.

        Raises AceError, by name, where that does not do.
        """
        self.facts += [self._told(slot, self._gathered(slot, seen.pop(slot.name)), routed) for slot in slots]
        for slot in slots:  # only now: a producer may be pruned after its consumer
            if slot.name in self.orders.found:
                with self._clock("permute"):
                    self.orders.reorder_producers(slot)

    @contextmanager
    def dealt(self, parts: list[list[Slot]]) -> Iterator[Iterable[int]]:
        """Which of ``parts`` this worker is to prune inside this context, each whole; afterwards all workers have all.

        Where there are fewer parts than workers, everyone is to prune all of them, and rows are shared; so it is where
        units are cut, of which more comes than weights, and where each worker has seen some of every part's tokens.
        """
        linked = any(slot.name in self.orders for slots in parts for slot in slots)
        together = len(parts) < self.workers.size or linked or self._recipe.cutting is not None or self.workers.apart
        if not self.workers.several or together:
            yield range(len(parts))
            return
        workers, self.workers, begun = self.workers, ONE, len(self.facts)
        yield workers.dealt(len(parts))
        self.workers = workers
        self.facts[begun:] = self._exchanged(parts, self.facts[begun:])

    def take_weights(self) -> dict[str, Tensor]:
        """File tensor -> its content with pruned weights in it, on the CPU; handed over once.

        Here, once a block, a device is waited for: until now nothing has looked at what it computes.
        """
        self._finite.settle()
        self.facts = [self._settled(fact) for fact in self.facts]
        return self.new.hand_over()

    # --- one slot ------------------------------------------------------------------------------------------------

    def _told(self, slot: Slot, seen: Seen, routed: int | None) -> SlotFacts:
        """Pruned, and with what befell the factors that it was moved by."""
        fact = self._prune(slot, seen, routed)
        fallbacks = factors_of(seen[Gram()]).notes if self._recipe.catch_up else []
        return replace(fact, notes=list(dict.fromkeys([*fact.notes, *fallbacks])))

    def _prune(self, slot: Slot, seen: Seen, routed: int | None) -> SlotFacts:
        start = time.perf_counter()
        metric, pattern = self._recipe.metric, self._recipe.patterns[slot.name]
        tokens = self._tokens(slot, seen)
        weight_OI = slot.weight_OI
        zeros_before = weight_OI.numel() - weight_OI.count_nonzero()  # a tensor: read when the block is done
        diagnosis: dict[str, Any] = {**metric.diagnose(seen), "zeros_before": zeros_before}
        notes = self._by_rows(slot, seen) if self._goes_by_rows(slot) else self._whole(slot, seen, diagnosis)
        seconds = time.perf_counter() - start
        self._look(slot, seen)
        return SlotFacts(slot.name, slot.shape, str(pattern), tokens, diagnosis, notes, seconds, routed)

    def _tokens(self, slot: Slot, seen: Seen) -> int:
        """How many tokens the slot has seen. AceError for none, where the metric needs some."""
        tokens = max((statistic.tokens for statistic in seen), default=0)
        if self._recipe.metric.needs() and not tokens:
            raise AceError(f"No calibration token reached {slot.name}.", "Use more windows, or metric=magnitude.")
        return tokens

    def _look(self, slot: Slot, seen: Seen) -> None:
        """Keep the picture of its activations, where one is wanted."""
        if self._looked_at is not None and self._recipe.wanted and seen[self._looked_at].tokens:
            self._activations[slot.name] = seen[self._looked_at]

    def _gathered(self, slot: Slot, seen: Seen) -> Seen:
        """With what other workers computed of it, as far as it is needed here."""
        if self.workers.several:
            of_rows = slot.name in self._recipe.patterns and not self._goes_by_rows(slot)
            with self._clock("gather"):
                self._check_alike(slot)
                seen.gather(own_rows=of_rows and self._goes_in_pieces(slot))
        return seen

    def _check_alike(self, slot: Slot) -> None:
        """AceError where the tokens of one worker reach other slots than those of another, which are apart."""
        for rank, name in enumerate(self.workers.told(slot.name) if self.workers.apart else ()):
            if name != slot.name:
                raise AceError(f"Worker {rank} comes to {name}, another one to {slot.name}.", "Use split=rows.")

    def _goes_by_rows(self, slot: Slot) -> bool:
        """Whether the choices, the device and the slot's links let every row be pruned before the next is scored."""
        whole = slot.name in self.orders or self._model.device.type != "cpu" or self._recipe.catch_up > 0
        return not whole and by_rows(self._recipe.metric, self._recipe.patterns[slot.name], self._recipe.repair)

    def _by_rows(self, slot: Slot, seen: Seen) -> list[str]:
        """Prune without anything of the weight's size beside it."""
        metric, pattern = self._recipe.metric, self._recipe.patterns[slot.name]
        with self._clock("score"):
            weight_OI = self.new.dense(slot)
            scores = metric.scores_of_rows(weight_OI, seen)
        with self._clock("mask"):
            prune_rows(weight_OI, scores, pattern, f"{slot.name} or the score of its weights")
            if not self.new.exact(slot):
                slot.put(weight_OI)
            self.new.store(slot, weight_OI.to(self.new.dtype(slot.key)))
        return []

    def _whole(self, slot: Slot, seen: Seen, diagnosis: dict[str, Any]) -> list[str]:
        """Score, permute, select, refine, repair and mask, one after the other; what the repair noted."""
        metric, pattern = self._recipe.metric, self._recipe.patterns[slot.name]
        dense_OI = self._start(slot, seen, diagnosis)
        if self._goes_in_pieces(slot):
            return self._in_pieces(slot, dense_OI, seen, diagnosis)
        with self._clock("score"):
            score_OI = metric.score(dense_OI, seen)
            self._finite.expect(score_OI, f"{slot.name} or the score of its weights")
        with self._clock("permute"):
            if (chosen := self.orders.choose(slot, score_OI)) is not None:
                order_I, diagnosis["permutation_gain"] = chosen
                dense_OI, score_OI, seen = dense_OI[:, order_I], score_OI[:, order_I], seen.reordered(order_I)
        with self._clock("select"):
            keep_OI = pattern.keep(score_OI)
        del score_OI
        if self._rows_apart(slot):
            return self._refined_in_pieces(slot, dense_OI, seen, diagnosis, lambda rows: keep_OI[rows])
        repaired = self._refined(slot, dense_OI, keep_OI, seen)
        with self._clock("mask"):
            self.new.put(slot, masked(repaired.weight_OI, repaired.keep_OI, self.new.dtype(slot.key)))
        diagnosis |= repaired.diagnosis
        return repaired.notes

    def _start(self, slot: Slot, seen: Seen, diagnosis: dict[str, Any]) -> Tensor:
        """What is scored and repaired, float32 (O, I): the dense weight, or what makes up for what was lost before it.

        ``diagnosis`` hears how far it was moved, relative to its size. AceError where the statistics do not allow it.
        """
        with self._clock("score"):
            dense_OI = self.new.dense(slot).to(self._model.device, torch.float32).contiguous()
        if not self._recipe.catch_up:
            return dense_OI
        with self._clock("catch up"):
            try:
                moved_OI = caught_up(dense_OI, self._recipe.catch_up, seen)
            except ArithmeticError as fault:
                raise AceError(f"{slot.name}: {fault}", "Use more windows, or leave catch_up=0.") from fault
            diagnosis["moved"] = (moved_OI - dense_OI).norm() / dense_OI.norm().clamp(min=1e-30)
        return moved_OI

    def _refined(self, slot: Slot, dense_OI: Tensor, keep_OI: Tensor, seen: Seen) -> Repaired:
        """Refine and repair; of some rows, where the methods look at one row at a time."""
        pattern = self._recipe.patterns[slot.name]
        try:
            with self._clock("refine"):
                keep_OI = self._recipe.metric.refine(dense_OI, keep_OI, seen, pattern)
            with self._clock("repair"):
                return self._recipe.repair.repair(dense_OI, keep_OI, seen, pattern)
        except ArithmeticError as fault:
            hint = "Use more windows, or repair=none and a metric that looks at single weights."
            raise AceError(f"{slot.name}: {fault}", hint) from fault

    # --- rows, in pieces that workers share ------------------------------------------------------------------------

    def _rows_apart(self, slot: Slot) -> bool:
        """Whether what takes long can be done some rows at a time; what does not is done sooner than it is sent."""
        metric, repair = self._recipe.metric, self._recipe.repair
        apart = metric.refines_rows and repair.repairs_rows(self._recipe.patterns[slot.name])
        return apart and metric.flops(*slot.shape) + repair.flops(*slot.shape) > 0

    def _goes_in_pieces(self, slot: Slot) -> bool:
        """Whether scores and selection can be done some rows at a time, too."""
        by_formula = type(self._recipe.metric).score is Metric.score and self._recipe.patterns[slot.name].by_rows
        return self._rows_apart(slot) and by_formula and slot.name not in self.orders

    def _in_pieces(self, slot: Slot, dense_OI: Tensor, seen: Seen, diagnosis: dict[str, Any]) -> list[str]:
        """Score, select, refine, repair and mask some rows, then the next ones; what the repair noted."""
        pattern = self._recipe.patterns[slot.name]
        with self._clock("score"):
            scores = self._recipe.metric.scores_of_rows(dense_OI, seen)

        def keep(rows: slice) -> Tensor:
            with self._clock("score"):
                score_RI = scored(scores, dense_OI, rows)
                self._finite.expect(score_RI, f"{slot.name} or the score of its weights")
            with self._clock("select"):
                return pattern.keep(score_RI)

        return self._refined_in_pieces(slot, dense_OI, seen, diagnosis, keep)

    def _refined_in_pieces(
        self, slot: Slot, dense_OI: Tensor, seen: Seen, diagnosis: dict[str, Any], keep: Callable[[slice], Tensor]
    ) -> list[str]:
        dtype = self.new.dtype(slot.key)

        def work(rows: slice) -> tuple[Tensor, Repaired]:
            repaired = self._refined(slot, dense_OI[rows], keep(rows), seen)
            with self._clock("mask"):
                return masked(repaired.weight_OI, repaired.keep_OI, dtype), repaired

        with self._clock("mask"):
            new_OI = torch.empty(slot.shape, dtype=dtype, device=dense_OI.device)
        told = by_pieces(self.workers, new_OI, work)
        with self._clock("mask"):
            self.new.put(slot, new_OI)
        diagnosis |= told.diagnosis
        return told.notes

    # --- parts, each by one worker -----------------------------------------------------------------------------------

    def _exchanged(self, parts: list[list[Slot]], mine: list[SlotFacts]) -> list[SlotFacts]:
        """Give this worker's parts to the others, and take theirs; the facts of all, in the order of the parts."""
        told = self.workers.told([asdict(self._settled(fact)) for fact in mine])
        facts = {each["name"]: typed(SlotFacts, each, "facts") for of_worker in told for each in of_worker}
        for number, slots in enumerate(parts):  # one after the other: memory is one part's
            owner, weights = number % self.workers.size, list[Tensor]()
            for slot in slots:
                if owner == self.workers.rank:
                    weights.append(self.new.of_slot(slot).contiguous())
                else:
                    dtype, device = self.new.dtype(slot.key), self._model.device
                    weights.append(torch.empty(slot.shape, dtype=dtype, device=device))
            self.workers.spread([(weight_OI, owner) for weight_OI in weights])
            if owner != self.workers.rank:
                for slot, weight_OI in zip(slots, weights, strict=True):
                    self.new.put(slot, weight_OI)
        return [facts[slot.name] for slots in parts for slot in slots]

    def _settled(self, fact: SlotFacts) -> SlotFacts:
        """With numbers in place of what a device still computes."""
        seen = self._activations.get(fact.name)
        diagnosis = {name: float(value) for name, value in fact.diagnosis.items()}
        return replace(fact, diagnosis=diagnosis, activations=fact.activations if seen is None else seen.facts())
