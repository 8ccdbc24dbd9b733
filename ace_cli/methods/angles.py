"""Angles between hidden states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def angular_distance(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Mean over tokens of the angle between two states, as a share of pi; states (B, L, H) of each batch.

    Angles as 2 atan2(|u - v|, |u + v|) of unit vectors: exact for small ones too.
    """
    import torch

    total, tokens = 0.0, 0
    for x_BLH, y_BLH in zip(before, after, strict=True):
        x_TH, y_TH = (state.float().flatten(0, -2) for state in (x_BLH, y_BLH))
        u_TH, v_TH = (torch.nn.functional.normalize(state_TH, dim=1) for state_TH in (x_TH, y_TH))
        angle_T = 2 * torch.atan2((u_TH - v_TH).norm(dim=1), (u_TH + v_TH).norm(dim=1))
        total += float(angle_T.sum(dtype=torch.float64)) / math.pi
        tokens += len(angle_T)
    return total / tokens
