"""One sweep of exchanges (``ace_cli.methods.repair.exchange``).

Only one group in ten to three makes an exchange, and fewer with every sweep: what follows from one is two rows of the
matrix, where products of whole blocks take the rows of every group.

Shapes: R rows, I inputs, G groups of M. Sums are of float32, in an order that neither threads nor pieces change.
"""

from __future__ import annotations

from typing import Any

import numpy

from ace_cli.kernels.compiled import Array, compiled

#: Weights handled at a time: they and their pulls, 1 MB, stay in a core's second cache.
_TILE = 1 << 17

#: Rows of a tile, at most: one place of a group in all of them is what vector instructions work on.
_LANES = 64

#: Apart in memory, so that neighbouring rows of 2^n inputs do not fall on the same places of the caches.
_APART = 16


@compiled
def sweep(
    unit_RI: Array,
    keep_RI: Array,
    pull_RI: Array,
    moving_R: Array,
    matrix_II: Array,
    order_I: Array,
    beside_GMM: Array,
    least: float,
) -> None:
    """Every row makes the best exchange of each group of neighbours in ``order_I`` (uint64), one after the other.

    ``unit_RI`` v, ``pull_RI`` c and ``matrix_II`` A are float32, in file order as ``keep_RI``, bool; ``beside_GMM`` is
    A within each group; the last may be smaller. A change must gain ``least`` times the mean v_j^2 A_jj of the row.
    Changes ``keep_RI`` and ``pull_RI``. Only rows that are ``moving_R`` are looked at; those that made an exchange
    still are, afterwards.
    """
    inputs, width = numpy.uint64(order_I.size), numpy.uint64(beside_GMM.shape[1])
    rows = numpy.uint64(len(unit_RI))
    step = numpy.uint64(max(1, min(_LANES, _TILE // order_I.size)))
    dealt_RI = numpy.empty((step, inputs + numpy.uint64(_APART)), numpy.float32)
    near_RI = numpy.empty((step, inputs + numpy.uint64(_APART)), numpy.float32)
    group_3MR = numpy.zeros((3, beside_GMM.shape[1], _LANES), numpy.float32)
    change_R, pair_R = numpy.empty(_LANES, numpy.float32), numpy.empty(_LANES, numpy.int32)
    least_R = numpy.empty(_LANES, numpy.float32)
    row_R, start = numpy.empty(_LANES, numpy.uint64), numpy.uint64(0)
    while start < rows:
        count = numpy.uint64(0)
        while start < rows and count < step:
            row_R[count] = start
            count += numpy.uint64(moving_R[start])
            start += numpy.uint64(1)
        for r in range(count):
            row = row_R[r]
            moving_R[row] = False
            near_RI[r, :inputs] = pull_RI[row]
            least_R[r] = -numpy.float32(least) * _deal(unit_RI[row], order_I, beside_GMM, dealt_RI[r])
        for first in range(numpy.uint64(0), inputs if count else numpy.uint64(0), width):
            order_M, beside_MM = order_I[first : first + width], beside_GMM[first // width]
            for r in range(count):
                _look(r, dealt_RI[r][first:], keep_RI[row_R[r]], near_RI[r], order_M, beside_MM, group_3MR)
            _best(group_3MR, numpy.uint64(order_M.size), beside_MM, change_R, pair_R)
            for r in range(count):
                if change_R[r] < least_R[r]:
                    moving_R[row_R[r]] = True
                    p, q = numpy.uint64(pair_R[r]) // width, numpy.uint64(pair_R[r]) % width
                    keep_RI[row_R[r], order_M[p]] ^= True
                    keep_RI[row_R[r], order_M[q]] ^= True
                    y_p, y_q = group_3MR[0, p, r], group_3MR[0, q, r]
                    _add(near_RI[r], y_p, matrix_II[order_M[p]], y_q, matrix_II[order_M[q]])
        for r in range(count):
            pull_RI[row_R[r]] = near_RI[r, :inputs]


@compiled
def _deal(unit_I: Array, order_I: Array, beside_GMM: Array, dealt_I: Array) -> Any:
    """v in the order of this sweep; the mean v_j^2 A_jj."""
    width = numpy.uint64(beside_GMM.shape[1])
    total = numpy.float32(0)
    for i in range(numpy.uint64(order_I.size)):
        value = unit_I[order_I[i]]
        dealt_I[i] = value
        total += value * value * beside_GMM[i // width, i % width, i % width]
    return total / numpy.float32(order_I.size)


@compiled
def _look(
    r: Any, unit_M: Array, keep_I: Array, pull_I: Array, order_M: Array, beside_MM: Array, group_3MR: Array
) -> None:
    """Of row r: y_j = v_j where kept, -v_j where pruned; f_j = v_j^2 A_jj + 2 y_j c_j; 1 where kept, 0 where not."""
    for i in range(numpy.uint64(order_M.size)):
        value, kept = unit_M[i], keep_I[order_M[i]]
        y = value if kept else -value
        group_3MR[0, i, r] = y
        group_3MR[1, i, r] = value * value * beside_MM[i, i] + numpy.float32(2) * y * pull_I[order_M[i]]
        group_3MR[2, i, r] = numpy.float32(kept)


@compiled
def _best(group_3MR: Array, width: Any, beside_MM: Array, change_R: Array, pair_R: Array) -> None:
    """The least D(p, q) = f_p + f_q + 2 y_p y_q A_pq of every row, or 0 where none is below; its p * M + q."""
    lanes = numpy.uint64(_LANES)
    for r in range(lanes):
        change_R[r] = numpy.float32(0)
        pair_R[r] = numpy.int32(0)
    for p in range(width):
        y_R, f_R, kept_R = group_3MR[0, p], group_3MR[1, p], group_3MR[2, p]
        for q in range(p + numpy.uint64(1), width):
            other_y_R, other_f_R, other_kept_R = group_3MR[0, q], group_3MR[1, q], group_3MR[2, q]
            twice = numpy.float32(2) * beside_MM[p, q]
            pair = numpy.int32(p * numpy.uint64(len(beside_MM)) + q)
            for r in range(lanes):
                change = f_R[r] + other_f_R[r] + twice * y_R[r] * other_y_R[r]
                better = (change < change_R[r]) & (kept_R[r] != other_kept_R[r])
                change_R[r] = change if better else change_R[r]
                pair_R[r] = pair if better else pair_R[r]


@compiled
def _add(pull_I: Array, y_p: float, row_p_I: Array, y_q: float, row_q_I: Array) -> None:
    for j in range(numpy.uint64(row_p_I.size)):
        pull_I[j] += y_p * row_p_I[j] + y_q * row_q_I[j]
