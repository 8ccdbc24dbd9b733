"""Feeding statistics with the inputs of slots while their block runs. The only code that registers hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from ace_cli.core.workers import ONE, Workers
from ace_cli.methods.statistics import Seen, Statistic
from ace_cli.model.experts import ExpertCall, Experts
from ace_cli.model.slots import Slot
from ace_cli.pruning.shares import outputs


@dataclass
class Observer:
    """Feeds the slots' statistics. Slots that read the same tensor share those that look at inputs only.

    ``seen`` may be emptied of slots that are pruned: what others share with them stays. ``workers`` see the same, and
    share what takes long, or are apart: ``seen`` is to be gathered before it is used. ``dense``: slot's name -> its
    input in the dense model, of the tokens that are shown now, where a statistic needs that.
    """

    seen: dict[str, Seen]
    workers: Workers = ONE
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    _leader: dict[str, str] = field(default_factory=dict)
    _input: Tensor | None = None
    _reader: str = ""
    _read: Seen | None = None  # of the first that read the last input

    def __post_init__(self) -> None:
        if self.workers.apart:  # also of what no token of this worker's reaches
            for seen in self.seen.values():
                seen.share_with(self.workers)

    def settle(self) -> None:
        """Of workers that are apart: slots that no token of this one reaches share as they do where one does."""
        for leaders in self.workers.told(self._leader) if self.workers.apart else ():
            for name, leader in leaders.items():
                if name not in self._leader:
                    self._leader[name] = leader
                    self.seen[name].share(self.seen[leader])

    def update(self, slot: Slot, x: Tensor, output: Callable[[], Tensor]) -> None:
        """Add one call of ``slot``: input (..., I); ``output`` gives its (..., O) if a statistic needs it."""
        seen = self.seen[slot.name]
        if slot.name not in self._leader:  # the first batch decides who observes for whom
            seen.share_with(self.workers)
            same = self._input is x
            self._leader[slot.name] = self._leader[self._reader] if same else slot.name
            if same and self._read is not None:
                seen.share(self._read)
        if self._input is not x:
            self._read = seen
        self._input, self._reader = x, slot.name
        follows = self._leader[slot.name] != slot.name
        of_inputs = [statistic for statistic in seen if not statistic.needs_backward]
        due = [statistic for statistic in of_inputs if statistic.needs_output or not follows]
        if not due:
            return
        x_TI = x.reshape(-1, x.shape[-1])
        y_TO = x_TI
        if any(statistic.needs_output for statistic in due):
            y = output()
            y_TO = y.reshape(-1, y.shape[-1])
        for statistic in due:
            beside_TO = self.dense[slot.name].reshape(x_TI.shape) if statistic.needs_dense else y_TO
            statistic.update(x_TI, beside_TO, slot.weight_OI)


def observe_expert(
    experts: Experts,
    expert: int,
    stage: list[Slot],
    calls: list[ExpertCall],
    everyone: bool,
    wanted: tuple[Statistic, ...],
    workers: Workers = ONE,
) -> dict[str, Seen]:
    """What the slots ``stage`` of one expert see of the tokens routed to it, or of ``everyone``'s; by slot name.

    ``workers`` all look at it, and share what takes long, or each has tokens of its own.
    """
    observer = Observer({slot.name: Seen(wanted) for slot in stage}, workers)

    def note(slot: Slot, x: Tensor) -> None:
        observer.update(slot, x, lambda: outputs(workers, slot, x))

    for call in calls:
        experts.show(call, expert, everyone, stage, note)
    observer.settle()
    return observer.seen


@contextmanager
def hooked(slots: list[Slot], function: Callable[..., Tensor | None], before: bool) -> Iterator[None]:
    """While inside, call ``function(slot, x)`` before each slot's module runs, or ``function(slot, x, y)`` after it.

    x is the input (..., I), y the output (..., O). A tensor that the function returns replaces the one or the other.
    """

    def hook(slot: Slot) -> Callable[..., Tensor | None]:
        def call(module: nn.Module, args: tuple[Tensor, ...], *output: Tensor) -> Tensor | None:
            return function(slot, args[0], *output)

        return call

    handles = [
        slot.module.register_forward_pre_hook(hook(slot)) if before else slot.module.register_forward_hook(hook(slot))
        for slot in slots
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def reached(layers: list[Experts], function: Callable[[Experts, ExpertCall], None]) -> Iterator[None]:
    """While inside, call ``function(experts, call)`` each time one of ``layers`` is about to run.

    ``call`` holds the arguments of that run: hidden states and routing.
    """

    def hook(experts: Experts) -> Callable[..., None]:
        return lambda module, args, kwargs: function(experts, experts.call(args, kwargs))

    handles = [experts.module.register_forward_pre_hook(hook(experts), with_kwargs=True) for experts in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
