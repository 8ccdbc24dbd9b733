"""Cuts: which entries of which tensors go when units go, and what the files look like afterwards.

A coupling is known from the shapes of a block alone, before any block runs; which of its units stay is found while
streaming. Where units have tensors of their own, with their number in the name, those of units that go are gone, and
those of the others are numbered anew (``Numbered``).

Shapes: U units, P places of one unit along an axis, R regions of W units (U = R W), C inputs of a unit, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ace_cli.model.blocks import Block
from ace_cli.model.files import Checkpoint
from ace_cli.model.header import DTYPES, TensorEntry
from ace_cli.model.links import Link
from ace_cli.model.slots import Slot


@dataclass(frozen=True)
class Numbered:
    """Units with tensors of their own: those of unit u begin with ``before``, u and a dot."""

    before: str

    def number(self, key: str) -> int | None:
        """Which unit's a tensor is; None if it is none's."""
        number, dot, _ = key.removeprefix(self.before).partition(".")
        return int(number) if key.startswith(self.before) and dot and number.isdecimal() else None

    def moved(self, key: str, kept: Sequence[int]) -> str:
        """The name that a tensor has once the units ``kept``, in order, are all there are; empty if it is gone."""
        unit = self.number(key)
        if unit is None:
            return key
        rest = key.removeprefix(f"{self.before}{unit}")
        return f"{self.before}{kept.index(unit)}{rest}" if unit in kept else ""


@dataclass(frozen=True)
class Axis:
    """Where units lie in a tensor of the files: unit u at ``places_UP[u]`` along ``axis``.

    ``index``: of a tensor that holds all experts, in which part of it; ``axis`` is then one of that part's. Every part
    has an expert of its own, and all of them keep the same number of units.
    """

    key: str
    axis: int
    places_UP: Tensor
    index: int | None = None


@dataclass(frozen=True)
class Coupling:
    """Units of one block that take places in several tensors: each stays in all of them or in none.

    ``name``: the weight that reads the units, as slots are named; ``columns_RWC``: its inputs that each unit is.
    ``producers``: the weights whose rows make the inputs, as slots are named, and for each input its row (I,).
    ``numbered``: where units have tensors of their own, all of the same shapes.
    """

    name: str
    columns_RWC: Tensor
    axes: tuple[Axis, ...]
    producers: tuple[tuple[str, Tensor], ...]
    numbered: Numbered | None = None

    @property
    def regions(self) -> int:
        """R: each keeps the same number of units."""
        return self.columns_RWC.shape[0]

    @property
    def width(self) -> int:
        """W: how many units a region has."""
        return self.columns_RWC.shape[1]


def rows_of(link: Link) -> dict[str, Tensor]:
    """Slot, by its module's name in the block -> the rows of each unit, (U, P), of every weight that makes them."""
    units_UC = link.channels_RWC.flatten(0, 1)
    rows: dict[str, list[Tensor]] = {}
    for producer in link.producers:
        rows.setdefault(producer.slot, []).append(producer.rows_I[units_UC])
    return {slot: _each_once(torch.cat(places, 1)) for slot, places in rows.items()}


def _each_once(places_UP: Tensor) -> Tensor:
    """Each row's places once, in order: a row of keys serves several inputs. All units have equally many."""
    sorted_UP = places_UP.sort(1).values
    first_UP = torch.ones_like(sorted_UP, dtype=torch.bool)
    first_UP[:, 1:] = sorted_UP[:, 1:] != sorted_UP[:, :-1]
    return sorted_UP[first_UP].view(len(sorted_UP), -1)


def coupling(block: Block, link: Link, rows: Mapping[str, Tensor]) -> Coupling:
    """What goes with the units of ``link``, in the files; ``rows`` as ``rows_of`` has them. The block may be empty."""
    slots = {
        name: slot for slot in block.layers for name, module in block.module.named_modules() if module is slot.module
    }
    consumer = slots[link.consumer]
    axes = [Axis(consumer.key, 1 - _turned(consumer), link.channels_RWC.flatten(0, 1))]
    for name, places_UP in rows.items():
        for leaf, value in slots[name].module.named_parameters(recurse=False):
            axis = _turned(slots[name]) if value.dim() == 2 else 0
            axes.append(Axis(block.parts[f"{name}.{leaf}"][0].key, axis, places_UP))
    producers = tuple((slots[producer.slot].name, producer.rows_I) for producer in link.producers)
    return Coupling(consumer.name, link.channels_RWC, tuple(axes), producers)


def _turned(slot: Slot) -> int:
    return int(slot.in_file.transposed)


@dataclass(frozen=True)
class Cut:
    """``couplings``: of every block; ``stay``: coupling's name -> how many units of each region stay."""

    couplings: tuple[tuple[Coupling, ...], ...]
    stay: Mapping[str, int]

    @cached_property
    def _axes(self) -> dict[str, list[tuple[Coupling, Axis]]]:
        found: dict[str, list[tuple[Coupling, Axis]]] = {}
        for each in (each for block in self.couplings for each in block):
            for axis in each.axes:
                found.setdefault(axis.key, []).append((each, axis))
        return found

    @cached_property
    def _owners(self) -> dict[str, Coupling]:
        """The couplings with tensors of their units' own, by what these are called before the number."""
        return {each.numbered.before: each for block in self.couplings for each in block if each.numbered}

    def _owner(self, key: str) -> Coupling | None:
        dots = (place + 1 for place, letter in enumerate(key) if letter == ".") if self._owners else ()
        return next((self._owners[key[:end]] for end in dots if key[:end] in self._owners), None)

    def own_of(self, keys: Iterable[str]) -> set[str]:
        """Those of ``keys`` that are a unit's own."""
        return {key for key in keys if self._owner(key) is not None}

    def moved(self, key: str, kept: Mapping[str, Tensor]) -> str:
        """What a tensor is called in the new files; empty if it is gone. ``kept``: coupling's name -> bool (U,)."""
        each = self._owner(key)
        if each is None or each.numbered is None:
            return key
        return each.numbered.moved(key, kept[each.name].nonzero().flatten().tolist())

    def source_of(self, name: str, kept: Mapping[str, Tensor]) -> str:
        """The other way round: the tensor of the source that is called ``name`` in the new files."""
        each = self._owner(name)
        if each is None or each.numbered is None:
            return name
        number = each.numbered.number(name)
        assert number is not None
        old = int(kept[each.name].nonzero().flatten()[number])
        return f"{each.numbered.before}{old}{name.removeprefix(f'{each.numbered.before}{number}')}"

    @property
    def keys(self) -> set[str]:
        """The tensors of the files that get smaller."""
        return {key for key, axes in self._axes.items() if any(self._fewer(each) for each, _ in axes)}

    @property
    def uneven(self) -> bool:
        """Whether blocks of equal width keep different numbers of units."""
        widths = {(each.width, self.stay[each.name]) for block in self.couplings for each in block}
        return len(widths) > len({width for width, _ in widths})

    def shape(self, entry: TensorEntry) -> tuple[int, ...]:
        """The shape that a tensor of the files will have."""
        shape = list(entry.shape)
        for each, axis in self._axes.get(entry.name, []):
            if not axis.index:  # the first part speaks for all
                place = axis.axis + (axis.index is not None)
                shape[place] -= each.regions * self._fewer(each) * axis.places_UP.shape[1]
        return tuple(shape)

    def entries(self, source: Checkpoint) -> dict[str, TensorEntry]:
        """The tensors of the new files, in the shapes they will have; places in files are those of the source."""
        first = {
            each.name: torch.arange(each.regions * each.width) < each.regions * self.stay[each.name]
            for block in self.couplings
            for each in block
            if each.numbered
        }
        return {
            name: _shaped(entry, self.shape(entry)) for name, entry in source.tensors.items() if self.moved(name, first)
        }

    def sliced(self, key: str, tensor: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
        """What stays of a tensor of the files. ``kept``: coupling's name -> bool (U,)."""
        parts = self._parts(key)
        if None not in parts:
            return torch.stack([_sliced(tensor[index], parts[index], kept) for index in range(len(parts))])
        return _sliced(tensor, parts[None], kept).contiguous()

    def grown(self, key: str, tensor: Tensor, shape: tuple[int, ...], kept: Mapping[str, Tensor]) -> Tensor:
        """The other way round: a tensor of the new files in its old ``shape``, with zeros where units went."""
        parts = self._parts(key)
        if None not in parts:
            return torch.stack([_grown(tensor[index], parts[index], shape[1:], kept) for index in range(len(parts))])
        return _grown(tensor, parts[None], shape, kept)

    def _parts(self, key: str) -> dict[int | None, list[tuple[Coupling, Axis]]]:
        """Where units lie in a tensor: in each of its parts, or in all of it (None)."""
        axes = self._axes.get(key, [])
        found: dict[int | None, list[tuple[Coupling, Axis]]] = {axis.index: [] for _, axis in axes} or {None: []}
        for each, axis in axes:
            found[axis.index].append((each, axis))
        return found

    def _fewer(self, each: Coupling) -> int:
        return each.width - self.stay[each.name]


def _sliced(tensor: Tensor, axes: Iterable[tuple[Coupling, Axis]], kept: Mapping[str, Tensor]) -> Tensor:
    for axis, stays in _stays(axes, tensor.shape, kept).items():
        tensor = tensor.index_select(axis, stays.to(tensor.device))
    return tensor


def _grown(
    tensor: Tensor, axes: Iterable[tuple[Coupling, Axis]], shape: tuple[int, ...], kept: Mapping[str, Tensor]
) -> Tensor:
    for axis, stays in _stays(axes, shape, kept).items():
        wide = [*tensor.shape[:axis], shape[axis], *tensor.shape[axis + 1 :]]
        tensor = tensor.new_zeros(wide).index_copy_(axis, stays, tensor)
    return tensor


def _stays(
    axes: Iterable[tuple[Coupling, Axis]], shape: tuple[int, ...], kept: Mapping[str, Tensor]
) -> dict[int, Tensor]:
    """Axis -> the places that are left of it, in order: those of units kept, and those of none."""
    keep: dict[int, Tensor] = {}
    for each, axis in axes:
        keep.setdefault(axis.axis, torch.ones(shape[axis.axis], dtype=torch.bool))
        keep[axis.axis][axis.places_UP[~kept[each.name].cpu()].flatten()] = False
    return {axis: stays.nonzero().flatten() for axis, stays in keep.items()}


def _shaped(entry: TensorEntry, shape: tuple[int, ...]) -> TensorEntry:
    resized = replace(entry, shape=shape)
    return entry if shape == entry.shape else replace(resized, nbytes=resized.numel * DTYPES[entry.dtype][1])


class Grown(Checkpoint):
    """A cut checkpoint read as if it had the old shapes, zeros where units went: what was computed while cutting.

    Adding zeros changes no sum, so blocks computed from it give the states that they gave then, bit for bit.
    """

    def __init__(self, checkpoint: Checkpoint, source: Checkpoint, cut: Cut, kept: Mapping[str, Tensor]) -> None:
        self.__dict__.update(checkpoint.__dict__)
        self._source, self._cut, self._kept = source, cut, kept

    def read(self, name: str) -> Tensor:
        tensor = super().read(name)
        written = tensor.shape != self._source.tensors[name].shape
        return self._cut.grown(name, tensor, self._source.tensors[name].shape, self._kept) if written else tensor


class Renamed(Checkpoint):
    """A checkpoint whose tensors are read by other names: ``names`` has what each is called in it."""

    def __init__(self, source: Checkpoint, names: Mapping[str, str]) -> None:
        self.__dict__.update(source.__dict__)
        self._source, self._names = source, names
        self.tensors = {name: replace(source.tensors[called], name=name) for name, called in names.items()}

    def read(self, name: str) -> Tensor:
        return self._source.read(self._names[name])


def renumbered(source: Checkpoint, numbered: Numbered, kept: Sequence[int]) -> Renamed:
    """A checkpoint as if of all numbered units ``kept`` alone were there."""
    return Renamed(source, {new: old for old in source.tensors if (new := numbered.moved(old, kept))})


class Sliced(Checkpoint):
    """A checkpoint read as if it had been cut: ``kept`` says which units stay, coupling's name -> bool (U,)."""

    def __init__(self, source: Checkpoint, cut: Cut, kept: Mapping[str, Tensor]) -> None:
        self.__dict__.update(source.__dict__)
        self.tensors = cut.entries(source)
        self._source, self._cut, self.kept = source, cut, kept

    def read(self, name: str) -> Tensor:
        return self._cut.sliced(name, self._source.read(self._cut.source_of(name, self.kept)), self.kept)
