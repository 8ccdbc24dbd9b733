"""AlphaPruning (Lu et al. 2024, arXiv 2410.10912)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.methods.allocation.base import Allocation, between_zero_and_one, weighted_mean

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.statistics import Seen


@register("allocation", "alpha")
@dataclass
class Alpha(Allocation):
    """Blocks whose spectra are less heavy-tailed lose more: p_l proportional to 1 - eps + 2 eps a_l. Needs no data.

    a_l = (alpha_l - min alpha) / (max alpha - min alpha), alpha_l the mean over the block's slots of the exponent of a
    power law fitted to the tail of the eigenvalues of W W^T (``tail_exponent``; Section 3.2, mapping of Equation 4).
    Departures from the authors' code: the window of possible tail starts is on one scale (the code compares a
    logarithm with an eigenvalue, so that it hardly bounds); eigenvalues that are zero to working precision are left
    out. The authors use eps = 0.2 or 0.3, whatever suits the model.
    """

    eps: float = 0.3

    def faults(self) -> list[str]:
        return [] if 0 <= self.eps < 1 else [f"allocation.eps={self.eps:g}: must lie in [0, 1)"]

    def measure(self, weights: Sequence[Tensor], seen: Sequence[Seen]) -> float:
        """alpha_l; NaN if no weight of the block has a spectrum to speak of."""
        found = [alpha for weight_OI in weights if (alpha := tail_exponent(weight_OI)) is not None]
        return sum(found) / len(found) if found else math.nan

    def span(self, p: float) -> float:
        return p * 2 * self.eps / (1 - self.eps)

    def sparsities(self, p: float, sizes: Sequence[int], measures: Sequence[float]) -> list[float]:
        wishes = [1 - self.eps + 2 * self.eps * a for a in between_zero_and_one(measures)]
        middle = weighted_mean(wishes, sizes)
        return [p * wish / middle for wish in wishes]


def tail_exponent(weight_OI: Tensor) -> float | None:
    """The exponent alpha of the power law that best fits the largest eigenvalues lam of W W^T; None without a fit.

    For a tail that starts at the i-th of N ascending eigenvalues, with n = N - i:

        alpha_i = 1 + n / sum_{r >= i} ln(lam_r / lam_i)                                  (maximum likelihood, Hill)
        D_i = max_{r >= i} |1 - (lam_r / lam_i)^(1 - alpha_i) - (r - i) / n|              (Kolmogorov-Smirnov distance)

    The start is the one of least D_i among 0.95 x <= lam_i <= 1.5 x, where x is the left edge of the fullest of 100
    bins of log10 lam. Float64.
    """
    import torch

    wide = weight_OI.shape[0] <= weight_OI.shape[1]
    rows = (weight_OI if wide else weight_OI.T).double()
    eigenvalues = torch.linalg.eigvalsh(rows @ rows.T).cpu()
    noise = eigenvalues[-1] * len(eigenvalues) * torch.finfo(torch.float64).eps
    logs = eigenvalues[eigenvalues > noise].log()
    if len(logs) < 2 or not logs[0] < logs[-1]:
        return None
    counts = torch.histc(logs, bins=100, min=float(logs[0]), max=float(logs[-1]))
    peak = float(logs[0] + (logs[-1] - logs[0]) * int(counts.argmax()) / 100)
    start, stop = (int((logs < peak + math.log(factor)).sum()) for factor in (0.95, 1.5))
    best, alpha = math.inf, None
    for i in range(start, min(stop, len(logs) - 1)):
        above = logs[i:] - logs[i]
        if not (total := float(above.sum())) > 0:
            continue
        n = len(above)
        steps = torch.arange(n, dtype=torch.float64) / n
        distance = float((1 - (-n / total * above).exp() - steps).abs().max())
        if distance < best:
            best, alpha = distance, 1 + n / total
    return alpha
