"""Links: which outputs of some slots feed which inputs of another, so that all of them can be reordered or cut alike.

The inputs of down_proj and the rows of gate and up; the inputs of o_proj inside a head and the rows of v, in one order
for all query heads that share a key-value head.

No family is named. A link is found by asking the block's own code which output of one slot moves which input of
another, and proven with the block's own weights before it is used.

Shapes: O outputs, I inputs, U units (inputs that move together), R regions of W units with C inputs each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ace_cli.core.torch_api import own_parameters
from ace_cli.methods.patterns import NofM
from ace_cli.model.blocks import Block
from ace_cli.model.calls import Batch
from ace_cli.model.experts import ExpertCall, Experts
from ace_cli.model.slots import Slot
from ace_cli.model.streamed import StreamedModel

#: One sequence of so many tokens tells heads apart and proves a link; so many single tokens probe a slot's outputs.
_LENGTH, _PROBES = 16, 256


@dataclass(frozen=True)
class Producer:
    """``rows_I``: which output of ``slot`` feeds each of the consumer's inputs. A fused slot may be two producers."""

    slot: str
    rows_I: Tensor


@dataclass(frozen=True)
class Link:
    """A slot whose inputs may be reordered, and the slots whose outputs are then reordered alike.

    Slots go by their module's name inside the block. ``channels_RWC``: within each region r, its W units may be put
    in any order, the C inputs of a unit in step. Multilayer perceptron: (1, I, 1). Attention: (key-value heads, size
    of a head, query heads that share it).
    """

    consumer: str
    producers: tuple[Producer, ...]
    channels_RWC: Tensor

    def misfit(self, pattern: NofM) -> str | None:
        """Why the groups of ``pattern`` do not lie inside the regions; None if they do."""
        regions, width, copies = self.channels_RWC.shape
        if width % pattern.m:
            return f"{self.consumer}: heads of {width} do not divide by {pattern.m}"
        group_RWC = self.channels_RWC.div(pattern.m, rounding_mode="floor").view(regions, -1, pattern.m, copies)
        together = bool((group_RWC == group_RWC[:, :, :1]).all())
        return None if together else f"{self.consumer}: its heads are not stored one after the other"

    def row_orders(self, order_I: Tensor, rows: Mapping[str, int]) -> dict[str, Tensor]:
        """Slot -> order_O of its ``rows``, new row o = old row order_O[o], that gives the consumer x[order_I]."""
        orders = {producer.slot: torch.arange(rows[producer.slot]) for producer in self.producers}
        for producer in self.producers:
            orders[producer.slot][producer.rows_I] = producer.rows_I[order_I.cpu()]
        return orders


# --- applying it ---------------------------------------------------------------------------------------------------


def reorder(block: Block, link: Link, order_I: Tensor, columns: bool = True) -> dict[str, Tensor]:
    """Reorder the rows and biases of a loaded block's producers, and the consumer's ``columns``.

    Returns the name inside the block of every parameter whose rows were reordered -> their order, (O,).
    """
    slots = _by_module(block)
    changed = {}
    for name, order_O in link.row_orders(order_I, {name: slot.shape[0] for name, slot in slots.items()}).items():
        for leaf in dict(slots[name].module.named_parameters(recurse=False)):  # weight and, if there is one, bias
            _reorder(slots[name], leaf, order_O, 0)
            changed[f"{name}.{leaf}"] = order_O
    if columns:
        _reorder(slots[link.consumer], "weight", order_I, 1)
    return changed


def _reorder(slot: Slot, leaf: str, order: Tensor, axis: int) -> None:
    """Replace a parameter by a reordered copy; ``axis`` counts as in (O, I)."""
    value = getattr(slot.module, leaf)
    if slot.in_module.transposed and value.dim() == 2:
        axis = 1 - axis
    value = value.index_select(axis, order.to(value.device))
    setattr(slot.module, leaf, nn.Parameter(value, requires_grad=False))


# --- finding links -------------------------------------------------------------------------------------------------


class LinkFinder:
    """Finds the links of a model's blocks. Blocks of the same slots are looked into once and proven each.

    Reads the stem once, to see how the model calls its blocks for a few short windows.
    """

    def __init__(self, model: StreamedModel) -> None:
        self._model = model
        vocabulary = model.skeleton.get_input_embeddings().weight.shape[0]
        ids_N = torch.arange(max(_PROBES, 2 * _LENGTH)) % vocabulary
        self._single = next(iter([*model.batches(ids_N[:_PROBES, None])]))
        self._short = next(iter([*model.batches(ids_N[: 2 * _LENGTH].view(2, _LENGTH))]))
        self._known: dict[tuple[Any, ...], list[Link]] = {}

    def links(self, index: int, wanted: Callable[[Link], bool] = lambda _: True) -> list[Link]:
        """The proven links of loaded block ``index``, of those ``wanted``. Call inside inference mode."""
        return [link for link in self.likely(index) if wanted(link) and self.proves(index, link)]

    def likely(self, index: int) -> list[Link]:
        """The links that blocks like loaded block ``index`` have, not proven with its own weights."""
        block = self._model.blocks[index]
        slots = _by_module(block)
        kind = (type(block.module), *((name, slot.shape) for name, slot in slots.items()))
        if kind not in self._known:
            self._known[kind] = self._find(index, slots)
        return self._known[kind]

    def proves(self, index: int, link: Link) -> bool:
        """Whether a random reordering by ``link`` leaves what loaded block ``index`` computes."""
        return self._preserves(index, link, _by_module(self._model.blocks[index]))

    def rows(self, index: int) -> dict[str, int]:
        """Slot, by its module's name in block ``index`` -> how many outputs it has."""
        return {name: slot.shape[0] for name, slot in _by_module(self._model.blocks[index]).items()}

    def calls(self, index: int) -> list[tuple[Experts, ExpertCall]]:
        """What each layer of experts of loaded block ``index`` is given where noise goes into the block."""
        block, given = self._model.blocks[index], dict[int, tuple[Any, ...]]()

        def watched(number: int, module: nn.Module) -> Callable[..., Any]:
            forward = module.forward

            def call(*args: Any, **kwargs: Any) -> Any:
                given[number] = (args, kwargs)
                return forward(*args, **kwargs)

            return call

        with _forwards({experts.module: watched(n, experts.module) for n, experts in enumerate(block.experts)}):
            self._model.forward(index, self._noisy(_Noise(self._model)))
        return [(experts, experts.call(*given[number])) for number, experts in enumerate(block.experts)]

    def order(self, count: int) -> Tensor:
        """A random order of so many, int64; not the one they are in."""
        return _shuffled(count, _Noise(self._model))

    def _noisy(self, draw: _Noise) -> Batch:
        return replace(self._short, hidden_BLH=draw.normal(*self._short.hidden_BLH.shape))

    def _find(self, index: int, slots: dict[str, Slot]) -> list[Link]:
        links = []
        for consumer, sources in self._dependencies(index, slots).items():
            inputs = slots[consumer].shape[1]
            producers = tuple(p for name, pairs in sources.items() for p in _producers(name, pairs, inputs))
            if not producers:
                continue
            units_UC = _units(producers, inputs)
            links += self._widest(index, slots, consumer, producers, units_UC) if units_UC is not None else []
        return links

    def _dependencies(self, index: int, slots: dict[str, Slot]) -> dict[str, dict[str, Tensor]]:
        """Consumer -> slot -> (pairs, 2): which of its outputs moves which input of the consumer.

        Every slot's output is replaced by positive noise (so that no gate or rectifier is shut), the same for every
        window, but for one doubled output each. Windows of one token: there attention hands values through, and only
        values are seen. An output that moves more than an eighth of the inputs does so through a sum, and is left out.
        """
        draw = _Noise(self._model)
        base = {name: draw.uniform(slot.shape[0]) + 0.5 for name, slot in slots.items()}
        seen: dict[str, dict[str, Tensor]] = {}
        windows = len(self._single.ids_BL)
        for name, slot in slots.items():
            for first in range(0, slot.shape[0], windows - 1):
                rows = range(first, min(first + windows - 1, slot.shape[0]))

                def output(stub: str, name: str = name, rows: range = rows) -> Tensor:
                    y_B1O = base[stub].expand(windows, 1, -1)
                    if stub == name:  # window 0 stays as it is
                        y_B1O = y_B1O.clone()
                        y_B1O[range(1, len(rows) + 1), 0, rows] *= 2
                    return y_B1O

                for consumer, x_B1I in self._inputs(index, self._single, slots, output).items():
                    x_BI = x_B1I.view(windows, -1).float()
                    moved_BI = (x_BI - x_BI[0]).abs() > 0.01 * x_BI[0].abs().max()
                    if bool((moved_BI.sum(1) <= x_BI.shape[1] // 8).all()):
                        pairs = moved_BI[1 : len(rows) + 1].nonzero().cpu() + torch.tensor([first, 0])
                        found = seen.setdefault(consumer, {})
                        found[name] = torch.cat([found.get(name, pairs[:0]), pairs])
        return seen

    def _widest(
        self, index: int, slots: dict[str, Slot], consumer: str, producers: tuple[Producer, ...], units_UC: Tensor
    ) -> list[Link]:
        """The link of the largest regions within which units can be exchanged; none if there is no such."""
        units, copies = units_UC.shape
        for width in (width for width in range(units, 1, -1) if units % width == 0):
            link = Link(consumer, producers, units_UC.view(-1, width, copies))
            if self._exchanges(index, slots, link):
                return [link]
        return []

    def _exchanges(self, index: int, slots: dict[str, Slot], link: Link) -> bool:
        """With noise for every slot's output: producers' outputs reordered, is the consumer's input, and only it?"""
        draw = _Noise(self._model)
        B, L = self._short.ids_BL.shape
        noise = {name: 2 * draw.normal(B, L, slot.shape[0]) for name, slot in slots.items()}
        order_I = _random_order(link, draw)
        orders = link.row_orders(order_I, {name: slot.shape[0] for name, slot in slots.items()})
        before = self._inputs(index, self._short, slots, lambda name: noise[name])
        after = self._inputs(index, self._short, slots, lambda n: noise[n][..., orders[n]] if n in orders else noise[n])
        if link.consumer not in before:
            return False
        before[link.consumer] = before[link.consumer][..., order_I]
        return all(self.same(before[name], after[name]) for name in before)

    def _preserves(self, index: int, link: Link, slots: dict[str, Slot]) -> bool:
        """With the block's own weights: one random reordering leaves every other slot's and the block's output."""
        block = self._model.blocks[index]
        draw = _Noise(self._model)
        probe = self._noisy(draw)
        touched = [slots[name].module for name in {link.consumer, *(p.slot for p in link.producers)}]
        kept = [dict(own_parameters(module)) for module in touched]
        before = self._outputs(index, probe, slots)
        try:
            reorder(block, link, _random_order(link, draw))
            after = self._outputs(index, probe, slots)
        finally:
            for module, parameters in zip(touched, kept, strict=True):
                own_parameters(module).update(parameters)
        producers = {producer.slot for producer in link.producers}
        return all(self.same(before[name], after[name]) for name in before if name not in producers)

    def same(self, one: Tensor, other: Tensor) -> bool:
        """Equal up to rounding: relative 1e-4, or what the compute dtype allows. A wrong link is off by about 1."""
        tolerance = max(1e-4, 8 * torch.finfo(self._model.dtype).eps)
        return float((one.float() - other.float()).norm()) <= tolerance * float(one.float().norm())

    def _inputs(
        self, index: int, batch: Batch, slots: dict[str, Slot], output: Callable[[str], Tensor]
    ) -> dict[str, Tensor]:
        """Run the block with ``output(name)``, (B, L, O), for every slot's; what goes into those that read alone."""
        inputs: dict[str, Tensor] = {}

        def stand_in(name: str, slot: Slot) -> Callable[[Tensor], Tensor]:
            def forward(x: Tensor) -> Tensor:
                inputs[name] = x
                return output(name).clone().view(*x.shape[:-1], slot.shape[0])  # some blocks add to it in place

            return forward

        with _forwards({slot.module: stand_in(name, slot) for name, slot in slots.items()}):
            self._model.forward(index, batch)
        alone = {name for name, x in inputs.items() if sum(x is other for other in inputs.values()) == 1}
        return {name: x for name, x in inputs.items() if name in alone}

    def _outputs(self, index: int, batch: Batch, slots: dict[str, Slot]) -> dict[str, Tensor]:
        """Every slot's output, and the block's under the empty name."""
        outputs: dict[str, Tensor] = {}

        def watched(name: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
            forward = module.forward

            def call(x: Tensor) -> Tensor:
                outputs[name] = forward(x)
                return outputs[name]

            return call

        with _forwards({slot.module: watched(name, slot.module) for name, slot in slots.items()}):
            outputs[""] = self._model.forward(index, batch)
        return outputs


def _by_module(block: Block) -> dict[str, Slot]:
    """The slots that are a layer's whole weight, by their module's name inside the block."""
    slots = {id(slot.module): slot for slot in block.layers if slot.in_module.rows is None}
    return {name: slots[id(module)] for name, module in block.module.named_modules() if id(module) in slots}


def _producers(slot: str, pairs: Tensor, inputs: int) -> list[Producer]:
    """The slot as a producer: once if every input has one row of it, twice if two, ...; not at all if they differ."""
    rows, channels = pairs.unbind(1)
    order = (channels * (int(rows.max()) + 1) + rows).argsort() if len(pairs) else rows
    times = len(pairs) // inputs
    if not times or not torch.equal(channels[order], torch.arange(inputs).repeat_interleave(times)):
        return []
    return [Producer(slot, rows_I) for rows_I in rows[order].view(inputs, times).T]


def _units(producers: tuple[Producer, ...], inputs: int) -> Tensor | None:
    """(U, C): inputs that share a row must move together; in the order of the rows. None if units differ in size."""
    counts = [torch.bincount(producer.rows_I) for producer in producers]
    copies_U, shared = min(
        ((count[count > 0], producer.rows_I) for count, producer in zip(counts, producers, strict=True)),
        key=lambda pair: len(pair[0]),
    )
    same_size = bool((copies_U == copies_U[0]).all())
    return shared.argsort(stable=True).view(len(copies_U), -1) if same_size else None


def _random_order(link: Link, draw: _Noise) -> Tensor:
    order_I = torch.arange(link.channels_RWC.numel())
    for channels_WC in link.channels_RWC:
        order_I[channels_WC] = channels_WC[_shuffled(len(channels_WC), draw)]
    return order_I


def _shuffled(count: int, draw: _Noise) -> Tensor:
    order_W = draw.order(count)  # of few units, random ones may stay, which proves nothing
    return order_W.roll(1) if torch.equal(order_W, order_W.sort().values) else order_W


class _Noise:
    """Random numbers that are the same on every machine and in every run."""

    def __init__(self, model: StreamedModel) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._device, self._dtype = model.device, model.dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self._device, self._dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator).to(self._device, self._dtype)

    def order(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self._generator)


@contextmanager
def _forwards(functions: dict[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """The modules compute these functions instead of their own."""
    for module, function in functions.items():
        module.__dict__["forward"] = function  # found before the class's own
    try:
        yield
    finally:
        for module in functions:
            del module.__dict__["forward"]
