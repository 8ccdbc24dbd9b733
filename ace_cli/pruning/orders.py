"""In which order the slots of a block are observed and pruned, and when its hidden states move on.

``AllAtOnce``: nothing is observed. ``WholeBlock``: everything is observed in the dense block, then pruned.
``Sublayer``: each slot is pruned when its input is complete. Experts are pruned one after the other in every order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ace_cli.core.timing import Clock
from ace_cli.kernels.finite_checks import FiniteChecks
from ace_cli.methods.statistics import Seen, Statistic
from ace_cli.model.blocks import Block
from ace_cli.model.calls import Batch
from ace_cli.model.experts import ExpertCall, Experts
from ace_cli.model.slots import Slot
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.dense_states import DenseInputs
from ace_cli.pruning.diagnostics import Activations
from ace_cli.pruning.observer import Observer, hooked, observe_expert, reached
from ace_cli.pruning.recipe import Propagate, Recipe
from ace_cli.pruning.shares import outputs
from ace_cli.pruning.slot_pruner import SlotPruner


class _Stop(Exception):
    """Enough of the block has run."""


@dataclass
class Order:
    """Prunes loaded block ``index`` with ``pruner`` and moves the hidden states of ``batches`` on.

    The ``last`` block's outputs are not needed. ``dense``: the slots' inputs in the dense model, if a method asks for
    them.
    """

    model: StreamedModel
    index: int
    batches: list[Batch]
    recipe: Recipe
    clock: Clock
    finite: FiniteChecks
    pruner: SlotPruner
    last: bool
    dense: DenseInputs | None = None
    _observer: Observer = field(init=False)

    def __post_init__(self) -> None:
        self._observer = Observer({slot.name: Seen(self._wanted) for slot in self.block.layers}, self.pruner.workers)
        for name, seen in self._observer.seen.items():
            if name in self.pruner.gradients:
                seen.take(self.pruner.gradients[name])

    @property
    def block(self) -> Block:
        """The loaded block."""
        return self.model.blocks[self.index]

    @property
    def _wanted(self) -> tuple[Statistic, ...]:
        """What every slot is observed with: for the methods, and for the report."""
        for_report = (Activations(self.recipe.observed_tokens),) if self.recipe.observed_tokens else ()
        return (*self.recipe.wanted, *for_report)

    def run(self) -> None:
        """Prune every slot."""
        raise NotImplementedError

    def _prune(self, slots: list[Slot]) -> None:
        self.pruner.prune(slots, self._observer.seen)

    def _prune_experts(self, experts: Experts, calls: list[ExpertCall], together: bool = False) -> None:
        """One expert after the other, each from its own tokens: what leads into it, then what leads out of it.

        ``together``: both from what the dense expert computes.
        """
        stages = [experts.stages(expert) for expert in range(experts.count)]
        whole = [[slot for slots in of_expert for slot in slots] for of_expert in stages]
        with self.pruner.dealt(whole) as mine:
            for expert in mine:
                routed = self._everyones(experts.tokens(calls, expert))
                everyone = self.recipe.all_experts or routed < self.recipe.min_tokens
                for stage in [whole[expert]] if together else stages[expert]:
                    with self.clock("observe"):
                        seen = observe_expert(
                            experts, expert, stage, calls, everyone, self._wanted, self.pruner.workers
                        )
                    self.pruner.prune(stage, seen, routed)

    def _look_beside(self, number: int, slots: list[Slot], first: bool = False) -> None:
        """Before batch ``number`` is shown to ``slots``: what the dense model gives them, or the ``first`` of them."""
        if self.dense is not None:
            self._observer.dense = self.dense.of(number, [slot.name for slot in slots], first)

    def _everyones(self, mine: int) -> int:
        """Of workers that are apart the sum."""
        return sum(self.pruner.workers.told(mine)) if self.pruner.workers.apart else mine

    def _forward(self, batch: Batch) -> Tensor | None:
        """The block's output (B, L, H); None if it was stopped."""
        try:
            out_BLH = self.model.forward(self.index, batch)
        except _Stop:
            return None
        self.finite.expect(out_BLH, f"the output of {self.block.name}")
        return out_BLH

    def _advance(self) -> None:
        if not self.last:
            with self.clock("forward"):
                self.model.advance(self.index, self.batches)

    def _note(self, slot: Slot, x: Tensor) -> None:
        self._observer.update(slot, x, lambda: outputs(self.pruner.workers, slot, x))


class AllAtOnce(Order):
    """Nothing is observed: all slots are pruned, then the block runs, if there is anything to take through it."""

    def run(self) -> None:
        dense = self.recipe.propagate is Propagate.dense
        if dense:
            self._advance()
        self.pruner.prune(self.block.slots, {slot.name: Seen(()) for slot in self.block.slots})
        if not dense:
            self._advance()


class WholeBlock(Order):
    """Observe the whole dense block, then prune it: Wanda's protocol, or with dense inputs for every block."""

    def run(self) -> None:
        dense = self.recipe.propagate is Propagate.dense
        calls: dict[int, list[ExpertCall]] = {}

        def watch(slot: Slot, x: Tensor, y: Tensor) -> None:
            self._observer.update(slot, x, lambda: y)

        def keep(experts: Experts, call: ExpertCall) -> None:
            calls.setdefault(id(experts), []).append(call)

        with (
            self.clock("observe"),
            hooked(self.block.layers, watch, before=False),
            reached(self.block.experts, keep),
        ):
            for number, batch in enumerate(self.batches):
                self._look_beside(number, self.block.layers)
                out_BLH = self._forward(batch)
                if dense and out_BLH is not None:
                    batch.hidden_BLH = out_BLH
            self._observer.settle()
        self._prune(self.block.layers)
        for experts in self.block.experts:
            self._prune_experts(experts, calls.pop(id(experts), []), together=True)
        if not dense:
            self._advance()


class Sublayer(Order):
    """Prune each slot the moment its input is complete: inside the one forward where all windows are in one batch.

    Of workers that are apart: where those of each worker are.
    """

    def run(self) -> None:
        workers = self.pruner.workers
        several = max(workers.told(len(self.batches)) if workers.apart else [len(self.batches)]) > 1
        left = list(self.block.slots) if several else self._inside_one_forward()
        while left:  # several batches: stop each at the first slots not yet pruned
            group = self._prune_group(left)
            left = [slot for slot in left if slot not in group]
        if several:
            self._advance()

    def _inside_one_forward(self) -> list[Slot]:
        """Prune what the only batch reaches; the slots that it does not reach."""
        left = list(self.block.slots)

        def done(slots: list[Slot]) -> None:
            left[:] = [slot for slot in left if slot not in slots]
            if self.last and not left:
                raise _Stop

        def prune_now(slot: Slot, x: Tensor) -> Tensor | None:
            if slot.name in self._observer.seen:  # not yet pruned
                self._note(slot, x)
                self._prune([slot])
                done([slot])
            order_I = self.pruner.orders.found.get(slot.name)  # what made this input ran before it was reordered
            return None if order_I is None else x[..., order_I]

        def prune_experts_now(experts: Experts, call: ExpertCall) -> None:
            self._prune_experts(experts, [call])
            done(experts.slots)

        with (
            self.clock("observe"),
            hooked(self.block.layers, prune_now, before=True),
            reached(self.block.experts, prune_experts_now),
        ):
            self._look_beside(0, left)
            out_BLH = self._forward(self.batches[0])
            if out_BLH is not None:
                self.batches[0].hidden_BLH = out_BLH
        return left

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
            for number, batch in enumerate(self.batches):
                inputs.clear()
                self._look_beside(number, layers, first=True)
                self._forward(batch)
        if calls:
            self._prune_experts(calls[0][0], [call for _, call in calls])
            return calls[0][0].slots
        self._prune(group or left)  # slots that no token reaches are refused, by name, when they are pruned
        return group or left


def order_of(recipe: Recipe) -> type[Order]:
    """The order that a recipe asks for."""
    if recipe.cutting is not None and recipe.cutting.order is not None:
        return recipe.cutting.order
    if not recipe.wanted:
        return AllAtOnce
    return Sublayer if recipe.propagate is Propagate.sublayer else WholeBlock
