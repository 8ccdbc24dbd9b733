"""Weights that make up for what was lost before them: a slot's dense outputs as its target, part of the way.

Shapes: T tokens, I inputs, O outputs.

Pruning what comes before a slot changes its inputs from d_t (the dense model's) to x_t. The weights that put out most
nearly what the dense model does, of the inputs that there are now, are

    W + W C (G + shrinkage * diag(s^2))^{-1},   C = sum_t (d_t - x_t) x_t^T,   G = sum_t x_t x_t^T,

the least squares of sum_t ||W' x_t - W d_t||^2 drawn to W. ``share`` of that way is gone before the weight is scored
and repaired. The whole way is the asymmetric calibration of quantisers (GPTAQ, arXiv 2504.02692) and the dense targets
of D2Prune (AAAI 2026); here half of it is better than either end (docs/results.md). shrinkage = I / T, as repairs take
(``Factors.noise``); s_j^2 is the larger of sum x_j^2 and sum d_j^2: by its own size alone, an input of which pruning
left a hundredth would be moved without bound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ace_cli.methods.repair.least_squares import factor_flops, factors_of
from ace_cli.methods.statistics import Gram, Lag

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.statistics import Seen, Statistic


def needs(share: float) -> tuple[Statistic, ...]:
    """What ``caught_up`` reads; nothing where ``share`` is 0 and it is not called."""
    return (Gram(), Lag()) if share else ()


def caught_up(weight_OI: Tensor, share: float, seen: Seen) -> Tensor:
    """The weight, float32 (O, I), ``share`` (0 to 1) of the way to the dense model's outputs.

    The very same bits where nothing before has changed. A damping that was raised is told by the notes of the factors
    of G. Raises ArithmeticError, in words, if G is not finite.
    """
    gram, lag = seen[Gram()], seen[Lag()]
    if not bool(lag.total_II.any()):
        return weight_OI
    factors = factors_of(gram)
    change_OI = factors.learned(weight_OI @ lag.total_II, factors.noise(), lag.dense_I)
    return weight_OI + share * change_OI.float()


def flops(rows: int, columns: int) -> int:
    """What ``caught_up`` costs for a weight (rows, columns), in operations of large float32 products."""
    return factor_flops(columns) + 6 * rows * columns**2


def nbytes(rows: int, columns: int) -> int:
    """What ``caught_up`` holds at most, beside the statistics and the weight: matrices and solutions in float64."""
    return 20 * columns**2 + 24 * rows * columns
