"""What a model's own code does around its blocks: how it calls each, and what it makes of the last one's output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ace_cli.core.errors import AceError, first_line
from ace_cli.core.torch_api import lacks_memory
from ace_cli.model.auto import decoder_of
from ace_cli.model.blocks import Block


@dataclass
class Call:
    """How the model calls one block, but for the hidden states (argument 0 or ``hidden_states``)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Batch:
    """Token windows (B, L) with the hidden states (B, L, H) that go into the next block and every block's call."""

    ids_BL: Tensor
    hidden_BLH: Tensor
    calls: list[Call]


class BlockCalls:
    """A model run with every block replaced by a stand-in, so that no block is computed."""

    def __init__(self, skeleton: Any, blocks: Sequence[Block]) -> None:
        self._skeleton = skeleton
        self._blocks = blocks
        self._returned = 0  # values in the tuple that a block returns; 0 if it returns the hidden states alone

    def capture(self, ids_BL: Tensor) -> Batch:
        """Token ids (B, L), embedded, with how the model calls each block.

        How many values a block returns is found by trying. Raises AceError where that is not all that blocks tell the
        model, or each other: then what one block is given depends on another, and it cannot be run by itself.
        """
        kind, why = type(self._skeleton).__name__, ""
        for returned in dict.fromkeys((self._returned, 0, 3, 2)):
            try:
                batch = self._recorded(ids_BL, returned)
            except _NotAlone as fault:
                raise AceError(f"{kind} cannot be run block by block: {fault}.", "Choose another model.") from None
            except Exception as fault:  # whatever the model's code makes of a value too many or too few
                if lacks_memory(fault):
                    raise
                why = why or first_line(fault)
                continue
            self._returned = returned
            return batch
        raise AceError(f"{kind} cannot be run block by block: {why}.", "Choose another model.")

    def run(self, index: int, block: Block, batch: Batch) -> Tensor:
        """Loaded ``block`` in the place ``index``, on the batch: hidden states (B, L, H) out."""
        call = batch.calls[index]
        if call.args:
            out = block.module(batch.hidden_BLH, *call.args[1:], **call.kwargs)
        else:
            out = block.module(**{**call.kwargs, "hidden_states": batch.hidden_BLH})
        self._returned = len(out) if isinstance(out, tuple) else 0
        hidden_BLH: Tensor = out[0] if isinstance(out, tuple) else out
        return hidden_BLH

    def logits(self, ids_BL: Tensor, hidden_BLH: Tensor) -> Tensor:
        """The model's own tail: hidden states after the last block (B, L, H) -> logits (B, L, V)."""
        last = len(self._blocks) - 1

        def replace(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            return hidden_BLH if index == last else _hidden(args, kwargs)

        with self._replaced(replace, self._returned), torch.inference_mode():
            logits: Tensor = self._skeleton(input_ids=ids_BL, use_cache=False).logits
        return logits

    def _recorded(self, ids_BL: Tensor, returned: int) -> Batch:
        calls: list[Call] = []
        hidden: list[Tensor] = []  # what went into each block, and so came out of it

        def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            hidden_BLH = _hidden(args, kwargs)
            if hidden_BLH.dim() != 3:
                raise ValueError(f"the hidden states of block {index} have {hidden_BLH.dim()} axes")
            if index != len(calls):
                raise _NotAlone(f"block {index} runs as number {len(calls)}")
            if hidden and hidden_BLH is not hidden[-1] and not torch.equal(hidden_BLH, hidden[-1]):
                raise _NotAlone(f"the model computes between blocks {index - 1} and {index}")
            if any(isinstance(value, _Beside) for value in (*args, *kwargs.values())):
                raise _NotAlone(f"block {index} reads more of the one before than hidden states")
            hidden.append(hidden_BLH)
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            calls.append(Call((None, *args[1:]) if args else (), rest))
            return hidden_BLH

        with self._replaced(record, returned), torch.no_grad():  # not in inference mode: blocks may be trained
            decoder_of(self._skeleton)(input_ids=ids_BL, use_cache=False)
        if len(calls) != len(self._blocks):
            raise _NotAlone(f"{len(calls)} of its {len(self._blocks)} blocks run")
        return Batch(ids_BL, hidden[0], calls)

    @contextmanager
    def _replaced(self, function: Any, returned: int) -> Iterator[None]:
        def stand_in(index: int) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                out = function(index, args, kwargs)
                return (out, *(_Beside() for _ in range(returned - 1))) if returned else out

            return forward

        for index, block in enumerate(self._blocks):
            block.module.forward = stand_in(index)
        try:
            yield
        finally:
            for block in self._blocks:
                del block.module.forward


class _Beside:
    """Stands for what a block returns after the hidden states."""


class _NotAlone(Exception):
    """A block cannot be run by itself."""


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def share(call: Call, old: Call) -> Call:
    """``call`` with the tensors that equal ``old``'s replaced by them: masks and rotary tables are kept once."""
    kwargs = {name: _shared(value, old.kwargs[name]) for name, value in call.kwargs.items()}
    return Call(tuple(_shared(new, old_) for new, old_ in zip(call.args, old.args, strict=True)), kwargs)


def _shared(new: Any, old: Any) -> Any:
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        return old if new.shape == old.shape and torch.equal(new, old) else new
    if isinstance(new, tuple) and isinstance(old, tuple) and len(new) == len(old):
        return tuple(_shared(a, b) for a, b in zip(new, old, strict=True))
    return new
