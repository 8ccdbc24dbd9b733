"""How far one model's next-token distributions are from another's, with the gradient, some tokens at a time.

D = sum over tokens of sum_v p_v (log p_v - log q_v), p the teacher's and q the student's; dD/d(logits of q) = q - p, as
p sums to 1. A vocabulary is wide: a few tokens at a time stay in a CPU's caches, and the gradient is made on the way.
Shapes: T tokens, C of them at once, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Tokens whose distributions are compared at once.
_TOKENS = 64


def divergence(student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
    """Sum over tokens of KL(teacher || student), nats, float32 (), of logits in any floating dtype.

    Has a gradient in the student's logits alone, in their dtype.
    """
    return _Divergence.apply(student_TV, teacher_TV)  # type: ignore[no-any-return, no-untyped-call]


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient_TV = torch.empty_like(student_TV) if wanted else student_TV
        total = torch.zeros((), dtype=torch.float32, device=student_TV.device)
        pieces = (torch.split(each, _TOKENS) for each in (student_TV, teacher_TV, gradient_TV))
        for student_CV, teacher_CV, gradient_CV in zip(*pieces, strict=True):
            log_q_CV, log_p_CV = (each.float().log_softmax(-1) for each in (student_CV, teacher_CV))
            p_CV = log_p_CV.exp()
            total += torch.dot(p_CV.view(-1), log_p_CV.sub_(log_q_CV).view(-1))
            if wanted:
                gradient_CV.copy_(log_q_CV.exp_().sub_(p_CV))
        if wanted:
            ctx.save_for_backward(gradient_TV)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient_TV,) = ctx.saved_tensors
        return gradient_TV * gradients[0].to(gradient_TV.dtype), None
