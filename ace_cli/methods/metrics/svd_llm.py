"""SVD-LLM's truncation after whitening (Wang et al., ICLR 2025, arXiv 2403.07378).

Shapes: O outputs, I inputs, R the rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.methods.low_rank import Factorisation, truncated
from ace_cli.methods.repair.least_squares import factors_of, pull_faults
from ace_cli.methods.statistics import Gram

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.statistics import Seen, Statistic


@register("metric", "svd_llm")
@dataclass
class SVDLLM(Factorisation):
    """W L = U diag(s) V^T, L L^T = C the inputs' second moments: W ~ [U_r s_r^(1/2)] [s_r^(1/2) V_r^T L^-1].

    No product of rank r is closer on the inputs seen: ||(W - W') X||_F^2 is the sum of the squared singular values that
    go. Exact decomposition; L^-1 by a triangular solve, no inverse is formed; the rank follows from the shape of every
    matrix, so grouped queries are no case of their own.

    Departure: C = G + shrinkage diag(G), with ``shrinkage=null`` inputs / tokens, for few tokens tell little of
    directions; ``metric.shrinkage=0`` is as published, whose C is raised where it is singular. And inputs are what the
    blocks before, already compressed, make of the text, where the authors' first step has the dense model's
    (``propagate=dense``) and its second (``repair=lstsq``) theirs.
    """

    shrinkage: float | None = None

    def faults(self) -> list[str]:
        return [fault.replace("repair.", "metric.") for fault in pull_faults("shrinkage", self.shrinkage, 0.0)]

    def needs(self) -> tuple[Statistic, ...]:
        return (Gram(),)

    def factors(self, weight_OI: Tensor, seen: Seen, rank: int) -> tuple[Tensor, Tensor, list[str]]:
        import torch

        factors = factors_of(seen[Gram()])
        scale_I = factors.scale_I.double()
        shrinkage = factors.noise() if self.shrinkage is None else self.shrinkage
        lower_II = factors.cholesky(factors.damped(0.0).double(), shrinkage)
        up_OR, right_RI = truncated((weight_OI * scale_I) @ lower_II, rank)
        down_RI = torch.linalg.solve_triangular(lower_II, right_RI, upper=False, left=False)
        return up_OR, down_RI / scale_I, factors.all_notes()
