"""Symmetric grids of whole numbers times a scale: what a rounded weight may be, and which scale suits a group.

Shapes: O outputs, I inputs, G groups of a row, K inputs of a group.

A weight is code * scale with a code of ``bits`` bits, -2^(bits-1) to 2^(bits-1) - 1, as compressed-tensors'
``pack-quantized`` stores it. Zero is a point of every such grid, so what is pruned stays pruned. Scales have eight
significant bits, so that float32, bfloat16 and (from ``smallest`` on) float16 hold them exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Scales that are tried, as shares of the one that reaches the largest weight: some weights clipped, all others finer.
SHARES = tuple(1 - 0.03 * step for step in range(20))

#: float16 holds eight significant bits of every number from here on.
SMALLEST_HALF = 2.0**-16


@dataclass(frozen=True)
class Grid:
    """``group`` consecutive inputs of a row share a scale; all of a row where it is None."""

    bits: int
    group: int | None
    smallest: float = 2.0**-100

    def __post_init__(self) -> None:
        """Raises ValueError for what is no grid."""
        if not 2 <= self.bits <= 8 or (self.group is not None and self.group < 1):
            raise ValueError(f"{self.bits} bits for groups of {self.group}")

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -(1 << self.bits - 1)

    @property
    def highest(self) -> int:
        """The largest code."""
        return (1 << self.bits - 1) - 1

    def width(self, columns: int) -> int:
        """Inputs of a row of so many that share a scale."""
        return self.group or columns

    def scales(self, weight_OI: Tensor, cost_I: Tensor | None = None) -> Tensor:
        """Of each group the scale that loses least, sum_k cost_k (w_k - q_k)^2, of those in ``SHARES``.

        ``weight_OI`` float32, zero where pruned -> (O, G) float32. A group without weights gets 1.
        """
        import torch

        width = self.width(weight_OI.shape[1])
        groups_OGK = self._grouped(weight_OI)
        cost_GK = None if cost_I is None else cost_I.view(-1, width)
        top_OG = groups_OGK.abs().amax(-1)
        best_OG, least_OG = torch.ones_like(top_OG), torch.full_like(top_OG, float("inf"))
        for share in SHARES:
            scale_OG = (top_OG * (share / self.highest)).bfloat16().float().clamp_min(self.smallest)
            lost_OGK = (self._points(groups_OGK, scale_OG[..., None]) - groups_OGK).square_()
            lost_OG = (lost_OGK if cost_GK is None else lost_OGK.mul_(cost_GK)).sum(-1)
            better_OG = (lost_OG < least_OG) & (top_OG > 0)
            best_OG, least_OG = best_OG.where(~better_OG, scale_OG), least_OG.where(~better_OG, lost_OG)
        return best_OG

    def rounded(self, weight_OI: Tensor, scale_OG: Tensor) -> Tensor:
        """The nearest point of the grid, (O, I) float32; of two equally near ones the even code."""
        groups_OGK = self._grouped(weight_OI)
        return self._points(groups_OGK, scale_OG[..., None]).flatten(1)

    def _grouped(self, matrix_OI: Tensor) -> Tensor:
        return matrix_OI.reshape(len(matrix_OI), -1, self.width(matrix_OI.shape[1]))

    def _points(self, groups_OGK: Tensor, scale_OG1: Tensor) -> Tensor:
        points_OGK = (groups_OGK / scale_OG1).round_().clamp_(self.lowest, self.highest)
        return points_OGK.mul_(scale_OG1).add_(0.0)  # which makes -0.0 +0.0

    def scales_of(self, values_OI: Tensor) -> Tensor:
        """Scales with which every one of ``values_OI``, as they are stored, is code * scale rounded to their dtype.

        (O, G) float32, found in the values alone: the largest of a group is one of the codes times the scale. Several
        scales may do; the first found is taken. Raises ValueError, naming the row, where there is none.
        """
        import torch

        stored_NK = self._grouped(values_OI).flatten(0, 1)
        value_NK = stored_NK.float()
        top_N = value_NK.abs().amax(1)
        scale_N, left_N = torch.ones_like(top_N), top_N.nonzero().flatten()
        for code in (self.highest, -self.lowest, *range(self.highest - 1, 0, -1)):
            for step in (0, 1, -1):  # the largest value was rounded, too
                if not len(left_N):
                    return scale_N.view(len(values_OI), -1)
                tried_N1 = _eight_bits(top_N[left_N] / code, step)[:, None]
                points_NK = self._points(value_NK[left_N], tried_N1).to(stored_NK.dtype)
                fits_N = (points_NK == stored_NK[left_N]).all(1)
                scale_N[left_N[fits_N]] = tried_N1[fits_N, 0]
                left_N = left_N[~fits_N]
        if len(left_N):
            row = int(left_N[0]) // (len(stored_NK) // len(values_OI))
            raise ValueError(f"row {row} is on no grid of {self.bits} bits")
        return scale_N.view(len(values_OI), -1)

    def codes(self, values_OI: Tensor, scale_OG: Tensor) -> Tensor:
        """The codes of values that ``scale_OG`` was found for, int8 (O, I)."""
        import torch

        groups_OGK = self._grouped(values_OI.float())
        return (groups_OGK / scale_OG[..., None]).round_().to(torch.int8).flatten(1)

    def values(self, codes_OI: Tensor, scale_OG: Tensor, dtype: torch.dtype) -> Tensor:
        """code * scale, rounded to ``dtype``."""
        groups_OGK = self._grouped(codes_OI.float())
        return groups_OGK.mul_(scale_OG.float()[..., None]).flatten(1).to(dtype)


def _eight_bits(number_N: Tensor, step: int) -> Tensor:
    """The nearest float32 with eight significant bits, or the one ``step`` beside it."""
    import torch

    return (number_N.bfloat16().view(torch.int16) + step).view(torch.bfloat16).float()
