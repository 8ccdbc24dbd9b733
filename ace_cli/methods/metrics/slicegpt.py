"""SliceGPT's basis of the residual stream (Ashkboos et al., ICLR 2024, arXiv 2401.15024).

Shapes: H hidden size, D what is left of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.methods.metrics.base import Metric
from ace_cli.methods.statistics import Gram

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.statistics import Statistic


@register("metric", "slicegpt")
@dataclass
class SliceGPT(Metric):
    """Q: the D eigenvectors of C = sum_t h_t h_t^T of largest eigenvalue, h the states before a norm.

    ``damping`` times the mean of its diagonal is added to C, as the authors do, which changes no eigenvector and keeps
    the decomposition away from singular matrices. Departures: states of all tokens as they are (the authors' code takes
    the mean out of the embeddings, which changes models with RMS norms); no random rotation is laid on top.
    """

    damping: float = 0.01
    units = False
    weights = False
    hidden = True

    def faults(self) -> list[str]:
        return [] if 0 <= self.damping <= 1e6 else [f"metric.damping={self.damping:g}: must lie between 0 and 1e6"]

    def needs(self) -> tuple[Statistic, ...]:
        return (Gram(),)

    def basis(self, total_HH: Tensor, width: int) -> Tensor:
        """``total_HH`` float64 -> Q (H, D), float64; largest first, its signs as the largest entry is positive."""
        import torch

        matrix_HH = total_HH.clone()
        matrix_HH.diagonal().add_(self.damping * total_HH.diagonal().mean())
        basis_HD = torch.linalg.eigh(matrix_HH).eigenvectors.flip(1)[:, :width]
        largest_1D = basis_HD.abs().argmax(0, keepdim=True)
        signed_HD: Tensor = basis_HD * basis_HD.gather(0, largest_1D).sign()
        return signed_HD
