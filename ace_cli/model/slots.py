"""Slots: the prunable weights of a block, wherever the module and the file keep them.

A slot is one matrix (O outputs, I inputs): the weight of a linear layer, stored either way round; a part of one that
the file keeps by itself; or one expert inside a parameter that holds all experts of a layer. What is a slot is
decided by what a module is and by the shapes of its parameters, not by the model's family.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.functional import linear

from ace_cli.core.errors import AceError
from ace_cli.core.torch_api import is_convolution

#: Classes that multiply by a matrix but are no nn.Linear, or that keep one matrix per expert without saying which way
#: round (``is_transposed``): class name -> whether it is stored (I, O). A row here teaches a new one.
STORED_TRANSPOSED = {"Conv1D": True, "Llama4TextExperts": True}


@dataclass(frozen=True)
class View:
    """Which part of a tensor is the slot's matrix (O, I).

    Of a tensor that holds all experts, that of expert ``index``; transposed if it is stored (I, O); of the result only
    ``rows`` rows from ``start`` on, where several slots share one matrix.
    """

    index: int | None = None
    transposed: bool = False
    start: int = 0
    rows: int | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        """The part of ``tensor``; shares its memory."""
        part = tensor if self.index is None else tensor[self.index]
        part = part.mT if self.transposed else part
        return part if self.rows is None else part[self.start : self.start + self.rows]

    def shape_in(self, tensor: Tensor) -> tuple[int, ...]:
        """The part's shape; empty if ``tensor`` has no such expert."""
        missing = self.index is not None and self.index >= len(tensor)
        return () if missing else tuple(self(tensor).shape)


@dataclass(frozen=True)
class Part:
    """A tensor in the files (``key``), and which part of a parameter it becomes; ``View()`` if it is all of it."""

    key: str
    place: View = View()


@dataclass
class Slot:
    """One prunable weight, seen as a (O, I) matrix.

    ``name`` is its name in the files, with the expert's number behind it where a file tensor holds several; ``key`` is
    the file tensor, ``in_file`` the slot in it, ``in_module`` the slot in ``module``'s parameter ``leaf``.
    """

    name: str
    key: str
    module: nn.Module
    leaf: str = "weight"
    in_module: View = View()
    in_file: View = View()

    @property
    def weight_OI(self) -> Tensor:
        """The weight in the compute dtype, a view; on the meta device until its block is loaded."""
        return self.in_module(getattr(self.module, self.leaf))

    @property
    def bias_O(self) -> Tensor | None:
        """What is added to the outputs."""
        bias = getattr(self.module, "bias" if self.leaf == "weight" else f"{self.leaf}_bias", None)
        return None if bias is None else replace(self.in_module, transposed=False)(bias)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        rows, columns = self.weight_OI.shape
        return rows, columns

    def put(self, weight_OI: Tensor) -> None:
        """Give the loaded weight new values, in the module's dtype."""
        if self.in_module == View():  # may share the memory of ``weight_OI``
            dtype = getattr(self.module, self.leaf).dtype
            setattr(self.module, self.leaf, nn.Parameter(weight_OI.to(dtype), requires_grad=False))
        else:
            self.weight_OI.copy_(weight_OI)

    def output(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """(..., I) -> (..., O), or ``rows`` of it, in the dtype of the weight: some models keep a router in float32."""
        weight_OI, bias_O = self.weight_OI[rows], self.bias_O
        return linear(x.to(weight_OI.dtype), weight_OI, None if bias_O is None else bias_O[rows])


@dataclass(frozen=True)
class Left:
    """A weight that stays dense: ``why``, and its ``count`` of elements. ``chosen``: because the user excluded it."""

    why: str
    count: int
    chosen: bool = False


@dataclass
class Found:
    """The weights of one block: ``slots`` will be pruned; ``left`` will not, by name in the files."""

    slots: list[Slot] = field(default_factory=list)
    left: dict[str, Left] = field(default_factory=dict)


@dataclass
class SlotFilter:
    """Globs on slot names. ``include`` adds what stays dense by default, ``exclude`` takes away."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def apply(self, candidates: Iterable[tuple[Slot, str]]) -> Found:
        """``candidates``: slots with why they stay dense by default, or an empty string."""
        found = Found()
        for slot, reason in candidates:
            count = slot.weight_OI.numel()
            if _matches(slot.name, self.exclude):
                found.left[slot.name] = Left("excluded", count, chosen=True)
            elif reason and not _matches(slot.name, self.include):
                found.left[slot.name] = Left(reason, count)
            else:
                found.slots.append(slot)
        return found

    def check(self, names: Iterable[str]) -> None:
        """AceError if a glob matches none of ``names``."""
        names = list(names)
        for option in ("include", "exclude"):
            for glob in getattr(self, option):
                if not any(fnmatchcase(name, glob) for name in names):
                    raise AceError(
                        f"{option}={glob} matches no weight of the decoder blocks.",
                        f"Names look like {names[0]}." if names else "",
                    )


def find_slots(block: nn.Module, parts: Mapping[str, list[Part]], selection: SlotFilter) -> Found:
    """The weights of two or more dimensions of one block. ``parts``: parameter name inside the block -> its tensors."""
    candidates: list[tuple[Slot, str]] = []
    left: dict[str, Left] = {}
    weigh = routers(block)
    for path, module in block.named_modules():
        for leaf, weight in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}" if path else leaf
            if weight.dim() < 2 or (weight.dim() == 2 and _stacked(module)):  # vectors, biases of experts
                continue
            slots, reason = _slots_of(module, leaf, weight, parts.get(name, []))
            reason = "router" if path in weigh and weight.dim() == 2 else reason
            candidates += [(slot, reason) for slot in slots]
            if not slots:
                left[parts[name][0].key if name in parts else name] = Left(reason, weight.numel())
    found = selection.apply(candidates)
    found.left |= left
    return found


def _slots_of(module: nn.Module, leaf: str, weight: Tensor, parts: list[Part]) -> tuple[list[Slot], str]:
    """The slots in one parameter, and why they, or it, stay dense by default."""
    kind = type(module).__name__
    if weight.dim() == 2:
        known = isinstance(module, nn.Linear) or kind in STORED_TRANSPOSED
        if leaf != "weight" or isinstance(module, nn.Embedding):
            return [], f"a matrix of {kind}"
        slots = [_slot(module, leaf, part, STORED_TRANSPOSED.get(kind, False)) for part in parts]
        return slots, "" if known else f"a matrix of {kind}"
    if weight.dim() > 3 or is_convolution(module):
        return [], "a convolution"
    turned: bool | None = getattr(module, "is_transposed", STORED_TRANSPOSED.get(kind))
    if turned is None:
        return [], f"{kind} does not say whether it stores (O, I) or (I, O)"
    if not parts:
        return [], "put together from the file by rules without a place for each expert"
    if any(part.place.index is not None and part.place.index >= len(weight) for part in parts):
        return [], "more experts in the file than in the configuration"
    if turned and any(part.place.rows for part in parts):
        return [], f"{kind} joins file tensors along its inputs"
    return [slot for part in parts for slot in _expert_slots(module, leaf, weight, part, turned)], ""


def _slot(module: nn.Module, leaf: str, part: Part, turned: bool) -> Slot:
    place = View(None, turned, part.place.start, part.place.rows)
    return Slot(part.key, part.key, module, leaf, place, View(transposed=turned))


def _expert_slots(module: nn.Module, leaf: str, weight: Tensor, part: Part, turned: bool) -> list[Slot]:
    if part.place.index is not None:
        place = View(part.place.index, turned, part.place.start, part.place.rows)
        return [Slot(part.key, part.key, module, leaf, place, View(transposed=turned))]
    views = [View(index, turned) for index in range(weight.shape[0])]
    return [Slot(f"{part.key}.{view.index}", part.key, module, leaf, view, view) for view in views]


def routers(block: nn.Module) -> set[str]:
    """Paths of what chooses among experts, or weighs them: beside the experts, one output for each or a single one."""
    paths = set()
    for path, parent in block.named_modules():
        counts = [len(weight) for child in parent.children() for weight in _stacked(child)]
        for name, child in parent.named_modules() if counts else []:
            weight = getattr(child, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0] in (1, *counts):
                paths.add(f"{path}.{name}" if path else name)
    return paths


def _stacked(module: nn.Module) -> list[Tensor]:
    """The parameters of ``module`` that hold one matrix per expert."""
    if is_convolution(module):
        return []
    return [weight for weight in module.parameters(recurse=False) if weight.dim() == 3]


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)
