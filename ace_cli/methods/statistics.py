"""What a method remembers of a slot's inputs: small accumulators, the same for any split of the tokens.

Shapes: T tokens, I inputs, O outputs. Two statistics of the same kind and options are equal, so a metric and a repair
that need the same one share it. Vectors are summed in float64 (a slot sees up to millions of tokens), matrices in
float32 (they are the size of a weight or more).
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from ace_cli.kernels.threads import each_columns, each_piece

if TYPE_CHECKING:
    from torch import Tensor


def accumulated(axes: str, join: Callable[[Any, Any], Any] = operator.add) -> Any:
    """A dataclass field that holds what a statistic has seen: a tensor, or a list of such tensors.

    ``axes``: a letter for each axis, I for the slot's inputs: what ``Statistic.reordered`` reorders. ``join``: what
    earlier and what later tokens gave -> what both give; it may change the first, never the second.
    """
    return field(init=False, compare=False, repr=False, metadata={"axes": axes, "join": join})


class Statistic:
    """An accumulator over the calls of one slot. ``tokens`` counts what it has seen.

    A dataclass: options are plain fields, what is summed up is declared with ``accumulated``.
    """

    #: True if the slot's output is needed; such a statistic cannot be shared between slots that read one input.
    needs_output = False
    #: True if it is fed with the gradient of the slot's outputs, in their place: see ace_cli.methods.gradients.
    needs_backward = False
    tokens = 0

    def update(self, x_TI: Tensor, y_TO: Tensor, weight_OI: Tensor) -> None:
        """Add T tokens: inputs (T, I), outputs (T, O) with bias and the slot's weight (O, I), in the compute dtype.

        What is summed is at least float32.
        """
        raise NotImplementedError

    def flops(self, tokens: int, rows: int, columns: int) -> int:
        """Operations in matrix products for a weight (rows, columns); what only passes over the inputs counts as 0."""
        return 0

    def nbytes(self, tokens: int, rows: int, columns: int) -> int:
        """What it holds for a weight (rows, columns), vectors apart."""
        return 0

    def merge(self, other: Self) -> None:
        """Add what ``other``, of the same kind and options, has seen of other tokens; ``other`` stays as it is.

        TypeError for a statistic of another kind.
        """
        if type(other) is not type(self) or other != self:
            raise TypeError(f"{self!r} cannot be merged with {other!r}")
        if other.tokens:
            seen = {name: vars(other)[name] for name in other._axes()}
            self.add(other.tokens, **(seen if self.tokens else copy.deepcopy(seen)))  # later sums are made in place

    def reordered(self, order_I: Tensor) -> Self:
        """What it would have seen of x[order_I]."""
        other = copy.copy(self)
        for name, axes in self._axes().items():
            value = vars(self)[name]
            for axis in [axis for axis, letter in enumerate(axes) if letter == "I"]:
                value = _reorder(value, axis, order_I)
            setattr(other, name, value)
        return other

    def add(self, tokens: int, **seen: Any) -> None:
        """Join what ``tokens`` more tokens gave, by the names of the fields, to what there is."""
        declared = {each.name: each.metadata for each in dataclasses.fields(cast(Any, self))}
        for name, value in seen.items():
            setattr(self, name, declared[name]["join"](vars(self)[name], value) if self.tokens else value)
        self.tokens += tokens

    def _axes(self) -> dict[str, str]:
        """The fields that hold what was seen -> the letters of their axes. TypeError for a tensor not declared."""
        declared = {each.name: each.metadata.get("axes") for each in dataclasses.fields(cast(Any, self))}
        for name, value in vars(self).items():
            if declared.get(name) is None and _has_axes(value):
                raise TypeError(f"{type(self).__name__}.{name} holds a tensor: declare it with accumulated(...)")
        return {name: axes for name, axes in declared.items() if axes is not None and name in vars(self)}


def _has_axes(value: Any) -> bool:
    return hasattr(value, "index_select") or (isinstance(value, list) and any(map(_has_axes, value)))


def _reorder(value: Any, axis: int, order_I: Tensor) -> Any:
    if isinstance(value, list):
        return [_reorder(each, axis, order_I) for each in value]
    return value.index_select(axis, order_I.to(value.device))


S = TypeVar("S", bound=Statistic)


class Seen:
    """The statistics of one slot; ``seen[SecondMoment()]`` gives the accumulated one."""

    def __init__(self, wanted: Iterable[Statistic]) -> None:
        self._state = {statistic: copy.copy(statistic) for statistic in wanted}

    def __getitem__(self, wanted: S) -> S:
        return cast(S, self._state[wanted])

    def __iter__(self) -> Iterator[Statistic]:
        return iter(self._state.values())

    def reordered(self, order_I: Tensor) -> Seen:
        """The statistics of the inputs in another order, new input k = old input order_I[k]."""
        other = Seen(())
        other._state = {wanted: statistic.reordered(order_I) for wanted, statistic in self._state.items()}
        return other

    def take(self, other: Seen) -> None:
        """Use ``other``'s statistics, all of them, in place of equal ones, or beside others."""
        self._state = {**self._state, **other._state}

    def share(self, other: Seen) -> None:
        """Use ``other``'s input-only statistics: both slots read the same input."""
        for wanted, statistic in other._state.items():
            if not statistic.needs_output:
                self._state[wanted] = statistic


#: Tokens summed in float32 before they are added to a float64 sum; some columns of so many fit a core's own cache.
_TOKENS = 2048


def _each_part(x_TI: Tensor, add: Callable[[Tensor, slice, slice], None]) -> None:
    """``add(part, tokens, inputs)`` for parts that cover x, float32 and not to be changed; on all cores of a CPU.

    The parts of the same inputs come one after the other.
    """
    if x_TI.device.type != "cpu":
        add(x_TI.float(), slice(None), slice(None))
        return

    def some(inputs: slice) -> None:
        for first in range(0, len(x_TI), _TOKENS):
            tokens = slice(first, first + _TOKENS)
            add(x_TI[tokens, inputs].float(), tokens, inputs)

    each_columns(min(len(x_TI), _TOKENS), x_TI.shape[1], some)


def _sums(x_TI: Tensor, count: int) -> Tensor:
    """Zeros, float64 (count, I)."""
    import torch

    return x_TI.new_zeros((count, x_TI.shape[1]), dtype=torch.float64)


@dataclass(unsafe_hash=True)
class SecondMoment(Statistic):
    """``total_I`` = sum over tokens of x_tj^2, float64 (I,). Wanda's statistic."""

    total_I: Tensor = accumulated("I")

    def update(self, x_TI: Tensor, y_TO: Tensor, weight_OI: Tensor) -> None:
        (total_I,) = _sums(x_TI, 1)

        def add(part_TI: Tensor, tokens: slice, inputs: slice) -> None:
            total_I[inputs] += part_TI.square().sum(0)

        _each_part(x_TI, add)
        self.add(len(x_TI), total_I=total_I)

    @property
    def mean_I(self) -> Tensor:
        """E[x_j^2], float64 (I,)."""
        return self.total_I / self.tokens


@dataclass(unsafe_hash=True)
class Mean(Statistic):
    """``total_I`` = sum over tokens of x_tj, float64 (I,)."""

    total_I: Tensor = accumulated("I")

    def update(self, x_TI: Tensor, y_TO: Tensor, weight_OI: Tensor) -> None:
        (total_I,) = _sums(x_TI, 1)

        def add(part_TI: Tensor, tokens: slice, inputs: slice) -> None:
            total_I[inputs] += part_TI.double().sum(0)

        _each_part(x_TI, add)
        self.add(len(x_TI), total_I=total_I)

    @property
    def mean_I(self) -> Tensor:
        """E[x_j], float64 (I,)."""
        return self.total_I / self.tokens


@dataclass(unsafe_hash=True)
class Size(Statistic):
    """``total_I`` = sum over tokens of |x_tj|, float64 (I,). ASVD's statistic."""

    total_I: Tensor = accumulated("I")

    def update(self, x_TI: Tensor, y_TO: Tensor, weight_OI: Tensor) -> None:
        (total_I,) = _sums(x_TI, 1)

        def add(part_TI: Tensor, tokens: slice, inputs: slice) -> None:
            total_I[inputs] += part_TI.abs().double().sum(0)

        _each_part(x_TI, add)
        self.add(len(x_TI), total_I=total_I)

    @property
    def mean_I(self) -> Tensor:
        """E|x_j|, float64 (I,)."""
        return self.total_I / self.tokens


@dataclass(unsafe_hash=True)
class SquareMoments(Statistic):
    """First and second moment of the squared activation v = x^2.

    ``first_I`` = sum_t v, ``second_I`` = sum_t v^2, ``largest`` = max v, ``above_one`` = count of v >= 1.
    float64, because x^4 spans sixteen orders of magnitude between ordinary and massive activations.
    """

    first_I: Tensor = accumulated("I")
    second_I: Tensor = accumulated("I")
    largest: Tensor = accumulated("", lambda earlier, later: earlier.maximum(later))
    above_one: Tensor = accumulated("")

    def update(self, x_TI: Tensor, y_TO: Tensor, weight_OI: Tensor) -> None:
        first_I, second_I, above_I, largest_I = _sums(x_TI, 4)

        def add(part_TI: Tensor, tokens: slice, inputs: slice) -> None:
            v_TI = part_TI.square()
            above_I[inputs] += (v_TI >= 1).sum(0)
            largest_I[inputs] = largest_I[inputs].maximum(v_TI.amax(0))
            first_I[inputs] += v_TI.sum(0)
            second_I[inputs] += v_TI.square_().sum(0)

        _each_part(x_TI, add)
        above, largest = above_I.sum(), largest_I.max()
        self.add(len(x_TI), first_I=first_I, second_I=second_I, largest=largest, above_one=above)


@dataclass(unsafe_hash=True)
class ShareMoments(Statistic):
    """First and second moment of u = x_tj^2 / ||x_t||^2, the share of an input in the size of its token.

    ``first_I`` = sum_t u, ``second_I`` = sum_t u^2, float64. No scale of a token changes u; one of size 0 adds nothing.
    """

    first_I: Tensor = accumulated("I")
    second_I: Tensor = accumulated("I")

    def update(self, x_TI: Tensor, y_TO: Tensor, weight_OI: Tensor) -> None:
        first_I, second_I = _sums(x_TI, 2)
        size_T1 = _sizes(x_TI)

        def add(part_TI: Tensor, tokens: slice, inputs: slice) -> None:
            u_TI = part_TI.square().div_(size_T1[tokens])
            first_I[inputs] += u_TI.sum(0)
            second_I[inputs] += u_TI.square_().sum(0)

        _each_part(x_TI, add)
        self.add(len(x_TI), first_I=first_I, second_I=second_I)


def _sizes(x_TI: Tensor) -> Tensor:
    """||x_t||^2, infinite where it is 0, float32 (T, 1)."""
    import torch

    size_T1 = x_TI.new_empty((len(x_TI), 1), dtype=torch.float32)

    def some(rows: slice) -> None:
        size_T1[rows] = x_TI[rows].float().square().sum(1, keepdim=True)

    if x_TI.device.type == "cpu":
        each_piece(len(x_TI), x_TI.shape[1], some)
    else:
        some(slice(None))
    return size_T1.masked_fill_(size_T1 == 0, float("inf"))


@dataclass(unsafe_hash=True)
class TokenSquares(Statistic):
    """Every squared input, float32 (T, I), for forms whose scale is known only after the last token.

    Costs T x I x 4 bytes a slot: meant for short calibrations.
    """

    _chunks_TI: list[Tensor] = accumulated("TI")

    def nbytes(self, tokens: int, rows: int, columns: int) -> int:
        return 4 * tokens * columns

    def update(self, x_TI: Tensor, y_TO: Tensor, weight_OI: Tensor) -> None:
        self.add(len(x_TI), _chunks_TI=[x_TI.float().square()])

    @property
    def squares_TI(self) -> Tensor:
        """x_tj^2, float32 (T, I)."""
        import torch

        return torch.cat(self._chunks_TI)


#: Tokens of one matrix product: what is made of them stays in the caches, and the sum is not read too often.
_PRODUCT_TOKENS = 512


@dataclass(unsafe_hash=True)
class CosineTerm(Statistic):
    """``total_OI``: what removing one weight does to the direction of the output a = W x + b (methods of CosP).

    With A_t = ||a_t||^2, one matrix product of O(T O I) each, in float32:

    * ``signed``   sum_t (a_ti / A_t) x_tj                 first order, as in the paper's digest
    * ``absolute`` sum_t |a_ti| / A_t |x_tj|               the same without cancellation
    * ``second``   sum_t (1 - a_ti^2 / A_t) x_tj^2 / A_t   exact second order of 2 (1 - cos) / W_ij^2
    * ``token``    sum_t x_tj^2 / A_t                     its limit for A_t >> a_ti^2, the same for every row: (1, I)
    * ``exact``    sum_t 1 - cos(a_t, a_t - W_ij x_tj e_i)  the loss itself; element by element, slow

    A token whose output has cancelled, A_t <= 1e-12 ||W||^2 ||x_t||^2, has no direction: it adds nothing.
    """

    kind: str = "second"
    total_OI: Tensor = accumulated("OI")
    needs_output = True

    def flops(self, tokens: int, rows: int, columns: int) -> int:
        return 0 if self.kind == "token" else 2 * tokens * rows * columns

    def nbytes(self, tokens: int, rows: int, columns: int) -> int:
        return 0 if self.kind == "token" else 4 * rows * columns

    def update(self, x_TI: Tensor, y_TO: Tensor, weight_OI: Tensor) -> None:
        import torch

        x_TI, y_TO = x_TI.float(), y_TO.float()
        A_T1 = _sizes(y_TO)
        has_direction_T1 = 1e-12 * _sizes(x_TI) * weight_OI.norm(dtype=torch.float32).square() < A_T1
        if not self.tokens:
            rows = 1 if self.kind == "token" else y_TO.shape[1]
            dtype = torch.float64 if self.kind == "exact" else torch.float32
            self.total_OI = x_TI.new_zeros((rows, x_TI.shape[1]), dtype=dtype)
        self.tokens += len(x_TI)
        factor_T1 = (1 / A_T1).masked_fill_(~has_direction_T1, 0.0)
        for first in range(0, len(x_TI), _PRODUCT_TOKENS):
            tokens = slice(first, first + _PRODUCT_TOKENS)
            self._add(x_TI[tokens], y_TO[tokens], factor_T1[tokens], weight_OI)

    def _add(self, x_TI: Tensor, y_TO: Tensor, factor_T1: Tensor, weight_OI: Tensor) -> None:
        """``factor_T1`` is 1 / A_t, or 0 where there is no direction."""
        if self.kind == "token":
            self.total_OI += x_TI.square().mul_(factor_T1).sum(0)
        elif self.kind == "signed":
            self.total_OI.addmm_((y_TO * factor_T1).T, x_TI)
        elif self.kind == "absolute":
            self.total_OI.addmm_(y_TO.abs().mul_(factor_T1).T, x_TI.abs())
        elif self.kind == "exact":
            some = factor_T1[:, 0] > 0
            self.total_OI += _cosine_loss(x_TI[some], y_TO[some], 1 / factor_T1[some], weight_OI)
        else:
            across_TO = y_TO.square().mul_(factor_T1).neg_().add_(1).clamp_(min=0)
            self.total_OI.addmm_(across_TO.T, x_TI.square().mul_(factor_T1))


def _cosine_loss(x_TI: Tensor, y_TO: Tensor, A_T1: Tensor, weight_OI: Tensor) -> Tensor:
    """sum_t 1 - cos(theta), tan(theta) = |d| sqrt(A - a_i^2) / (A - a_i d), d = W_ij x_tj; float64 (O, I)."""
    total_OI = weight_OI.double() * 0
    for x_I, y_O, A_1 in zip(x_TI.double(), y_TO.double(), A_T1.double(), strict=True):
        removed_OI = weight_OI * x_I
        along_OI = A_1 - y_O[:, None] * removed_OI
        across_OI = removed_OI.abs() * (A_1 - y_O.square()).clamp(min=0).sqrt()[:, None]
        # 1 - cos = 2 sin^2(theta / 2): keeps the digits that 1 - cos loses for the tiny angles met here.
        total_OI += 2 * (across_OI.atan2(along_OI) / 2).sin().square()
    return total_OI


@dataclass(unsafe_hash=True)
class Gram(Statistic):
    """``total_II`` = sum over tokens of x_t x_t^T, float32 (I, I). ``factors``: what a repair made of it, once.

    ``unit_tokens``: of x_t / ||x_t||, every token brought to size 1; one of size 0 adds nothing.
    """

    unit_tokens: bool = False
    total_II: Tensor = accumulated("II", lambda earlier, later: earlier.add_(later))
    factors: Any = field(default=None, init=False, compare=False, repr=False)

    def flops(self, tokens: int, rows: int, columns: int) -> int:
        return tokens * columns**2

    def nbytes(self, tokens: int, rows: int, columns: int) -> int:
        return 4 * columns**2

    def reordered(self, order_I: Tensor) -> Self:
        other = super().reordered(order_I)
        other.factors = None  # of the old order
        return other

    def merge(self, other: Self) -> None:
        super().merge(other)
        self.factors = None  # of fewer tokens

    def update(self, x_TI: Tensor, y_TO: Tensor, weight_OI: Tensor) -> None:
        x_TI = x_TI.float()
        if self.unit_tokens:
            size_T1 = x_TI.norm(dim=1, keepdim=True)
            x_TI = x_TI / size_T1.masked_fill_(size_T1 == 0, float("inf"))
        self.add(len(x_TI), total_II=_symmetric(x_TI))
        self.factors = None  # of fewer tokens


#: Inputs of a part of a Gram matrix: few enough that little below the diagonal is computed, enough for a fast product.
_PART = 128


def _symmetric(x_TI: Tensor) -> Tensor:
    """x^T x, (I, I): the parts on and above the diagonal, and their mirror images."""
    import torch

    inputs = x_TI.shape[1]
    parts = max(1, inputs // _PART)
    total_II = x_TI.new_empty((inputs, inputs))
    for part in range(parts):
        first, last = part * inputs // parts, (part + 1) * inputs // parts
        torch.mm(x_TI[:, first:last].T, x_TI[:, first:], out=total_II[first:last, first:])
        total_II[last:, first:last] = total_II[first:last, last:].T
    return total_II
