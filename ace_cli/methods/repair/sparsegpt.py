"""SparseGPT (Frantar & Alistarh, arXiv 2301.00774): prune column by column, spread each error to the right.

Shapes: I inputs, O outputs, B columns of one block.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial
from math import lcm
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.kernels.loops import load
from ace_cli.kernels.selection import keep_largest
from ace_cli.kernels.threads import HEAVY, each_piece
from ace_cli.methods.grids import SHARES
from ace_cli.methods.patterns import NofM, Pattern
from ace_cli.methods.repair.base import Repair, Repaired
from ace_cli.methods.repair.least_squares import (
    COPIES,
    MOST_STEPS,
    ROOT_BYTES,
    Factors,
    factor_flops,
    factors_of,
    finish,
    pull_faults,
    refit,
    refit_flops,
)
from ace_cli.methods.statistics import Gram

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from torch import Tensor

    from ace_cli.methods.grids import Grid
    from ace_cli.methods.statistics import Seen, Statistic


class Damping(Enum):
    """What the damping is measured against."""

    mean = "mean"  # damping * mean(diag G) * I, as published
    unit = "unit"  # damping * diag(G): each input by its own size, so that no input's scale matters


#: What correcting a block column by column costs for every weight, in operations of large matrix products; compiled.
_AROUND = 2_000


@register("repair", "sparsegpt")
@dataclass
class SparseGPT(Repair):
    """Refit by one pass of optimal brain surgeon steps, left to right (algorithm 1).

    With U^T U = (G + damping * mean(diag G) * I)^{-1}, U upper triangular, column j is masked and the rest corrected:

        e_j = (w_j - q_j) / U_jj,    W[:, j:] -= e_j U[j, j:],    q_j = w_j * keep_j.

    adaptive=True (what metric=sparsegpt sets) chooses the mask on the way, from the weights as updated so far: at the
    start of every block of `block_columns` (every group for N:M) by the score w_j^2 / U_jj^2. It prunes as many weights
    as the mask it is given: of all rows of the block together, as published (scope=layer), or of each row (scope=row).
    adaptive=False keeps the mask it is given.

    A pass from left to right cannot return to a column, so it ends above the least-squares weights of its mask:
    `refit_steps` masked conjugate gradient steps on the same matrix close the gap.

    What the evidence favours: adaptive, damping=None, damping_of=unit, refit_steps=30. damping=None takes I / T
    (`Factors.noise`), which is little with many tokens and much with few: 0.01 of the mean over-fits 2,048 tokens.

    Departures: a block loses its share of an exact total, where the published code prunes one more and every tie; a
    block holds whole groups of M columns; the weights of a dead input are pruned first where the mask is chosen here,
    but no more than the pattern asks for (all inputs dead: the smallest), and those that stay, stay as they are.
    Damping pulls towards the original weights.
    """

    units = True
    damping: float | None = 0.01
    damping_of: Damping = Damping.mean
    block_columns: int = 128
    adaptive: bool = False
    refit_steps: int = 0
    tolerance: float = 0.01

    def faults(self) -> list[str]:
        """Every field out of range, in words."""
        found = pull_faults("damping", self.damping, self.tolerance)
        if self.block_columns < 1:
            found.append(f"repair.block_columns is {self.block_columns}: give 1 or more, such as 128")
        if not 0 <= self.refit_steps <= MOST_STEPS:
            found.append(f"repair.refit_steps is {self.refit_steps}: give 0 up to {MOST_STEPS:,}, such as 30")
        return found

    def repairs_rows(self, pattern: Pattern) -> bool:
        return not self.adaptive or pattern.by_rows

    def keeps_mask(self) -> bool:
        return not self.adaptive

    def needs(self) -> tuple[Statistic, ...]:
        return (Gram(),)

    def flops(self, rows: int, columns: int) -> int:
        sweep = rows * columns**2 + _AROUND * rows * columns
        return sweep + factor_flops(columns) + refit_flops(rows, columns, self.refit_steps)

    def nbytes(self, rows: int, columns: int) -> int:
        unit = 4 if self.damping_of is Damping.unit or self.refit_steps else 0
        return (ROOT_BYTES + unit) * columns**2 + COPIES * rows * columns

    def repair(
        self, weight_OI: Tensor, keep_OI: Tensor, seen: Seen, pattern: Pattern, grid: Grid | None = None
    ) -> Repaired:
        """Refit the kept weights, or choose and refit; with ``adaptive`` only the loss before looks at ``keep_OI``.

        ``grid``: q_j is the nearest point of it where weights stay, so that the error of rounding is passed on, too;
        not with ``refit_steps``. Raises ArithmeticError when the Gram matrix has no Cholesky factor even with 1000
        times the damping.
        """
        shared = factors_of(seen[Gram()])
        new_OI, kept_OI = self.swept(weight_OI, keep_OI, shared, pattern, grid)
        if self.refit_steps:
            new_OI = self._refit(weight_OI.float(), new_OI, kept_OI, shared, self._damping(shared))
        return finish(weight_OI, new_OI, kept_OI, keep_OI, shared.gram_II, shared.all_notes())

    def swept(
        self, weight_OI: Tensor, keep_OI: Tensor, shared: Factors, pattern: Pattern, grid: Grid | None = None
    ) -> tuple[Tensor, Tensor]:
        """``repair`` but for the refit: the new weights, float32 (O, I), and which of them stay."""
        unit = self.damping_of is Damping.unit
        scale_I = shared.scale_I if unit else shared.scale_I.new_ones(())
        root_II = shared.inverse_root(self._damping(shared), unit)
        if grid is not None:  # points of the grid are weights as they are stored: (U S^-1) is the root in their units
            root_II, scale_I = root_II / scale_I, scale_I.new_ones(())
        work_OI = weight_OI.float() * scale_I
        dead_I = shared.dead_I & ~shared.dead_I.all()  # where all are, size alone is left to choose by
        if self.adaptive:
            work_OI = work_OI.masked_fill(dead_I, 0.0)
        kept_OI = keep_OI.clone()
        columns = self._columns if grid is None else _Rounding(self, grid, work_OI, keep_OI, root_II)
        width = self._block_width(pattern, grid)
        for start in range(0, work_OI.shape[1], width):
            here = slice(start, min(start + width, work_OI.shape[1]))
            if self.adaptive and not pattern.group_width:
                kept_OI[:, here] = _choose(work_OI[:, here] / root_II.diagonal()[here], keep_OI, here, pattern)
            _prune_block(work_OI, kept_OI, root_II, here, pattern, columns)
        new_OI = work_OI / scale_I
        if (
            self.adaptive and grid is None
        ):  # more inputs may be dead than weights are to go: what is kept stays as it was
            new_OI = weight_OI.float().where(dead_I & kept_OI, new_OI)
        return new_OI, kept_OI

    def _damping(self, shared: Factors) -> float:
        return shared.noise() if self.damping is None else self.damping

    def _refit(self, weight_OI: Tensor, new_OI: Tensor, keep_OI: Tensor, shared: Factors, damping: float) -> Tensor:
        """From SparseGPT's weights down to the least-squares ones for its mask, on the same damped Gram matrix."""
        damped_II = shared.damped(damping)
        if self.damping_of is Damping.mean:
            ridge = damping * shared.gram_II.diagonal().mean().float()
            damped_II = shared.damped(0.0).clone()
            damped_II.diagonal().add_(ridge / shared.scale_I.square())
        unit_OI, start_OI = weight_OI * shared.scale_I, new_OI * shared.scale_I
        return refit(unit_OI, keep_OI, damped_II, self.refit_steps, self.tolerance, start_OI) / shared.scale_I

    def _block_width(self, pattern: Pattern, grid: Grid | None) -> int:
        """The block size, rounded up to whole groups of either kind."""
        group = lcm(max(1, pattern.group_width), (grid.group if grid is not None else None) or 1)
        return -(-self.block_columns // group) * group

    def _columns(self, block_OB: Tensor, pruned_OB: Tensor, root_BB: Tensor, pattern: Pattern) -> Tensor:
        """The errors e, (O, B), of a block that is corrected, and masked, in place."""
        loops = load("sparsegpt_loops") if block_OB.device.type == "cpu" else None
        columns = self._columns_by_torch if loops is None else partial(self._columns_compiled, loops)
        return columns(block_OB, pruned_OB, root_BB, pattern)

    def _columns_by_torch(self, block_OB: Tensor, pruned_OB: Tensor, root_BB: Tensor, pattern: Pattern) -> Tensor:
        """``_columns`` by torch's operations.

        The block is turned, (B, O), so that a column is a contiguous row and a correction one rank-one update.
        """
        import torch

        block_BO, pruned_BO = block_OB.T.contiguous(), pruned_OB.T.contiguous()
        error_BO = torch.zeros_like(block_BO)
        group = pattern.group_width
        for j, pivot in enumerate(root_BB.diagonal().tolist()):
            if self.adaptive and group and j % group == 0:
                ahead = slice(j, j + group)
                score_BO = (block_BO[ahead] / root_BB.diagonal()[ahead, None]).square()
                pruned_BO[ahead] = ~pattern.keep(score_BO.T.contiguous()).T
            torch.mul(block_BO[j], pruned_BO[j], out=error_BO[j]).div_(pivot)
            block_BO[j:].addr_(root_BB[j, j:], error_BO[j], alpha=-1)
        pruned_OB.copy_(pruned_BO.T)
        block_OB.copy_(block_BO.masked_fill_(pruned_BO, 0.0).T)
        return error_BO.T

    def _columns_compiled(
        self, loops: ModuleType, block_OB: Tensor, pruned_OB: Tensor, root_BB: Tensor, pattern: Pattern
    ) -> Tensor:
        """The same in compiled loops, but for the rounding of its sums."""
        import torch

        n, m = self.chosen(pattern)
        error_OB = torch.empty_like(block_OB)

        def work(some: slice) -> None:
            block_RB, pruned_RB, error_RB = (each_OB[some].numpy() for each_OB in (block_OB, pruned_OB, error_OB))
            loops.prune_block(block_RB, pruned_RB, root_BB.numpy(), n, m, error_RB)

        each_piece(len(block_OB), HEAVY * block_OB.shape[1], work)
        return error_OB

    def chosen(self, pattern: Pattern) -> tuple[int, int]:
        """How many of how many columns are kept that a block chooses on its way; (0, 0) where their mask is known."""
        return (pattern.n, pattern.m) if self.adaptive and isinstance(pattern, NofM) else (0, 0)


@dataclass
class _Rounding:
    """``_columns`` of a sweep that also rounds to ``grid``: weights (O, I), their first mask, the root of H^-1."""

    sweep: SparseGPT
    grid: Grid
    weight_OI: Tensor
    keep_OI: Tensor
    root_II: Tensor

    def __post_init__(self) -> None:
        self.scale_O = self.weight_OI.new_ones(len(self.weight_OI))
        if self.grid.group is None:
            cost_I = self.root_II.diagonal().square().reciprocal()
            self.scale_O = self.grid.scales(self.weight_OI.masked_fill(~self.keep_OI, 0.0), cost_I)[:, 0]

    def __call__(self, block_OB: Tensor, pruned_OB: Tensor, root_BB: Tensor, pattern: Pattern) -> Tensor:
        loops = load("quantise_loops") if block_OB.device.type == "cpu" else None
        columns = self._by_torch if loops is None else partial(self._compiled, loops)
        return columns(block_OB, pruned_OB, root_BB, pattern)

    def _by_torch(self, block_OB: Tensor, pruned_OB: Tensor, root_BB: Tensor, pattern: Pattern) -> Tensor:
        import torch

        _, m = self.sweep.chosen(pattern)
        pivot_B, width = root_BB.diagonal(), self.grid.group
        error_OB, point_OB, scale_O1 = torch.zeros_like(block_OB), torch.zeros_like(block_OB), self.scale_O[:, None]
        for j in range(len(root_BB)):
            if m and j % m == 0:
                ahead = slice(j, j + m)
                pruned_OB[:, ahead] = ~pattern.keep((block_OB[:, ahead] / pivot_B[ahead]).square().contiguous())
            if width and j % width == 0:
                here = slice(j, j + width)
                left_OK = block_OB[:, here].masked_fill(pruned_OB[:, here], 0.0)
                scale_O1 = self.grid.scales(left_OK, pivot_B[here].square().reciprocal())
            weight_O1 = block_OB[:, j : j + 1]
            codes_O1 = (weight_O1 / scale_O1).round_().clamp_(self.grid.lowest, self.grid.highest)
            point_OB[:, j] = (codes_O1 * scale_O1 + 0.0)[:, 0].masked_fill(pruned_OB[:, j], 0.0)
            error_OB[:, j] = (block_OB[:, j] - point_OB[:, j]) / pivot_B[j]
            block_OB[:, j:].addr_(error_OB[:, j], root_BB[j, j:], alpha=-1)
        block_OB.copy_(point_OB)
        return error_OB

    def _compiled(
        self, loops: ModuleType, block_OB: Tensor, pruned_OB: Tensor, root_BB: Tensor, pattern: Pattern
    ) -> Tensor:
        import numpy
        import torch

        n, m = self.sweep.chosen(pattern)
        error_OB, grid, single = torch.empty_like(block_OB), self.grid, numpy.float32
        shares = numpy.array([share / grid.highest for share in SHARES], single)

        def work(some: slice) -> None:
            block_RB, pruned_RB, error_RB = (each_OB[some].numpy() for each_OB in (block_OB, pruned_OB, error_OB))
            loops.round_block(
                block_RB, pruned_RB, root_BB.numpy(), n, m, shares, grid.group or 0, single(grid.lowest),
                single(grid.highest), single(grid.smallest), self.scale_O[some].numpy(), error_RB,
            )  # fmt: skip

        each_piece(len(block_OB), HEAVY * block_OB.shape[1], work)
        return error_OB


def _prune_block(
    work_OI: Tensor,
    keep_OI: Tensor,
    root_II: Tensor,
    here: slice,
    pattern: Pattern,
    columns: Callable[[Tensor, Tensor, Tensor, Pattern], Tensor],
) -> None:
    """Prune the columns of one block in place, then correct all columns to its right with one product."""
    block_OB, pruned_OB = work_OI[:, here].contiguous(), (~keep_OI[:, here]).contiguous()
    error_OB = columns(block_OB, pruned_OB, root_II[here, here].contiguous(), pattern)
    keep_OI[:, here] = ~pruned_OB
    work_OI[:, here] = block_OB
    work_OI[:, here.stop :].addmm_(error_OB, root_II[here, here.stop :], alpha=-1)


def _choose(score_OB: Tensor, keep_OI: Tensor, here: slice, pattern: Pattern) -> Tensor:
    """The lowest |w_j| / U_jj of a block pruned, as many as its share of what `keep_OI` prunes; bool (O, B)."""
    by_row = pattern.by_rows
    rows, n_in = keep_OI.shape
    total = pattern.pruned(1, n_in) if by_row else pattern.pruned(rows, n_in)
    share = total * here.stop // n_in - total * here.start // n_in
    flat = score_OB.abs() if by_row else score_OB.abs().reshape(1, -1)
    return keep_largest(flat.contiguous(), share).reshape(score_OB.shape)
