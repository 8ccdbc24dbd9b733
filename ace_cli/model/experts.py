"""Observing experts that are slices of one parameter, where no module of their own could be hooked.

The layer's own code is called for one expert alone, and the tensor that each of the expert's weights is multiplied by
is caught on the way.

Shapes: T tokens, K experts a token, E experts, I inputs, H hidden size.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ace_cli.core.errors import AceError
from ace_cli.model.slots import Slot

#: Functions whose second argument may be an expert's weight, and whether they read it (O, I).
_PRODUCTS: dict[Any, bool] = {
    torch.nn.functional.linear: True,
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm), False),
    **dict.fromkeys((torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm, torch.Tensor.bmm), False),
}


@dataclass
class ExpertCall:
    """What went into a layer of experts: ``values`` of its arguments by name.

    Either a routing comes with the hidden states (index (T, K) and weights (T, K)), or the rows are already sorted by
    expert, (E T, H), those of tokens that an expert does not see being zero.
    """

    values: dict[str, Any]

    @property
    def index(self) -> str | None:
        """The name of the argument that holds the experts chosen for each token; None if rows come sorted by expert."""
        integers = [name for name, value in self.values.items() if _is_integer(value)]
        return integers[0] if integers else None

    def rows(self, experts: int, expert: int, everyone: bool) -> Tensor:
        """The hidden states, (n, H), of the tokens routed to the expert; of all tokens if ``everyone``.

        Raises AceError if the arguments are neither a routing nor rows sorted by expert.
        """
        hidden: Tensor = next(iter(self.values.values()))
        if self.index is not None:
            return hidden if everyone else hidden[(self.values[self.index] == expert).any(-1)]
        if len(self.values) != 1 or len(hidden) % experts:
            raise AceError(
                f"Experts are called with {', '.join(self.values)}: neither a routing nor rows sorted by expert.",
                "This layer of experts is not supported yet: exclude it.",
            )
        rows_ETH = hidden.view(experts, -1, hidden.shape[-1])
        mine = rows_ETH.flatten(0, 1) if everyone else rows_ETH[expert]
        return mine[(mine != 0).any(-1)]

    def alone(self, rows: Tensor, expert: int) -> dict[str, Any]:
        """Arguments for a call of the layer in which each of ``rows`` (n, H) goes to ``expert`` and to no other.

        The routing is replaced: every row chooses this one expert (n, 1) with weight 1. Where the rows come sorted by
        expert there is no routing to replace.
        """
        first, *_ = self.values
        values: dict[str, Any] = {**self.values, first: rows}
        for name, value in self.values.items() if self.index is not None else ():
            if name != first and isinstance(value, Tensor):
                values[name] = value.new_full((len(rows), 1), expert if name == self.index else 1)
        return values


@dataclass
class Experts:
    """A module that holds one matrix per expert in each of its parameters, and the slots among them."""

    module: nn.Module
    slots: list[Slot]

    @property
    def count(self) -> int:
        """E, the number of experts in the layer."""
        return len(getattr(self.module, self.slots[0].leaf))

    def stages(self, expert: int) -> list[list[Slot]]:
        """The expert's slots, grouped by the parameter they are slices of, in the order in which they are used.

        Slots of one group read the same input. Parameters are defined in the order in which they are used.
        """
        leaves = dict.fromkeys(slot.leaf for slot in self.slots)
        mine = [slot for slot in self.slots if slot.in_module.index == expert]
        return [stage for leaf in leaves if (stage := [slot for slot in mine if slot.leaf == leaf])]

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExpertCall:
        """One call of the module, from the arguments that its forward hook was given."""
        return ExpertCall(dict(inspect.signature(self.module.forward).bind(*args, **kwargs).arguments))

    def tokens(self, calls: list[ExpertCall], expert: int) -> int:
        """How many tokens the router sent to the expert in all of ``calls``."""
        return sum(len(call.rows(self.count, expert, everyone=False)) for call in calls)

    def gates(self, call: ExpertCall, expert: int) -> Tensor:
        """What the expert's output is multiplied by, (n,), for each token routed to it; 1 where its input was."""
        if call.index is None:
            return torch.ones(len(call.rows(self.count, expert, everyone=False)))
        chosen_TK = call.values[call.index] == expert
        _, *others = self._tensors(call)
        gate_TK = next(value for value in others if not _is_integer(value))
        gate_n: Tensor = (gate_TK * chosen_TK).sum(-1)[chosen_TK.any(-1)]
        return gate_n

    def _tensors(self, call: ExpertCall) -> list[Tensor]:
        return [value for value in call.values.values() if isinstance(value, Tensor)]

    def outputs(self, call: ExpertCall, expert: int, everyone: bool = False) -> Tensor:
        """The expert's own outputs (n, H) for the tokens routed to it, or for all, not yet weighed."""
        module = self.module if call.index is not None else self._sole(expert)
        outputs_nH: Tensor = module.forward(**call.alone(call.rows(self.count, expert, everyone), expert))
        return outputs_nH

    def show(
        self, call: ExpertCall, expert: int, everyone: bool, stage: list[Slot], note: Callable[[Slot, Tensor], None]
    ) -> None:
        """Run the expert alone on its tokens, or on all, and ``note(slot, x)`` the input (..., I) of each of ``stage``.

        Raises AceError if the module's code does not multiply by the slots as they are thought to be stored.
        """
        rows = call.rows(self.count, expert, everyone)
        if not len(rows):
            return
        pending = list(stage)
        module = self.module if call.index is not None else self._sole(expert)
        with _Watch(pending, note):
            try:
                module.forward(**call.alone(rows, expert))
            except _Enough:
                return
        raise AceError(
            f"{type(self.module).__name__} does not multiply by {pending[0].name} where that was expected.",
            "This layer of experts is not supported yet: exclude it.",
        )

    def _sole(self, expert: int) -> nn.Module:
        """The module as if it had this expert alone, for where rows are sorted by expert."""
        sole = copy.copy(self.module)
        stacked = dict(self.module.named_parameters(recurse=False))
        parts = {name: nn.Parameter(value[expert : expert + 1], requires_grad=False) for name, value in stacked.items()}
        sole.__dict__["_parameters"] = parts
        return sole


class _Enough(Exception):
    """Every input that was asked for has been seen."""


class _Watch(TorchFunctionMode):
    """Notes what the weights of ``pending`` are multiplied with, and stops after the last."""

    def __init__(self, pending: list[Slot], note: Callable[[Slot, Tensor], None]) -> None:
        super().__init__()
        self._pending = pending
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and len(args) > 1:
            x, weight = args[:2]
            met = [slot for slot in self._pending if _same_memory(slot.weight_OI, weight)]
            for slot in met:
                read = weight if _PRODUCTS[func] else weight.mT
                if x.shape[-1] != slot.shape[1] or read.stride()[-2:] != slot.weight_OI.stride():
                    raise AceError(
                        f"{slot.name}: {type(slot.module).__name__} reads it the other way round.",
                        "Give the class its row in STORED_TRANSPOSED of ace_cli/model/slots.py.",
                    )
                self._note(slot, x)
                self._pending.remove(slot)
            if met and not self._pending:
                raise _Enough
        return func(*args, **(kwargs or {}))


def _same_memory(weight_OI: Tensor, other: Any) -> bool:
    return isinstance(other, Tensor) and other.untyped_storage().data_ptr() == weight_OI.untyped_storage().data_ptr()


def _is_integer(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()
