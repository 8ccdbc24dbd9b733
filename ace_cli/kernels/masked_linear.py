"""A linear layer with a low-rank addition to the weights that are not zero, without a weight-sized tensor kept for it.

y = x (W + s keep * (B A))^T + b, keep = W != 0. Left to autograd, the sum of each layer would be held until the way
back; here it is made again there, which costs R / T of a product. Shapes: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def masked_sum(weight_OI: Tensor, down_RI: Tensor, up_OR: Tensor, scale: float) -> Tensor:
    """W + s keep * (B A) in the weight's dtype, (O, I); exactly zero where the weight is."""
    with torch.autocast(weight_OI.device.type, enabled=False):
        return torch.addmm(weight_OI, up_OR, down_RI, alpha=scale).masked_fill_(weight_OI == 0, 0)


def masked_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, down_RI: Tensor, up_OR: Tensor, scale: float
) -> Tensor:
    """(..., I) -> (..., O), computed as autocast says. Has gradients in ``x`` and both factors, in no other input."""
    return _MaskedLinear.apply(x, weight_OI, bias_O, down_RI, up_OR, scale)  # type: ignore[no-any-return, no-untyped-call]


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, down_RI: Tensor, up_OR: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight_OI, down_RI, up_OR)
        kind = x.device.type
        ctx.scale, ctx.half = scale, (torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return torch.nn.functional.linear(x, masked_sum(weight_OI, down_RI, up_OR, scale), bias_O)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x, weight_OI, down_RI, up_OR = ctx.saved_tensors
        (gradient,) = gradients
        dtype, enabled = ctx.half
        with torch.autocast(x.device.type, dtype, enabled):
            towards_x = None
            if ctx.needs_input_grad[0]:
                towards_x = (gradient @ masked_sum(weight_OI, down_RI, up_OR, ctx.scale)).to(x.dtype)
            towards_OI = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):
            towards_OI = towards_OI.to(weight_OI.dtype).masked_fill_(weight_OI == 0, 0).mul_(ctx.scale)
            return towards_x, None, None, up_OR.T @ towards_OI, towards_OI @ down_RI.T, None
