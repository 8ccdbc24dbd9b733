"""The relative weight of RIA, shared by the metrics that use it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def relative_weight(weight_OI: Tensor) -> Tensor:
    """|W_ij| / sum_i' |W_i'j| + |W_ij| / sum_j' |W_ij'|, float32 (O, I); RIA (Zhang et al. 2024), Equation 3."""
    return weight_OI.abs() * relative_scale(weight_OI)


def relative_scale(weight_OI: Tensor) -> Tensor:
    """1 / sum_i' |W_i'j| + 1 / sum_j' |W_ij'|, float32 (O, I): what |W_ij| is multiplied by to become relative.

    A column or row of zeros has nothing to compare: its weights stay 0 rather than 0/0. Computed in float32: in float16
    one ratio in six of a 4096 x 4096 weight is subnormal.
    """
    size_OI = weight_OI.abs()
    return 1 / size_OI.sum(0, keepdim=True).clamp(min=1e-30) + 1 / size_OI.sum(1, keepdim=True).clamp(min=1e-30)
