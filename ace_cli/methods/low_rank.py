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


def correction(error_OI: Tensor, gram_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The product up (O, R) down (R, I), float32, nearest to ``error_OI`` in the outputs it makes of observed inputs.

    min ||(E - BA) H^(1/2)||_F with H = X^T X = ``gram_II``: E projected onto the R leading left singular vectors U of
    E H^(1/2), BA = U U^T E. This is the correction that 3BASiL (arXiv 2603.01376) finds by way of the inverse of
    H^(1/2), which is not needed. Both factors get the same size, so that one learning rate suits both.
    """
    import torch

    error_OI, gram_II = error_OI.double(), gram_II.double()
    directions_OR = _leading(error_OI, gram_II, min(rank, *error_OI.shape))
    down_RI = directions_OR.T @ error_OI
    size_R = down_RI.norm(dim=1).clamp_min(1e-30).sqrt()
    up_OR, down_RI = directions_OR * size_R, down_RI / size_R[:, None]
    if lacking := rank - len(size_R):  # a weight of fewer rows than that has no more directions
        up_OR = torch.nn.functional.pad(up_OR, (0, lacking))
        down_RI = torch.nn.functional.pad(down_RI, (0, 0, 0, lacking))
    return up_OR.float(), down_RI.float()


def _leading(error_OI: Tensor, gram_II: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors (O, R) of E H^(1/2), by the smaller of the two symmetric problems."""
    import torch

    rows, columns = error_OI.shape
    if rows <= columns:
        _, left_OO = torch.linalg.eigh(error_OI @ gram_II @ error_OI.T)
        directions_OR: Tensor = left_OO[:, -rank:].flip(1)
        return directions_OR
    jitter = 1e-10 * gram_II.diagonal().mean().clamp_min(1e-30)
    root_II = torch.linalg.cholesky(gram_II + jitter * torch.eye(columns, dtype=gram_II.dtype, device=gram_II.device))
    seen_OI = error_OI @ root_II
    _, right_II = torch.linalg.eigh(seen_OI.T @ seen_OI)
    return torch.nn.functional.normalize(seen_OI @ right_II[:, -rank:].flip(1), dim=0)
