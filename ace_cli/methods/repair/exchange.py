"""Better masks of the same counts: exchange a kept weight for a pruned one wherever a row's output error falls.

What a row loses when the set P of its weights is pruned is v_P A v_P^T: the weights of a set leave together, and their
errors add up or cancel. Scores of single weights see the diagonal of A alone. The 1-swaps are those of SparseSwaps
(arXiv 2512.10922); the order in which they are tried is ours.

Shapes: O outputs (rows), R of them at a time, I inputs, B of a block, G groups of M, P = M (M - 1) / 2 pairs of one.
In torch's operations inputs come first: a group is contiguous, and every row makes its exchange in the same few.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ace_cli.kernels.loops import load
from ace_cli.kernels.threads import HEAVY, each_piece
from ace_cli.methods.repair.least_squares import factors_of

if TYPE_CHECKING:
    from types import ModuleType

    import torch
    from torch import Tensor

    from ace_cli.methods.statistics import Gram

#: Where loops are not compiled: inputs whose pull is kept up to date group by group; that of the others follows in one
#: matrix product.
_BLOCK = 128

#: Inputs of a group where the pattern has none.
_WIDTH = 16

#: There too, rows handled at a time: enough that calling torch costs little beside the work, few enough for a small
#: memory.
_ROWS = 2048

#: What a compiled sweep costs for every weight, in operations of large matrix products: looking at the pairs, and, for
#: every input, what follows from the exchanges; counted in profiles of SmolLM2-135M and of weights of the 7B shape.
_LOOKING, _FOLLOWING = 2_100, 0.15

#: Multiples of the golden ratio fill the unit interval evenly: as keys of a sort they deal inputs out without a seed.
_GOLDEN = 0.6180339887498949

#: An exchange gains at least so much of the mean v_j^2 A_jj of its row: less is what rounding can feign.
_LEAST = 1e-6

#: Makes a pair impossible, and leaves finite what is multiplied by zero.
_NEVER = 1e30


def exchanged(
    weight_OI: Tensor, keep_OI: Tensor, gram: Gram, width: int, sweeps: int, shrinkage: float | None
) -> Tensor:
    """A mask with as many weights in every row (every group of ``width`` for N:M) and no larger error in any.

    In unit coordinates V = W s, A = R + shrinkage * I (``repair.least_squares``). ``shrinkage=None``: the largest
    eigenvalue, above 1, that T tokens of uncorrelated inputs give to R (``Factors.edge``): directions that cannot be
    told from noise are not followed.

    Returns: bool (O, I). Raises ArithmeticError if the Gram matrix is not finite.
    """
    shared = factors_of(gram)
    matrix_II = shared.damped(shared.edge() if shrinkage is None else shrinkage)
    return descend(weight_OI.float() * shared.scale_I, keep_OI, matrix_II, width, sweeps)


def descend(unit_OI: Tensor, keep_OI: Tensor, matrix_II: Tensor, width: int, sweeps: int) -> Tensor:
    """``sweeps`` times through all groups: in each, every row makes the one exchange that lowers its error most.

    With r the pruned part of a row, c = A r and y_j = v_j where kept, -v_j where pruned, a change of sides of input j
    alone changes the row's error r A r^T by f_j = v_j^2 A_jj + 2 y_j c_j; an exchange of p and q, one of them kept, by

        D(p, q) = f_p + f_q - 2 v_p v_q A_pq.

    A group is one of the pattern's, or, for a ratio (``width`` 0), 16 inputs dealt out anew for every sweep. c takes
    2 O I^2 operations at the start, and is kept up to date: by compiled loops, 4 I for every exchange made; where there
    are none, in matrix products, 2 O I^2 in every sweep. Rows know nothing of each other.
    """
    if unit_OI.device.type == "cpu" and (loops := load("exchange_loops")) is not None:
        return _descend_compiled(unit_OI, keep_OI, matrix_II, width, sweeps, loops)
    unit_IO, side_IO = unit_OI.T.contiguous(), (2 * keep_OI.T.float() - 1).contiguous()
    pull_IO = matrix_II @ (unit_IO * (side_IO < 0))
    for sweep in range(sweeps):
        if width:
            _sweep(unit_IO, side_IO, pull_IO, matrix_II, slice(None), width)
        else:
            order_I = _dealt(len(unit_IO), sweep + 1).to(unit_OI.device)
            _sweep(unit_IO, side_IO, pull_IO, matrix_II[order_I[:, None], order_I], order_I, _WIDTH)
    return (side_IO > 0).T.contiguous()


def _descend_compiled(
    unit_OI: Tensor, keep_OI: Tensor, matrix_II: Tensor, width: int, sweeps: int, loops: ModuleType
) -> Tensor:
    """``descend``; sums are rounded in another order, so of exchanges that gain the same it may make the other."""
    import torch

    kept_OI = keep_OI.clone(memory_format=torch.contiguous_format)
    pull_OI = unit_OI.masked_fill(keep_OI, 0.0) @ matrix_II
    moving_O = torch.ones(len(unit_OI), dtype=torch.bool)
    by_row = [each.numpy() for each in (unit_OI.contiguous(), kept_OI, pull_OI, moving_O)]
    matrix = matrix_II.contiguous().numpy()
    for sweep in range(sweeps):
        if not width or not sweep:
            order_I = torch.arange(len(matrix_II)) if width else _dealt(len(matrix_II), sweep + 1)
            order, beside_GMM = order_I.numpy().astype("uint64"), _within(matrix_II, order_I, width or _WIDTH).numpy()
            moving_O.fill_(True)  # other groups, other exchanges; of the same ones, a row that made none is at its end
        every = (matrix, order, beside_GMM, _LEAST)

        def work(some: slice, every: Any = every) -> None:
            loops.sweep(*(each[some] for each in by_row), *every)

        each_piece(len(unit_OI), HEAVY * unit_OI.shape[1], work)
    return kept_OI


def _within(matrix_II: Tensor, order_I: Tensor, width: int) -> Tensor:
    """A within every group of ``order_I``, (G, M, M); the last one ends with repetitions where it is smaller."""
    import torch

    groups = -(-len(order_I) // width)
    place_GM = torch.arange(groups * width).clamp_(max=len(order_I) - 1).view(groups, width)
    order_GM = order_I[place_GM]
    return matrix_II[order_GM[:, :, None], order_GM[:, None, :]]


def exchange_bytes(columns: int) -> int:
    """The damped matrix, and where no loops are compiled, its inputs in another order."""
    return 8 * columns**2


def exchange_flops(rows: int, columns: int, sweeps: int) -> int:
    """In operations of large matrix products; roughly, and where the loops are compiled."""
    return round(rows * columns * (2 * columns + sweeps * (_LOOKING + _FOLLOWING * columns)))


def _dealt(inputs: int, turn: int) -> Tensor:
    """An order of the inputs, int64 (I,), another for every turn: neighbours in it are far apart in the weight."""
    import torch

    return (torch.arange(inputs, dtype=torch.float64) * (turn * _GOLDEN)).frac().argsort(stable=True)


# --- in torch's operations, where loops are not compiled -------------------------------------------------------------


def _sweep(
    unit_IO: Tensor, side_IO: Tensor, pull_IO: Tensor, matrix_II: Tensor, order_I: Tensor | slice, width: int
) -> None:
    """Once through all groups of ``width`` neighbours in ``order_I``, which is that of ``matrix_II`` already.

    Changes ``side_IO``, 1 where kept, -1 where pruned, and ``pull_IO``.
    """
    beside = _beside(matrix_II, width)
    rows = _ROWS if unit_IO.device.type == "cpu" else unit_IO.shape[1]  # a device is called as rarely as can be
    for first in range(0, unit_IO.shape[1], rows):
        some = slice(first, first + rows)
        unit_IR, side_IR, pull_IR = (each_IO[:, some][order_I].contiguous() for each_IO in (unit_IO, side_IO, pull_IO))
        _sweep_rows(unit_IR, side_IR, pull_IR, matrix_II, beside, width)
        side_IO[order_I, some], pull_IO[order_I, some] = side_IR, pull_IR


def _sweep_rows(
    unit_IR: Tensor, side_IR: Tensor, pull_IR: Tensor, matrix_II: Tensor, beside: list[Tensor], width: int
) -> None:
    import torch

    y_IR = side_IR * unit_IR
    square_IR = unit_IR.square() * matrix_II.diagonal()[:, None]
    least_R = -_LEAST * square_IR.mean(0)
    wide = max(1, _BLOCK // width) * width
    for first in range(0, len(unit_IR), wide):
        block = slice(first, min(first + wide, len(unit_IR)))
        moved_BR = torch.zeros_like(unit_IR[block])
        for start in range(block.start, block.stop - 1, width):  # one input left over has no partner
            group = slice(start, min(start + width, block.stop))
            p_PM, q_PM, pairs_PM = _pairs(group.stop - start, unit_IR.device)
            y_MR, side_MR, moved_MR = y_IR[group], side_IR[group], moved_BR[start - first : group.stop - first]
            both_PR = (p_PM @ unit_IR[group]).mul_(q_PM @ unit_IR[group])
            change_PR = pairs_PM @ torch.add(square_IR[group], y_MR * pull_IR[group], alpha=2)
            change_PR.addcmul_(both_PR, beside[start // width], value=-2)
            sides_PR = pairs_PM @ side_MR  # 0 where they differ
            change_R, pair_R = change_PR.addcmul_(sides_PR, sides_PR, value=_NEVER).min(0)
            turned_MR = pairs_PM.index_select(0, pair_R).T * (change_R < least_R)
            torch.mul(y_MR, turned_MR, out=moved_MR)
            y_MR.sub_(moved_MR, alpha=2)
            side_MR.addcmul_(side_MR, turned_MR, value=-2)
            pull_IR[block].addmm_(matrix_II[block, group], moved_MR)
        for rest in (slice(0, block.start), slice(block.stop, len(unit_IR))):
            pull_IR[rest].addmm_(matrix_II[rest, block], moved_BR)


@lru_cache(maxsize=16)
def _pairs(width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """One of each pair of a group, the other, both: 0 or 1, float32 (P, M). Small products pick faster than indices."""
    import torch

    p_P, q_P = torch.triu_indices(width, width, 1, device=device)
    one_MM = torch.eye(width, device=device)
    return one_MM[p_P], one_MM[q_P], one_MM[p_P] + one_MM[q_P]


def _beside(matrix_II: Tensor, width: int) -> list[Tensor]:
    """A_pq of the pairs of every group, (P, 1) each; the last group may be smaller."""
    import torch

    whole = len(matrix_II) // width * width
    first_G1 = torch.arange(0, whole, width, device=matrix_II.device)[:, None]
    p_P, q_P = torch.triu_indices(width, width, 1, device=matrix_II.device)
    groups = list(matrix_II[first_G1 + p_P, first_G1 + q_P].unsqueeze(2))
    return groups if whole == len(matrix_II) else [*groups, *_beside(matrix_II[whole:, whole:], len(matrix_II) - whole)]
