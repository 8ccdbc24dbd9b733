"""Slicing the residual stream of a model, block by block (SliceGPT).

While the model streams, states stay in their old basis and shapes: slicing h to h Q (Q orthonormal, (H, D)) is the same
as projecting it, h Q Q^T, before the norm, for a norm without gain sees the same size and the weights behind it,
W diag(g) Q, the same directions. So a block is run as it is, with projections where its norms read.

Shapes: H hidden size, D what is left of it, O outputs, I inputs of a slot, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ace_cli.core.errors import AceError
from ace_cli.kernels.finite_checks import check_finite
from ace_cli.model.calls import Batch
from ace_cli.model.header import DTYPES, TensorEntry
from ace_cli.model.slots import Slot
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.observer import hooked

#: Tensor of the new files -> what it holds, float64, a block's or the stem's.
Tensors = dict[str, Tensor]
#: The float64 sum of h h^T, and D -> Q (H, D).
Basis = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Half:
    """One half of a block: ``norm`` reads the stream, ``readers`` read the norm, ``writer`` adds to the stream."""

    norm: str
    readers: tuple[Slot, ...]
    writer: Slot


@dataclass
class Slicer:
    """Slices ``model`` to ``width``; ``basis`` gives Q.

    Raises AceError where its blocks are not two halves, each a norm with a gain alone, what reads it and one output.
    """

    model: StreamedModel
    width: int
    basis: Basis
    halves: list[tuple[Half, Half]] = field(default_factory=list)
    last_HD: Tensor | None = None

    def __post_init__(self) -> None:
        """Looks into every block: a few tokens are run through each."""
        self._last_norm()
        ids_BL = (torch.arange(8) % self.model.vocabulary).view(2, 4)
        (batch,) = self.model.batches(ids_BL)
        with torch.no_grad():
            self.halves = [self._halves(index, batch) for index in self.model.one_by_one()]

    @property
    def hidden(self) -> int:
        """H."""
        return int(self.model.skeleton.get_input_embeddings().weight.shape[1])

    def run(self, batches: list[Batch], on_block: Callable[[], object]) -> Iterator[Tensors]:
        """What every block, and last the stem, becomes; takes ``batches``, embedded, to the end of the model."""
        first_HD = before_HD = self._basis_of(batches)
        with torch.no_grad():
            for batch in batches:
                batch.hidden_BLH = _projected(batch.hidden_BLH, before_HD)
            for index in self.model.one_by_one():
                halves = self.halves[index]
                middle_HD = self._middle(index, halves[1], batches)
                with self._projecting(index, halves[1], middle_HD):
                    self.model.advance(index, batches)
                for batch in batches:
                    check_finite(batch.hidden_BLH, f"the output of {self.model.blocks[index].name}")
                after_HD = self._basis_of(batches)
                yield self._block(index, [(halves[0], before_HD, middle_HD), (halves[1], middle_HD, after_HD)])
                for batch in batches:
                    batch.hidden_BLH = _projected(batch.hidden_BLH, after_HD)
                before_HD = after_HD
                on_block()
        self.last_HD = before_HD
        with self.model.head_loaded():
            yield self._stem(first_HD, before_HD)

    def _basis_of(self, batches: list[Batch]) -> Tensor:
        """Q of the states, (H, D)."""
        total_HH = torch.zeros(self.hidden, self.hidden, dtype=torch.float64, device=self.model.device)
        for batch in batches:
            total_HH.add_(_gram(batch.hidden_BLH))
        return self.basis(total_HH, self.width)

    # --- what a block is made of ---------------------------------------------------------------------------------

    def _halves(self, index: int, batch: Batch) -> tuple[Half, Half]:
        """Found by running the loaded block: which norms read the stream, which slots read them, which write."""
        block = self.model.blocks[index]
        events: list[tuple[str, Slot | str]] = []
        outputs: list[Tensor] = []  # of norms, kept so that no other tensor takes their place

        def norm_ran(path: str) -> Callable[..., None]:
            def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
                events.append(("norm", path))
                outputs.append(out)

            return note

        def slot_ran(slot: Slot, x: Tensor, y: Tensor) -> None:
            reads = any(x is out for out in outputs[-1:])
            events.append(("reads" if reads else "other", slot))

        handles = [
            module.register_forward_hook(norm_ran(path))
            for path, module in block.module.named_modules()
            if _is_norm(module, self.hidden)
        ]
        try:
            with hooked(block.layers, slot_ran, before=False):
                self.model.forward(index, batch)
        finally:
            for handle in handles:
                handle.remove()
        found: list[tuple[str, list[Slot], list[Slot]]] = []
        for kind, what in events:
            if isinstance(what, str):
                found.append((what, [], []))
            elif found:
                _, readers, others = found[-1]
                (readers if kind == "reads" else others).append(what)
        if (
            len(found) != 2
            or any(not readers or len(others) != 1 or others[0].shape[0] != self.hidden for _, readers, others in found)
            or len(block.layers) != sum(len(readers) + 1 for _, readers, _ in found)
            or block.experts
        ):
            raise AceError(
                f"unit=hidden: {block.name} is not two halves of a norm, what reads it and one output.",
                "Use unit=channel, or unit=rank.",
            )
        one, two = (Half(norm, tuple(readers), others[0]) for norm, readers, others in found)
        return one, two

    def _middle(self, index: int, half: Half, batches: list[Batch]) -> Tensor:
        """Q of what the block's second norm reads, over all batches."""
        total_HH = torch.zeros(self.hidden, self.hidden, dtype=torch.float64, device=self.model.device)

        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            total_HH.add_(_gram(args[0]))
            raise _Enough

        handle = self.model.blocks[index].module.get_submodule(half.norm).register_forward_pre_hook(add)
        try:
            for batch in batches:
                try:
                    self.model.forward(index, batch)
                except _Enough:
                    continue
        finally:
            handle.remove()
        return self.basis(total_HH, self.width)

    @contextmanager
    def _projecting(self, index: int, half: Half, basis_HD: Tensor) -> Iterator[None]:
        """While inside, the stream is projected before the half's norm: in place, as it also goes around the half."""

        def project(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            args[0].copy_(_projected(args[0], basis_HD))

        handle = self.model.blocks[index].module.get_submodule(half.norm).register_forward_pre_hook(project)
        try:
            yield
        finally:
            handle.remove()

    # --- the new files ---------------------------------------------------------------------------------------------

    def entries(self) -> dict[str, TensorEntry]:
        """The tensors of the new files, in the shapes they will have; those added lie beside what they serve."""
        found = dict(self.model.checkpoint.tensors)
        for index, halves in enumerate(self.halves):
            block = self.model.blocks[index]
            for half in halves:
                for slot in half.readers:
                    _shape(found, slot.key, int(not slot.in_file.transposed), self.width)
                _shape(found, half.writer.key, int(half.writer.in_file.transposed), self.width)
                _shape(found, block.parts[f"{half.norm}.weight"][0].key, 0, self.width)
                if (bias := self._key(index, half.writer, "bias")) is not None:
                    _shape(found, bias, 0, self.width)
                name = self.shortcut_key(index, half)
                found[name] = _resized(replace(found[half.writer.key], name=name), (self.width, self.width))
        table, head = self._stored(self.embedding), self._stored(self.head)
        if head not in found:
            found[head] = replace(found[table], name=head)
        _shape(found, table, 1, self.width)
        _shape(found, head, 1, self.width)
        _shape(found, self._stored(f"{self._last_norm()[0]}.weight"), 0, self.width)
        return found

    def shapes(self) -> dict[str, list[int]]:
        """Parameter -> shape, of those that are not as the stock class builds them."""
        found, entries = {}, self.entries()
        for name, value in self.model.skeleton.state_dict().items():
            key = self.head if name == self.head else self._stored(name)
            if key in entries and tuple(entries[key].shape) != tuple(value.shape):
                found[name] = list(entries[key].shape)
        return found

    # --- new tensors ---------------------------------------------------------------------------------------------

    def _block(self, index: int, halves: list[tuple[Half, Tensor, Tensor]]) -> Tensors:
        block = self.model.blocks[index]
        found: Tensors = {}
        for half, before_HD, after_HD in halves:
            norm = block.module.get_submodule(half.norm)
            gain_H, plain = _gain(norm)
            for slot in half.readers:
                self._put(found, slot, (slot.weight_OI.double() * gain_H) @ before_HD)
            self._put(found, half.writer, after_HD.T @ half.writer.weight_OI.double())
            name = self._key(index, half.writer, "bias")
            if name is not None and half.writer.bias_O is not None:
                found[name] = after_HD.T @ half.writer.bias_O.double()
            found[block.parts[f"{half.norm}.weight"][0].key] = self._flat(plain)
            change_DD = before_HD.T @ after_HD - torch.eye(self.width, dtype=torch.float64, device=before_HD.device)
            found[self.shortcut_key(index, half)] = change_DD
        return found

    def _stem(self, first_HD: Tensor, last_HD: Tensor) -> Tensors:
        """Embeddings, last norm and head; the head is stored by itself even if it was the embeddings'."""
        skeleton = self.model.skeleton
        norm_path, norm = self._last_norm()
        gain_H, plain = _gain(norm)
        table, head = skeleton.get_input_embeddings().weight.double(), skeleton.get_output_embeddings().weight.double()
        return {
            self._stored(self.embedding): table @ first_HD,
            self._stored(f"{norm_path}.weight"): self._flat(plain),
            self._stored(self.head): (head * gain_H) @ last_HD,
        }

    @property
    def embedding(self) -> str:
        """The name of the embeddings."""
        return f"{self._path_of(self.model.skeleton.get_input_embeddings())}.weight"

    @property
    def head(self) -> str:
        """The name of the head."""
        return f"{self._path_of(self.model.skeleton.get_output_embeddings())}.weight"

    def shortcut_key(self, index: int, half: Half) -> str:
        """The tensor that says how the basis changes over a half: S - I."""
        block = self.model.blocks[index]
        return f"{block.name}.{self._path_in(index, half.writer)}.shortcut"

    def pairs(self) -> list[list[str]]:
        """Of all halves, norm and writer by path."""
        return [
            [f"{self.model.blocks[index].name}.{path}" for path in (half.norm, self._path_in(index, half.writer))]
            for index, halves in enumerate(self.halves)
            for half in halves
        ]

    def _flat(self, plain: float) -> Tensor:
        """The weight of a norm over D entries that gives what the old one, without its gain, gives over H:

        x / sqrt(sum x^2 / H + e) = sqrt(H / D) x / sqrt(sum x^2 / D + e H / D).
        """
        return torch.full((self.width,), sqrt(self.hidden / self.width) - plain, dtype=torch.float64)

    def _put(self, found: Tensors, slot: Slot, weight_OI: Tensor) -> None:
        found[slot.key] = weight_OI.T if slot.in_file.transposed else weight_OI

    def _key(self, index: int, slot: Slot, leaf: str) -> str | None:
        parts = self.model.blocks[index].parts.get(f"{self._path_in(index, slot)}.{leaf}")
        return parts[0].key if parts else None

    def _path_in(self, index: int, slot: Slot) -> str:
        block = self.model.blocks[index].module
        paths: dict[int, str] = {id(module): path for path, module in block.named_modules()}
        return paths[id(slot.module)]

    def _path_of(self, wanted: nn.Module) -> str:
        paths: dict[int, str] = {id(module): path for path, module in self.model.skeleton.named_modules()}
        return paths[id(wanted)]

    def _stored(self, name: str) -> str:
        return self.model.stored_as(name) or name

    def _last_norm(self) -> tuple[str, nn.Module]:
        inside = tuple(f"{block.name}." for block in self.model.blocks)
        found = [
            (path, module)
            for path, module in self.model.skeleton.named_modules()
            if _is_norm(module, self.hidden) and not f"{path}.".startswith(inside)
        ]
        if len(found) != 1:
            names = ", ".join(path for path, _ in found) or "none"
            raise AceError(f"unit=hidden: expected one norm before the head, found {names}.", "Use unit=channel.")
        return found[0]


def _shape(entries: dict[str, TensorEntry], key: str, axis: int, size: int) -> None:
    shape = list(entries[key].shape)
    shape[axis] = size
    entries[key] = _resized(entries[key], tuple(shape))


def _resized(entry: TensorEntry, shape: tuple[int, ...]) -> TensorEntry:
    resized = replace(entry, shape=shape)
    return replace(resized, nbytes=resized.numel * DTYPES[entry.dtype][1])


class _Enough(Exception):
    """What was asked for is seen."""


def _is_norm(module: nn.Module, width: int) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return [*own] == ["weight"] and own["weight"].shape == (width,) and "Norm" in type(module).__name__


def _gain(norm: nn.Module) -> tuple[Tensor, float]:
    """By how much it scales every input, float64 (H,), and what its weight is short of that: 1 where it stores g - 1.

    AceError if it is no RMS norm.
    """
    weight: Any = norm.weight
    weight_H: Tensor = weight.detach()
    with torch.no_grad():
        even_H = torch.ones_like(weight_H)
        odd_H = torch.cat((even_H[:-1], -even_H[:1]))
        ones_H, turned_H = (norm(each_H[None])[0].double() for each_H in (even_H, odd_H))
    plain = float((ones_H - weight_H.double()).mean().round())
    gain_H = weight_H.double() + plain
    if not torch.allclose(gain_H, ones_H, rtol=1e-2, atol=1e-2) or not torch.allclose(ones_H[:-1], turned_H[:-1]):
        raise AceError(f"unit=hidden: {type(norm).__name__} is no RMS norm.", "Use unit=channel, or unit=rank.")
    return gain_H, plain


def _gram(hidden_BLH: Tensor) -> Tensor:
    x_TH = hidden_BLH.reshape(-1, hidden_BLH.shape[-1]).double()
    return x_TH.T @ x_TH


def _projected(hidden_BLH: Tensor, basis_HD: Tensor) -> Tensor:
    """h Q Q^T."""
    return (hidden_BLH.double() @ basis_HD @ basis_HD.T).to(hidden_BLH.dtype)
