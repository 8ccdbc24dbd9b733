"""Weights as products of two thinner ones: how thin, and which product is nearest.

Shapes: O outputs, I inputs, R the rank.
"""

from __future__ import annotations

from fractions import Fraction
from math import floor
from typing import TYPE_CHECKING

from ace_cli.methods.metrics.base import Metric

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.statistics import Seen


def rank_of(rows: int, columns: int, share: Fraction) -> int:
    """The largest R with R (O + I) <= (1 - share) O I: the product's parameters; at least 1."""
    return max(1, floor(Fraction(rows * columns) * (1 - share) / (rows + columns)))


def fewer(rows: int, columns: int, rank: int) -> int:
    """Parameters that go when a weight becomes a product of this rank."""
    return rows * columns - rank * (rows + columns)


class Factorisation(Metric):
    """A metric that finds the product nearest to a weight, in place of scores."""

    ranks = True
    units = False
    weights = False

    def factors(self, weight_OI: Tensor, seen: Seen, rank: int) -> tuple[Tensor, Tensor, list[str]]:
        """``weight_OI`` float32, not to be changed -> float64 up (O, R), down (R, I), and what it noted.

        Raises ArithmeticError, in words, where the statistics do not allow it.
        """
        raise NotImplementedError

    @property
    def by_rows(self) -> bool:
        return False

    def flops(self, rows: int, columns: int) -> int:
        small, large = sorted((rows, columns))
        return 2 * (4 * large * small**2 + 22 * small**3)  # an SVD in float64

    def nbytes(self, rows: int, columns: int) -> int:
        return 8 * (4 * rows * columns + 6 * min(rows, columns) ** 2)


def truncated(matrix_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U_r s_r^(1/2) (O, R) and s_r^(1/2) V_r^T (R, I) of the exact singular value decomposition, float64."""
    import torch

    left_OK, size_K, right_KI = torch.linalg.svd(matrix_OI.double(), full_matrices=False)
    root_R = size_K[:rank].sqrt()
    return left_OK[:, :rank] * root_R, root_R[:, None] * right_KI[:rank]
