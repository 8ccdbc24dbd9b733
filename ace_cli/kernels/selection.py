"""Exact selection: which scores stay, the same on every device, ties by position.

Shapes: R rows, N scores of a row. On a CPU the arithmetic is numpy's, whose comparisons and order statistics use vector
instructions where torch's do not (four times faster than torch's kthvalue, fourteen than a stable sort); elsewhere it
is torch's, without waiting for the device. The operators are the same, so the functions are written once. Large
weights on a CPU are pruned by compiled loops; the bits are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ace_cli.kernels.loops import load
from ace_cli.kernels.threads import LARGEST_PIECE, filled

if TYPE_CHECKING:
    from torch import Tensor

#: A numpy array or a torch tensor.
Array = Any

#: Scores handled at a time where it is not a CPU: few large pieces.
_PIECE_ON_DEVICE = 1 << 24

#: Elements of a weight from which on compiled loops are worth what loading them takes: 0.3 s and 150 MB.
LARGE = 1 << 23

#: The widest group that they take.
_COMPARED = 64


def keep_largest(score_RN: Tensor, k: int) -> Tensor:
    """bool (R, N): all but the k smallest of each row; of equal scores those with smaller indices go first."""
    if k == 0:
        return score_RN.new_ones(score_RN.shape, dtype=_torch().bool)
    return _by_rows(score_RN, lambda chunk_RN: _without_smallest(chunk_RN, k))


def keep_n_of_m(score_RN: Tensor, n: int, m: int) -> Tensor:
    """bool (R, N): the n largest of every m consecutive scores of a row; of equal scores the later ones stay."""
    if m > 16:
        return _keep_n_of_m_sorted(score_RN, n, m)
    return _by_rows(score_RN, lambda chunk_RN: _beating_all_but(chunk_RN, n, m))


@dataclass(frozen=True, eq=False)
class Scaled:
    """The scores |W_ij| f_j of any rows; f is float32 (I,). Compiled loops never write them to memory."""

    factor_I: Tensor

    def __call__(self, rows_RI: Tensor, _: slice) -> Tensor:
        return rows_RI.abs().mul_(self.factor_I)


def loops_for(numel: int) -> ModuleType | None:
    """The compiled loops, where they exist and a weight of so many elements is worth loading them; None elsewhere."""
    return None if numel < LARGE else load("weight_loops")


def zero_smallest(score: Tensor | Scaled, k: int, weight_RN: Tensor, loops: ModuleType | None) -> bool:
    """``keep_largest``, in place: +0.0 in what it does not keep of ``weight_RN``. False if a score is not finite.

    Both lie in a CPU's memory, row by row; the weight has any float dtype.
    """
    score_RN = _written(score, weight_RN, loops)
    if loops is None or k == 0:
        return _zero(score_RN, keep_largest(score_RN, k), weight_RN)
    score_RN = score_RN.numpy()
    return bool(loops.zero_below(score_RN, _kth_smallest(score_RN, k)[:, 0], score_RN.shape[1] - k, _bits(weight_RN)))


def zero_n_of_m(score: Tensor | Scaled, n: int, m: int, weight_RN: Tensor, loops: ModuleType | None) -> bool:
    """``keep_n_of_m``, in place, as ``zero_smallest``."""
    if loops is None or m > _COMPARED:
        score_RN = _written(score, weight_RN, loops)
        return _zero(score_RN, keep_n_of_m(score_RN, n, m), weight_RN)
    if isinstance(score, Scaled) and _scales(weight_RN):
        return bool(loops.zero_scaled_n_of_m(_bits(weight_RN), score.factor_I.numpy(), n, m))
    return bool(loops.zero_n_of_m(_written(score, weight_RN, loops).numpy(), n, m, _bits(weight_RN)))


def count_nonzero(values: Tensor, width: int, loops: ModuleType | None) -> tuple[int, int]:
    """How many of ``values`` (any float dtype, on a CPU) are not 0, and the most in any ``width`` consecutive ones.

    In one thread: a second team of torch's threads, beside one that computes, would slow that one down twofold.
    """
    bits_N = _bits(values.contiguous()).reshape(-1)
    if loops is not None:
        nonzero, most = loops.count_nonzero(bits_N, width)
        return nonzero, most
    numpy = _numpy()
    flag_N = (bits_N & numpy.iinfo(bits_N.dtype).max) != 0  # either zero, whatever its sign
    if width in (4, 8):  # the bytes of a group are one integer: multiplied by 1 1 1 ..., its highest byte is their sum
        wide, ones = (numpy.uint32, 0x01010101) if width == 4 else (numpy.uint64, 0x0101010101010101)
        count_G = flag_N.view(wide) * wide(ones) >> wide(8 * (width - 1))
    else:
        count_G = flag_N.reshape(-1, width).sum(1, dtype=numpy.int32)
    return int(numpy.count_nonzero(flag_N)), int(count_G.max())


def all_finite(values: Tensor) -> bool:
    """Whether none is NaN or Inf. Their sum tells, but for one of finite values that overflows."""
    return math.isfinite(float(values.sum())) or bool(values.isfinite().all())


def _scales(weight_RN: Tensor) -> bool:
    """Whether the loops score weights of this dtype."""
    return weight_RN.dtype in (_torch().bfloat16, _torch().float32)


def _written(score: Tensor | Scaled, weight_RN: Tensor, loops: ModuleType | None) -> Any:
    """The scores themselves, float32 (R, N)."""
    if not isinstance(score, Scaled):
        return score
    if loops is None or not _scales(weight_RN):
        return score(weight_RN.float(), slice(None))
    score_RN = _torch().empty(weight_RN.shape)
    loops.scaled(_bits(weight_RN), score.factor_I.numpy(), score_RN.numpy())
    return score_RN


def _zero(score_RN: Tensor, keep_RN: Tensor, weight_RN: Tensor) -> bool:
    """On the bits: a product of floats would leave -0.0; numpy's of integers is the fastest."""
    bits_RN = _bits(weight_RN)
    bits_RN *= keep_RN.numpy()
    return all_finite(score_RN)


def _bits(values: Tensor) -> Any:
    """Floats as numpy's integers, in the same memory."""
    torch = _torch()
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.view(kinds[values.dtype.itemsize]).numpy()


def _by_rows(score_RN: Tensor, keep: Callable[[Array], Array]) -> Tensor:
    """``keep`` of pieces of rows."""
    torch = _torch()
    if score_RN.device.type != "cpu":
        pieces = torch.split(score_RN, max(1, _PIECE_ON_DEVICE // score_RN.shape[1]))
        return torch.cat([keep(piece_RN) for piece_RN in pieces])  # type: ignore[no-any-return]
    keep_RN = torch.empty(score_RN.shape, dtype=torch.bool)
    source = score_RN.numpy()
    filled(keep_RN.numpy(), lambda rows: keep(source[rows]))
    return keep_RN  # type: ignore[no-any-return]


def _without_smallest(score_RN: Array, k: int) -> Array:
    threshold_R1 = _kth_smallest(score_RN, k)
    keep_RN = score_RN > threshold_R1
    short_R1 = score_RN.shape[1] - k - _count_true(keep_RN)
    if not _is_numpy(score_RN) or short_R1.any():  # a look at the answer would stall a device
        equal_RN = score_RN == threshold_R1  # several share the threshold: the last of them stay
        so_far_RN = equal_RN.cumsum(1)
        keep_RN |= equal_RN & (so_far_RN[:, -1:] - so_far_RN < short_R1)
    return keep_RN


def _kth_smallest(score_RN: Array, k: int) -> Array:
    """The k-th smallest of each row, (R, 1): an order statistic, so any exact algorithm gives the same."""
    if not _is_numpy(score_RN):
        return score_RN.kthvalue(k, dim=1, keepdim=True).values
    return _numpy().partition(score_RN, k - 1, axis=1)[:, k - 1 : k]


def _count_true(flag_RN: Array) -> Array:
    """How many are true in each row, (R, 1)."""
    if _is_numpy(flag_RN):
        return flag_RN.sum(1, dtype="int32", keepdims=True)
    return flag_RN.sum(1, keepdim=True)


def _beating_all_but(score_RN: Array, n: int, m: int) -> Array:
    """A score stays if fewer than n of its group beat it; partners at one distance meet as two shifted vectors."""
    score_N = score_RN.reshape(-1)
    count, byte = len(score_N), "uint8" if _is_numpy(score_N) else _torch().uint8
    partners = _partners(max(LARGEST_PIECE, count), m, None if _is_numpy(score_N) else score_N.device)
    beaten_by_N = _numpy().zeros(count, byte) if _is_numpy(score_N) else score_N.new_zeros(count, dtype=byte)
    for distance in range(1, m):
        together = partners[distance - 1][: count - distance]
        later_wins = (score_N[distance:] >= score_N[:-distance]).view(byte)  # bools would be cast to be added
        later_wins &= together
        beaten_by_N[:-distance] += later_wins
        later_wins ^= together
        beaten_by_N[distance:] += later_wins
    return (beaten_by_N < n).reshape(score_RN.shape)


@lru_cache(maxsize=4)
def _partners(count: int, m: int, device: Any) -> list[Array]:
    """For each distance 1 .. m - 1, which of ``count`` scores has a partner so far behind it in its group, uint8."""
    place = (_numpy().arange(count) if device is None else _torch().arange(count, device=device)) % m
    byte = "uint8" if device is None else _torch().uint8
    return [(place < m - distance).view(byte) for distance in range(1, m)]


def _keep_n_of_m_sorted(score_RN: Tensor, n: int, m: int) -> Tensor:
    """The same by a stable sort, cheaper where m is large."""
    group_GM = score_RN.reshape(-1, m)
    order_GM = group_GM.sort(dim=1, stable=True).indices[:, : m - n]
    keep_GM = group_GM.new_ones(group_GM.shape, dtype=_torch().bool).scatter_(1, order_GM, False)
    return keep_GM.view(score_RN.shape)


def _is_numpy(values: Array) -> bool:
    return isinstance(values, _numpy().ndarray)


def _torch() -> Any:
    import torch

    return torch


def _numpy() -> Any:
    import numpy

    return numpy
