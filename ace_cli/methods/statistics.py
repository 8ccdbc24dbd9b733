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

from ace_cli.core.workers import ONE, Workers
from ace_cli.kernels.threads import each_columns, each_piece

if TYPE_CHECKING:
    from torch import Tensor


#: Workers share a sum of matrix products from so many tokens of a call on: of each token a number takes two operations,
#: and to be sent 4 bytes, which take as long as 150 tokens on a core, 3,200 on a GPU across a fast network (counted).
SHARED_TOKENS, _ON_GPUS = 1024, 8192


def accumulated(axes: str, join: Callable[[Any, Any], Any] = operator.add) -> Any:
    """A dataclass field that holds what a statistic has seen: a tensor, or a list of such tensors.

    ``axes``: a letter for each axis, I for the slot's inputs: what ``Statistic.reordered`` reorders. ``join``: what
    earlier and what later tokens gave -> what both give; it may change the first, never the second; of tensors it goes
    element by element, and workers join some elements each.
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
    #: True if it is fed with the inputs that the dense model gives the slot for the same tokens, in place of outputs.
    needs_dense = False
    #: True if workers can share it: each computes a part, in products of shapes that do not depend on their number.
    shared = False
    #: True if what it holds of a row of the weight is of use for that row alone.
    of_rows = False
    tokens = 0
    #: Who computes it together.
    workers = ONE

    def share_with(self, workers: Workers) -> None:
        """Before the first update: ``workers`` see the same tokens, and each is to compute a part until ``gather``.

        A statistic that is not ``shared``, or that sees too few tokens at first, is computed by all. Workers that are
        ``apart`` see other tokens each, and all of them put together what they saw, also one that saw nothing.
        """
        if workers.apart or (self.shared and not self.tokens):
            self.workers = workers

    def gather(self) -> None:
        """Take the parts of the others: from now on it is as if this worker had computed all of it, bit for bit.

        Of workers that are apart: as if it had seen the tokens of all, the same bytes for every one of them.
        """
        workers, self.workers = self.workers, ONE
        if workers.apart:
            self._join(workers)
        elif workers.several and self.tokens:
            self._gather(workers)

    def _join(self, workers: Workers) -> None:
        """What ``merge`` would make of what all of them saw, in the order of their numbers."""
        mine = {name: vars(self)[name] for name in self._axes()} if self.tokens else {}
        everyone: list[Any] = workers.told([self.tokens, {name: _form(value) for name, value in mine.items()}])
        saw = {rank: forms for rank, (tokens, forms) in enumerate(everyone) if tokens}
        joins: dict[str, Any] = {each.name: each.metadata.get("join") for each in dataclasses.fields(cast(Any, self))}
        for name, form in next(iter(saw.values()), {}).items():
            if isinstance(form, list):  # tensors, to be put one after the other
                held = {rank: mine[name] if rank == workers.rank else _empty(saw[rank][name]) for rank in saw}
                parts = [(part.contiguous(), rank) for rank in saw for part in held[rank]]
                workers.spread(parts)
                setattr(self, name, [part for part, _ in parts])
            else:
                setattr(self, name, workers.joined(mine[name] if mine else _empty(form), joins[name], [*saw]))
        self.tokens = sum(tokens for tokens, _ in everyone)

    def _gather(self, workers: Workers) -> None:
        raise NotImplementedError

    def pays(self, tokens: int, device: str) -> bool:
        """Whether the parts of others are sent sooner than computed, of so many tokens on a cpu or cuda ``device``."""
        return tokens >= SHARED_TOKENS

    def _sharing(self, x_TI: Tensor) -> Workers:
        """Who shares it, as the first call decides."""
        if self.workers.apart:
            return ONE
        if not self.tokens and not self.pays(len(x_TI), x_TI.device.type):
            self.workers = ONE
        return self.workers

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

    def sent(self, rows: int, columns: int) -> int:
        """Bytes that workers who share it gather, for a weight (rows, columns)."""
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


def _form(value: Any) -> Any:
    """Shape, dtype and kind of device of a tensor, JSON; of a list a list of them."""
    if isinstance(value, list):
        return [_form(each) for each in value]
    return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch."), "device": value.device.type}


def _empty(form: Any) -> Any:
    """A tensor of this form, or a list of such."""
    import torch

    if isinstance(form, list):
        return [_empty(each) for each in form]
    return torch.empty(form["shape"], dtype=getattr(torch, form["dtype"]), device=form["device"])


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

    def share_with(self, workers: Workers) -> None:
        """``workers`` see the same, and each computes a part of what they can share, or are apart; until ``gather``."""
        for statistic in self:
            statistic.share_with(workers)

    def gather(self, own_rows: bool) -> None:
        """Take the other workers' parts; ``own_rows``: not those of rows of the weight, which only others look at.

        Workers that are apart have no rows of their own yet.
        """
        for statistic in self:
            if not (own_rows and statistic.of_rows) or statistic.workers.apart:
                statistic.gather()

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

    Workers compute the rows that they will score. Where all rows are to be ranked together, they are gathered: 4 O I
    bytes. On a CPU products have so many rows for any number of workers, which costs one alone up to a twentieth.
    """

    kind: str = "second"
    total_OI: Tensor = accumulated("OI")
    needs_output = True
    of_rows = True

    @property
    def shared(self) -> bool:  # type: ignore[override]
        """Unless it is the same for every row."""
        return self.kind != "token"

    def flops(self, tokens: int, rows: int, columns: int) -> int:
        return 0 if self.kind == "token" else 2 * tokens * rows * columns

    def nbytes(self, tokens: int, rows: int, columns: int) -> int:
        return 0 if self.kind == "token" else 4 * rows * columns

    def sent(self, rows: int, columns: int) -> int:
        return self.nbytes(0, rows, columns)

    def update(self, x_TI: Tensor, y_TO: Tensor, weight_OI: Tensor) -> None:
        import torch

        x_TI, y_TO = x_TI.float(), y_TO.float()
        A_T1 = _sizes(y_TO)
        has_direction_T1 = 1e-12 * _sizes(x_TI) * weight_OI.norm(dtype=torch.float32).square() < A_T1
        if not self.tokens:
            rows = 1 if self.kind == "token" else y_TO.shape[1]
            dtype = torch.float64 if self.kind == "exact" else torch.float32
            self.total_OI = x_TI.new_zeros((rows, x_TI.shape[1]), dtype=dtype)
        pieces = _row_pieces(self._sharing(x_TI), y_TO)
        self.tokens += len(x_TI)
        factor_T1 = (1 / A_T1).masked_fill_(~has_direction_T1, 0.0)
        for first in range(0, len(x_TI), _PRODUCT_TOKENS):
            tokens = slice(first, first + _PRODUCT_TOKENS)
            if self.kind == "token":
                self.total_OI += x_TI[tokens].square().mul_(factor_T1[tokens]).sum(0)
            else:
                self._add(x_TI[tokens], y_TO[tokens], factor_T1[tokens], weight_OI, pieces)

    def _add(self, x_TI: Tensor, y_TO: Tensor, factor_T1: Tensor, weight_OI: Tensor, pieces: Iterable[slice]) -> None:
        """Rows in ``pieces``; ``factor_T1`` is 1 / A_t, or 0 where there is no direction."""
        some = factor_T1[:, 0] > 0
        of_inputs_TI = {"signed": x_TI, "absolute": x_TI.abs()}.get(self.kind)
        if of_inputs_TI is None:
            of_inputs_TI = x_TI[some] if self.kind == "exact" else x_TI.square().mul_(factor_T1)
        for rows in pieces:
            y_TR = y_TO[:, rows]
            if self.kind == "exact":
                self.total_OI[rows] += _cosine_loss(of_inputs_TI, y_TR[some], 1 / factor_T1[some], weight_OI[rows])
            elif self.kind == "signed":
                self.total_OI[rows].addmm_((y_TR * factor_T1).T, of_inputs_TI)
            elif self.kind == "absolute":
                self.total_OI[rows].addmm_(y_TR.abs().mul_(factor_T1).T, of_inputs_TI)
            else:
                across_TR = y_TR.square().mul_(factor_T1).neg_().add_(1).clamp_(min=0)
                self.total_OI[rows].addmm_(across_TR.T, of_inputs_TI)

    def _gather(self, workers: Workers) -> None:
        _gather_rows(self.total_OI, workers)


def _gather_rows(total_OI: Tensor, workers: Workers) -> None:
    """Of a matrix that ``_row_pieces`` deals out."""
    of_workers = workers.pieces(len(total_OI), total_OI.device.type)
    workers.spread([
        (total_OI[pieces[0].start : pieces[-1].stop], rank) for rank, pieces in enumerate(of_workers) if pieces
    ])  # fmt: skip


#: Rows of a product: one of fewer takes longer.
ROWS = 512


def _row_pieces(workers: Workers, y_TO: Tensor) -> list[slice]:
    """Those that hold the rows of this worker; on a CPU the same whoever shares them."""
    count, device = y_TO.shape[1], y_TO.device.type
    mine = workers.pieces(count, device)[workers.rank]
    if not mine:
        return []
    first, last, step = mine[0].start, mine[-1].stop, ROWS if device == "cpu" else count
    if device == "cpu":
        first, last = first // step * step, min(count, -(-last // step) * step)
    return [slice(start, min(start + step, last)) for start in range(first, last, step)]


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

    Workers share its parts; gathering them costs 2 I^2 bytes, and a copy of as many parts as there are workers.
    """

    shared = True
    unit_tokens: bool = False
    total_II: Tensor = accumulated("II", lambda earlier, later: earlier.add_(later))
    factors: Any = field(default=None, init=False, compare=False, repr=False)

    def flops(self, tokens: int, rows: int, columns: int) -> int:
        return tokens * columns**2

    def nbytes(self, tokens: int, rows: int, columns: int) -> int:
        return 4 * columns**2

    def sent(self, rows: int, columns: int) -> int:
        return 2 * columns**2

    def pays(self, tokens: int, device: str) -> bool:
        return tokens >= (SHARED_TOKENS if device == "cpu" else _ON_GPUS)

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
        workers = self._sharing(x_TI)
        self.add(len(x_TI), total_II=_symmetric(x_TI, workers))
        self.factors = None  # of fewer tokens

    def _gather(self, workers: Workers) -> None:
        parts, total_II = _parts(len(self.total_II)), self.total_II
        for start in range(0, len(parts), workers.size):  # one part of each: memory is theirs
            numbers = range(start, min(start + workers.size, len(parts)))
            sent = [total_II[parts[number], parts[number].start :].contiguous() for number in numbers]
            workers.spread([(part, _owner(number, workers.size)) for part, number in zip(sent, numbers, strict=True)])
            for part, number in zip(sent, numbers, strict=True):
                total_II[parts[number], parts[number].start :] = part
        _mirror(total_II, parts)

    def _join(self, workers: Workers) -> None:
        """What lies on and above the diagonal: half of it."""
        import torch

        inputs = max(workers.told(len(self.total_II) if self.tokens else 0))
        parts = _parts(inputs)
        if self.tokens:
            self.total_II = torch.cat([self.total_II[part, part.start :].flatten() for part in parts])
        super()._join(workers)
        if self.tokens:
            lengths = [(part.stop - part.start) * (inputs - part.start) for part in parts]
            pieces = torch.split(self.total_II, lengths)
            self.total_II = self.total_II.new_empty((inputs, inputs))
            for part, piece in zip(parts, pieces, strict=True):
                self.total_II[part, part.start :] = piece.view(-1, inputs - part.start)
            _mirror(self.total_II, parts)


#: Inputs of a part of a Gram matrix: few enough that little below the diagonal is computed, enough for a fast product.
_PART = 128


def _parts(inputs: int) -> list[slice]:
    count = max(1, inputs // _PART)
    return [slice(part * inputs // count, (part + 1) * inputs // count) for part in range(count)]


def _owner(number: int, workers: int) -> int:
    """Whose part this is: 0 1 2 2 1 0 0 1 2, for the first ones are the longest."""
    turn, place = divmod(number, workers)
    return workers - 1 - place if turn % 2 else place


def _symmetric(x_TI: Tensor, workers: Workers) -> Tensor:
    """x^T x, (I, I): the parts on and above the diagonal, and their mirror images.

    Of several ``workers`` each has its own parts, without mirror images, and zeros.
    """
    import torch

    parts = _parts(x_TI.shape[1])
    total_II = (x_TI.new_zeros if workers.several else x_TI.new_empty)((x_TI.shape[1], x_TI.shape[1]))
    for number, part in enumerate(parts):
        if _owner(number, workers.size) == workers.rank:
            torch.mm(x_TI[:, part].T, x_TI[:, part.start :], out=total_II[part, part.start :])
    if not workers.several:
        _mirror(total_II, parts)
    return total_II


def _mirror(total_II: Tensor, parts: list[slice]) -> None:
    for part in parts:
        total_II[part.stop :, part] = total_II[part, part.stop :].T


@dataclass(unsafe_hash=True)
class Lag(Statistic):
    """``total_II`` = sum over tokens of (d_t - x_t) x_t^T, float32 (I, I): d_t is what the dense model has where the
    pruned one has the input x_t. Exactly zero while nothing before the slot has changed. ``dense_I`` = sum of d_t^2.

    Workers share the rows of the matrix; gathering them costs 4 I^2 bytes.
    """

    shared = True
    needs_dense = True
    total_II: Tensor = accumulated("II", lambda earlier, later: earlier.add_(later))
    dense_I: Tensor = accumulated("I")

    def flops(self, tokens: int, rows: int, columns: int) -> int:
        return 2 * tokens * columns**2

    def nbytes(self, tokens: int, rows: int, columns: int) -> int:
        return 4 * columns * (columns + 1)

    def sent(self, rows: int, columns: int) -> int:
        return 4 * columns**2

    def pays(self, tokens: int, device: str) -> bool:
        return tokens >= (SHARED_TOKENS if device == "cpu" else _ON_GPUS)

    def update(self, x_TI: Tensor, y_TO: Tensor, weight_OI: Tensor) -> None:
        """``y_TO`` is d, (T, I)."""
        x_TI = x_TI.float()
        dense_TI = y_TO.float()
        behind_TI = dense_TI - x_TI
        pieces = _row_pieces(self._sharing(x_TI), behind_TI)
        total_II = x_TI.new_zeros((x_TI.shape[1], x_TI.shape[1]))
        for rows in pieces:
            total_II[rows] = behind_TI[:, rows].T @ x_TI
        self.add(len(x_TI), total_II=total_II, dense_I=dense_TI.square().sum(0))

    def _gather(self, workers: Workers) -> None:
        _gather_rows(self.total_II, workers)
