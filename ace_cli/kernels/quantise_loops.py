"""The columns of one block of a sweep that prunes and rounds (``methods/repair/sparsegpt.py``), row by row.

Shapes: R rows, B columns of a block, K columns of a group.
"""

from __future__ import annotations

import math
from typing import Any

import numpy

from ace_cli.kernels.compiled import Array, compiled
from ace_cli.kernels.sparsegpt_loops import choose, correct


@compiled
def round_block(
    block_RB: Array, pruned_RB: Array, root_BB: Array, n: int, m: int, share_S: Array, group: int, lowest: float,
    highest: float, smallest: float, scale_R: Array, error_RB: Array,
) -> None:  # fmt: skip
    """q_j = 0 where pruned, else the nearest point of the grid; e_j = (w_j - q_j) / U_jj; w_k -= e_j U_jk for k >= j.

    As ``prune_block``, ``m`` > 0 chooses what is pruned. ``group`` > 0: at the start of every group its scale is
    chosen, of ``share_S`` (of the largest weight, over ``highest``), for the weights that are to stay by then; else a
    row's is ``scale_R``. Floats are float32. ``block_RB`` ends as the q.
    """
    columns, of, width = numpy.uint64(len(root_BB)), numpy.uint64(m), numpy.uint64(group)
    score_B, point_B = numpy.empty(len(root_BB), numpy.float32), numpy.empty(len(root_BB), numpy.float32)
    cost_B = numpy.empty(len(root_BB), numpy.float32)
    for j in range(columns):
        cost_B[j] = numpy.float32(1) / (root_BB[j, j] * root_BB[j, j])
    for r in range(len(block_RB)):
        weight_B, pruned_B, error_B, scale = block_RB[r], pruned_RB[r], error_RB[r], scale_R[r]
        for j in range(columns):
            if of > 0 and j % of == 0:
                for k in range(j, j + of):
                    score_B[k] = (weight_B[k] / root_BB[k, k]) ** 2
                choose(score_B[j : j + of], n, pruned_B[j : j + of])
            if width > 0 and j % width == 0:
                here = slice(j, j + width)
                scale = _best(weight_B[here], pruned_B[here], cost_B[here], share_S, lowest, highest, smallest)
            if pruned_B[j]:
                point_B[j] = numpy.float32(0)
            else:
                point_B[j] = _point(weight_B[j], scale, lowest, highest)
            error_B[j] = (weight_B[j] - point_B[j]) / root_BB[j, j]
            correct(weight_B[j:], error_B[j], root_BB[j, j:])
        for j in range(columns):
            weight_B[j] = point_B[j]


@compiled
def _point(weight: Any, scale: Any, lowest: Any, highest: Any) -> Any:
    code = numpy.rint(weight / scale)
    code = min(max(code, lowest), highest)
    return code * scale + numpy.float32(0)  # which makes -0.0 +0.0


@compiled
def _best(
    weight_K: Array, pruned_K: Array, cost_K: Array, share_S: Array, lowest: Any, highest: Any, smallest: Any
) -> Any:
    """``Grid.scales`` of one group."""
    kept_K = numpy.empty(weight_K.size, numpy.float32)
    top = numpy.float32(0)
    for k in range(numpy.uint64(weight_K.size)):
        kept_K[k] = numpy.float32(0) if pruned_K[k] else weight_K[k]
        top = max(top, abs(kept_K[k]))
    best, least = numpy.float32(1), numpy.float32(math.inf)
    if not top > 0:
        return best
    for s in range(share_S.size):
        scale = max(_eight_bits(top * share_S[s]), smallest)
        lost = numpy.float32(0)
        for k in range(numpy.uint64(kept_K.size)):
            off = _point(kept_K[k], scale, lowest, highest) - kept_K[k]
            lost += off * off * cost_K[k]
        if lost < least:
            best, least = scale, lost
    return best


@compiled
def _eight_bits(number: Any) -> Any:
    """The nearest float32 with eight significant bits, as bfloat16 rounds."""
    fraction, exponent = math.frexp(number)
    return numpy.float32(math.ldexp(numpy.rint(fraction * 256), exponent - 8))
