"""OSSCAR's removal of units one after the other (Meng et al. 2024, arXiv 2403.12983), by optimal brain surgeon steps.

Shapes: O outputs, I inputs, U units, C inputs of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.methods.repair.base import Repair, Repaired
from ace_cli.methods.repair.least_squares import factor_flops, factors_of, finish, pull_faults
from ace_cli.methods.repair.lstsq import pull, refitted
from ace_cli.methods.statistics import Gram

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.statistics import Seen, Statistic
    from ace_cli.methods.units import Units


@register("repair", "obs")
@dataclass
class Obs(Repair):
    """Chooses again which units go, as many as the metric said; then refits as repair=lstsq does.

    With H = R + shrinkage I in unit coordinates, the unit q that costs least goes, its weights are handed on, and
    H^{-1} forgets its inputs:

        cost_q = 1/2 tr( V_q ((H^{-1})_qq)^{-1} V_q^T ),   V -= V_q ((H^{-1})_qq)^{-1} (H^{-1})_q:,
        H^{-1} -= (H^{-1})_:q ((H^{-1})_qq)^{-1} (H^{-1})_q:.

    ``batch`` units go at a time, chosen before any of them is gone: 1 is the exact order. Departure: costs are measured
    in the matrix with its shrinkage, as all repairs here do.
    """

    shrinkage: float | None = None
    batch: int = 8
    units = True
    weights = False

    def faults(self) -> list[str]:
        found = pull_faults("shrinkage", self.shrinkage, 0.0)
        return found + ([] if self.batch >= 1 else [f"repair.batch is {self.batch}: give 1 or more"])

    def needs(self) -> tuple[Statistic, ...]:
        return (Gram(),)

    def nbytes(self, rows: int, columns: int) -> int:
        return 24 * columns**2  # a matrix and its factor in float64, two in float32

    def flops(self, rows: int, columns: int) -> int:
        return 2 * factor_flops(columns) + 4 * rows * columns**2 + 2 * columns**3

    def repair_units(self, weight_OI: Tensor, keep_U: Tensor, seen: Seen, units: Units) -> Repaired:
        """Raises ArithmeticError if the Gram matrix is not finite."""
        factors = factors_of(seen[Gram()])
        shrinkage = pull(factors, self.shrinkage)
        chosen_U = self._chosen(weight_OI * factors.scale_I, keep_U, factors.inverse(shrinkage).clone(), units)
        first_I, keep_I = (units.inputs(each_U, weight_OI.shape[1]) for each_U in (keep_U, chosen_U))
        new_OI = refitted(weight_OI, keep_I, factors, shrinkage)
        notes = [*factors.all_notes(), f"{int((chosen_U & ~keep_U).sum())} of the units kept are not the metric's"]
        keep_OI, first_OI = (each_I.expand(weight_OI.shape) for each_I in (keep_I, first_I))
        return finish(weight_OI, new_OI, keep_OI, first_OI, factors.gram_II, notes)

    def _chosen(self, unit_OI: Tensor, keep_U: Tensor, inverse_II: Tensor, units: Units) -> Tensor:
        """bool (U,): the units that stay, as many of each region as ``keep_U``; changes the inverse."""
        import torch

        regions, width, _ = units.columns_RWC.shape
        columns_UC = units.columns_RWC.flatten(0, 1).to(unit_OI.device)
        region_U = torch.arange(regions, device=unit_OI.device).repeat_interleave(width)
        left_R = (~keep_U).view(regions, width).sum(1)
        here_U = torch.ones_like(keep_U)
        while int(left_R.sum()):
            cost_U = _costs(unit_OI, inverse_II, columns_UC)
            cost_U = cost_U.masked_fill(~here_U | (left_R[region_U] == 0), float("inf"))
            gone = []
            for unit in cost_U.argsort(stable=True)[: min(self.batch, int(left_R.sum()))].tolist():
                if int(left_R[region_U[unit]]):
                    left_R[region_U[unit]] -= 1
                    gone.append(unit)
            here_U[gone] = False
            unit_OI = _removed(unit_OI, inverse_II, columns_UC[gone].flatten())
        return here_U


def _costs(unit_OI: Tensor, inverse_II: Tensor, columns_UC: Tensor) -> Tensor:
    """Twice the cost of each unit, (U,)."""
    import torch

    weights_UCO = unit_OI.T[columns_UC]
    if columns_UC.shape[1] == 1:
        inner_U = inverse_II.diagonal()[columns_UC[:, 0]].clamp(min=1e-30)
        return weights_UCO[:, 0].square().sum(1).div_(inner_U)
    inner_UCC = inverse_II[columns_UC[:, :, None], columns_UC[:, None, :]]
    inner_UCC = inner_UCC + 1e-12 * torch.eye(columns_UC.shape[1]).to(inner_UCC)  # of units that are gone
    costs_U: Tensor = (torch.linalg.solve(inner_UCC, weights_UCO) * weights_UCO).sum((1, 2))
    return costs_U


def _removed(unit_OI: Tensor, inverse_II: Tensor, gone_Z: Tensor) -> Tensor:
    """The weights after ``gone_Z`` were handed on; the inverse forgets these inputs, in place."""
    import torch

    inner_ZZ, across_ZI = inverse_II[gone_Z][:, gone_Z].double(), inverse_II[gone_Z]
    solved_ZI = torch.linalg.solve(inner_ZZ, across_ZI.double()).float()
    unit_OI = unit_OI - unit_OI[:, gone_Z] @ solved_ZI
    inverse_II -= across_ZI.T @ solved_ZI
    unit_OI[:, gone_Z], inverse_II[gone_Z], inverse_II[:, gone_Z] = 0.0, 0.0, 0.0
    return unit_OI
