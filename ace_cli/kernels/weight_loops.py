"""Weights zeroed and counted in one pass: numpy and torch take one for each comparison, and Python's lock for each.

Nothing here adds floats, so the results are those of the plain definitions, bit for bit. The width of a group is given
as the length of a tuple, a constant to the compiler.

Shapes: R rows, N weights of a row or of a piece of it, G groups of M.
"""

from __future__ import annotations

from typing import Any

import numpy

from ace_cli.kernels.compiled import Array, compiled

_Group = tuple[int, ...]

#: Groups handled side by side: a vector holds one place of as many.
_GROUPS = 64

#: Scores handled at a time, about: what is made of them stays in a core's first cache.
_CHUNK = 4096

#: A group as narrow as this is counted by a loop of its own, unrolled.
_NARROW = 16


def zero_n_of_m(score_RN: Array, n: int, m: int, bits_RN: Array) -> bool:
    """+0.0 in all but the n largest of every ``m`` scores, of equal ones the later; False if one is not finite.

    ``bits_RN``: the weights, as integers. N is a multiple of ``m``, below 256.
    """
    return bool(_zero_groups(score_RN.reshape(-1), n, (0,) * m, bits_RN.reshape(-1)))


def zero_scaled_n_of_m(bits_RN: Array, factor_N: Array, n: int, m: int) -> bool:
    """The same by the scores of ``scaled``, which are never written to memory."""
    return bool(_zero_scaled_groups(bits_RN, factor_N, n, (0,) * m))


@compiled
def scaled(bits_RN: Array, factor_N: Array, score_RN: Array) -> None:
    """Scores |w| f, float32, of weights in float32, or in bfloat16, which is its upper half."""
    for r in range(len(bits_RN)):
        _scale(bits_RN[r], factor_N, score_RN[r])


@compiled
def zero_below(score_RN: Array, threshold_R: Array, kept: int, bits_RN: Array) -> bool:
    """+0.0 in all but ``kept`` of each row: those above its threshold, then the last at it; else as ``zero_n_of_m``."""
    keep_N = numpy.empty(score_RN.shape[1], numpy.bool_)
    finite = True
    for r in range(len(score_RN)):
        _keep_above(score_RN[r], threshold_R[r], kept, keep_N)
        _zero(bits_RN[r], keep_N)
        finite &= _finite(score_RN[r])
    return finite


def count_nonzero(bits_N: Array, width: int) -> tuple[int, int]:
    """How many floats, ``bits_N`` as integers, are not 0, and the most of them in any ``width`` consecutive ones."""
    magnitude = bits_N.dtype.type(numpy.iinfo(bits_N.dtype).max)
    total, most = _count(bits_N, magnitude, width, (0,) * (width if width <= _NARROW else 0))
    return int(total), int(most)


# --- compiled --------------------------------------------------------------------------------------------------------


@compiled
def _scale(bits_N: Array, factor_N: Array, score_N: Array) -> None:
    magnitude_N = score_N.view(numpy.uint32)
    shift = numpy.uint32(32 - 8 * bits_N.itemsize)
    for i in range(numpy.uint64(bits_N.size)):
        magnitude_N[i] = (numpy.uint32(bits_N[i]) << shift) & numpy.uint32(0x7FFFFFFF)
    for i in range(numpy.uint64(bits_N.size)):
        score_N[i] *= factor_N[i]


@compiled
def _zero(bits_N: Array, keep_N: Array) -> None:
    """On the bits of floats: a product of floats would leave -0.0."""
    for i in range(numpy.uint64(bits_N.size)):
        bits_N[i] *= keep_N[i]


@compiled
def _finite(score_N: Array) -> bool:
    """Of float32: whether no exponent is full."""
    largest = numpy.int32(0)
    bits_N = score_N.view(numpy.int32)
    for i in range(numpy.uint64(bits_N.size)):
        largest = max(largest, bits_N[i] & numpy.int32(0x7FFFFFFF))
    return bool(largest < numpy.int32(0x7F800000))


@compiled
def _keep_groups(score_N: Array, n: int, group: _Group, keep_N: Array) -> None:
    width, groups = numpy.uint64(len(group)), numpy.uint64(_GROUPS)
    turned_MG = numpy.empty((len(group), _GROUPS), numpy.float32)
    beaten_MG = numpy.empty((len(group), _GROUPS), numpy.uint8)
    for first in range(numpy.uint64(0), numpy.uint64(score_N.size) // width, groups):
        count = min(groups, numpy.uint64(score_N.size) // width - first)
        for g in range(count):
            for i in range(width):
                turned_MG[i, g] = score_N[(first + g) * width + i]
        for i in range(width):
            score_G, beaten_G = turned_MG[i], beaten_MG[i]
            for g in range(groups):
                beaten_G[g] = 0
            for j in range(width):
                other_G = turned_MG[j]
                if j > i:
                    for g in range(groups):
                        beaten_G[g] += numpy.uint8(other_G[g] >= score_G[g])
                elif j < i:
                    for g in range(groups):
                        beaten_G[g] += numpy.uint8(other_G[g] > score_G[g])
        for g in range(count):
            for i in range(width):
                keep_N[(first + g) * width + i] = beaten_MG[i, g] < n


@compiled
def _zero_groups(score_N: Array, n: int, group: _Group, bits_N: Array) -> bool:
    step = numpy.uint64(_CHUNK // len(group) * len(group))
    size = numpy.uint64(score_N.size)
    keep_C = numpy.empty(step, numpy.bool_)
    for first in range(numpy.uint64(0), size, step):
        last = min(first + step, size)
        _keep_groups(score_N[first:last], n, group, keep_C)
        _zero(bits_N[first:last], keep_C)
    return _finite(score_N)


@compiled
def _zero_scaled_groups(bits_RN: Array, factor_N: Array, n: int, group: _Group) -> bool:
    step = numpy.uint64(_CHUNK // len(group) * len(group))
    size = numpy.uint64(factor_N.size)
    score_C = numpy.empty(step, numpy.float32)
    finite = True
    for r in range(len(bits_RN)):
        for first in range(numpy.uint64(0), size, step):
            last = min(first + step, size)
            some_N, score_N = bits_RN[r][first:last], score_C[: last - first]
            _scale(some_N, factor_N[first:last], score_N)
            finite &= _zero_groups(score_N, n, group, some_N)
    return finite


@compiled
def _keep_above(score_N: Array, threshold: float, kept: int, keep_N: Array) -> None:
    size, one = numpy.uint64(score_N.size), numpy.uint64(1)
    short = numpy.int32(kept)
    for i in range(size):
        keep_N[i] = score_N[i] > threshold
        short -= numpy.int32(score_N[i] > threshold)
    for back in range(size):
        if short <= 0:
            break
        if score_N[size - one - back] == threshold:
            keep_N[size - one - back] = True
            short -= numpy.int32(1)


@compiled
def _count(bits_N: Array, magnitude: Any, width: int, group: _Group) -> tuple[int, int]:
    size = numpy.uint64(len(group)) if len(group) else numpy.uint64(width)
    total = most = numpy.int64(0)
    for g in range(numpy.uint64(bits_N.size) // size):
        count = numpy.int32(0)
        for i in range(size):
            count += numpy.int32((bits_N[g * size + i] & magnitude) != 0)
        total += numpy.int64(count)
        most = max(most, numpy.int64(count))
    return int(total), int(most)
