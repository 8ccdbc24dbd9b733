"""The columns of one block of SparseGPT (``methods/repair/sparsegpt.py``), row by row: a row stays in the first cache,
and only what is pruned is corrected, where rank-one updates of all rows pass through memory for every column.

Shapes: R rows, B columns of a block.
"""

from __future__ import annotations

from typing import Any

import numpy

from ace_cli.kernels.compiled import Array, compiled


@compiled
def prune_block(block_RB: Array, pruned_RB: Array, root_BB: Array, n: int, m: int, error_RB: Array) -> None:
    """e_j = w_j / U_jj where pruned, 0 elsewhere; w_k -= e_j U_jk for every k of the block from j on.

    ``m`` > 0: at the start of every group of m all but the n largest (w_j / U_jj)^2 are pruned, of equal ones the later
    kept. Floats are float32; ``pruned_RB``, bool, is changed only then. ``block_RB`` ends with +0.0 where pruned.
    """
    columns, group = numpy.uint64(len(root_BB)), numpy.uint64(m)
    score_B = numpy.empty(len(root_BB), numpy.float32)
    for r in range(len(block_RB)):
        weight_B, pruned_B, error_B = block_RB[r], pruned_RB[r], error_RB[r]
        for j in range(columns):
            if group > 0 and j % group == 0:
                for k in range(j, j + group):
                    score_B[k] = (weight_B[k] / root_BB[k, k]) ** 2
                choose(score_B[j : j + group], n, pruned_B[j : j + group])
            if pruned_B[j]:
                error_B[j] = weight_B[j] / root_BB[j, j]
                correct(weight_B[j:], error_B[j], root_BB[j, j:])
            else:
                error_B[j] = numpy.float32(0)
        for j in range(columns):
            if pruned_B[j]:
                weight_B[j] = numpy.float32(0)


@compiled
def choose(score_M: Array, n: int, pruned_M: Array) -> None:
    """All but the n largest are pruned, of equal ones the later kept."""
    for i in range(numpy.uint64(score_M.size)):
        better = numpy.int32(0)
        for k in range(i):
            better += numpy.int32(score_M[k] > score_M[i])
        for k in range(i + numpy.uint64(1), numpy.uint64(score_M.size)):
            better += numpy.int32(score_M[k] >= score_M[i])
        pruned_M[i] = better >= n


@compiled
def correct(weight_B: Array, error: Any, root_B: Array) -> None:
    """w_k -= e U_k."""
    for k in range(numpy.uint64(weight_B.size)):
        weight_B[k] -= error * root_B[k]
