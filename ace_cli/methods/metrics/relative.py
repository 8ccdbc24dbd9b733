"""The relative weight of RIA, shared by the metrics that use it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ace_cli.kernels.threads import each_columns

if TYPE_CHECKING:
    from torch import Tensor

#: A column or row of zeros has nothing to compare: its weights stay 0 rather than 0/0.
_LEAST = 1e-30


class RelativeWeight:
    """|W_ij| / sum_i' |W_i'j| + |W_ij| / sum_j' |W_ij'|; RIA (Zhang et al. 2024), Equation 3.

    Called with rows of W, float32 (R, I), it gives theirs. Computed in float32: in float16 one ratio in six of a 4096 x
    4096 weight is subnormal.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        """``weight_OI``: the whole W, of any float dtype."""
        self._column_1I = 1 / _sizes_of_columns(weight_OI).clamp(min=_LEAST)

    def __call__(self, rows_RI: Tensor) -> Tensor:
        size_RI = rows_RI.abs()
        return size_RI.mul_(self.scale(size_RI))

    def scale(self, rows_RI: Tensor) -> Tensor:
        """1 / sum_i' |W_i'j| + 1 / sum_j' |W_ij'|, float32 (R, I): what |W_ij| is multiplied by to become relative."""
        return self._column_1I + 1 / rows_RI.abs().sum(1, keepdim=True).clamp(min=_LEAST)


def power_faults(alpha: float) -> list[str]:
    """What is wrong with the power of the inputs' factor beside a relative weight, as ``Metric.faults`` says it."""
    return [] if 0 <= alpha <= 4 else [f"metric.alpha={alpha}: must lie in [0, 4]"]


def _sizes_of_columns(weight_OI: Tensor) -> Tensor:
    """sum_i |W_ij|, float32 (1, I); on a CPU a few columns at a time, so that nothing of the weight's size is made."""
    import torch

    if weight_OI.device.type != "cpu":
        return weight_OI.float().abs().sum(0, keepdim=True)
    sizes_1I = weight_OI.new_empty((1, weight_OI.shape[1]), dtype=torch.float32)

    def add(at: slice) -> None:
        sizes_1I[:, at] = weight_OI[:, at].float().contiguous().abs().sum(0, keepdim=True)

    each_columns(weight_OI.shape[0], weight_OI.shape[1], add)
    return sizes_1I
