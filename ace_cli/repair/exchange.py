"""Better masks of the same counts: exchange a kept weight for a pruned one wherever a row's output error falls.

What a row loses when the set P of its weights is pruned is v_P A v_P^T: the weights of a set leave together, and their
errors add up or cancel. Scores of single weights see the diagonal of A alone. The 1-swaps are those of SparseSwaps
(arXiv 2512.10922); the order in which they are tried is ours.

Shapes: O outputs (rows), I inputs, M inputs of a group. Everything here is (I, O), so that a group is contiguous.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ace_cli.repair.least_squares import factors_of

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.statistics import Gram

#: Inputs whose pull is kept up to date swap by swap; that of the others follows in one matrix product.
_BLOCK = 128

#: Inputs of a group where the pattern has none.
_WIDTH = 16

#: Multiples of the golden ratio fill the unit interval evenly: as keys of a sort they deal inputs out without a seed.
_GOLDEN = 0.6180339887498949


def exchanged(
    weight_OI: Tensor, keep_OI: Tensor, gram: Gram, width: int, sweeps: int, shrinkage: float | None
) -> tuple[Tensor, Tensor]:
    """A mask with as many weights in every row (every group of ``width`` for N:M) and no larger error in any.

    In unit coordinates V = W s, A = R + shrinkage * I (``repair.least_squares``). ``shrinkage=None``: the largest
    eigenvalue, above 1, that T tokens of uncorrelated inputs give to R (``Factors.edge``): directions that cannot be
    told from noise are not followed.

    Returns: bool (O, I) and the number of exchanges, int64 (). Raises ArithmeticError if the Gram matrix is not finite.
    """
    shared = factors_of(gram)
    matrix_II = shared.damped(shared.edge() if shrinkage is None else shrinkage)
    return descend(weight_OI.float() * shared.scale_I, keep_OI, matrix_II, width, sweeps)


def descend(unit_OI: Tensor, keep_OI: Tensor, matrix_II: Tensor, width: int, sweeps: int) -> tuple[Tensor, Tensor]:
    """``sweeps`` times through all groups: in each, every row makes the one exchange that lowers its error most.

    With r the pruned part of a row and c = A r, pruning p while reviving q changes the row's error r A r^T by

        D(p, q) = 2 v_p c_p + v_p^2 A_pp  -  2 v_q c_q + v_q^2 A_qq  -  2 v_p v_q A_pq.

    A group is one of the pattern's, or, for a ratio (``width`` 0), 16 inputs dealt out anew for every sweep. A sweep
    costs 2 O I^2 operations, all of them in matrix products.
    """
    import torch

    kept_IO, unit_IO = keep_OI.T.contiguous(), unit_OI.T.contiguous()
    count = torch.zeros((), dtype=torch.int64, device=unit_OI.device)
    for sweep in range(sweeps):
        order_I = None if width else _dealt(len(unit_IO), sweep + 1).to(unit_OI.device)
        if order_I is None:
            count += _sweep(unit_IO, kept_IO, matrix_II, width)
        else:
            some_IO = kept_IO[order_I]
            count += _sweep(unit_IO[order_I], some_IO, matrix_II[order_I][:, order_I], _WIDTH)
            kept_IO[order_I] = some_IO
    return kept_IO.T.contiguous(), count


def _dealt(inputs: int, turn: int) -> Tensor:
    """An order of the inputs, int64 (I,), another for every turn: neighbours in it are far apart in the weight."""
    import torch

    return (torch.arange(inputs, dtype=torch.float64) * (turn * _GOLDEN)).frac().argsort(stable=True)


def _sweep(unit_IO: Tensor, kept_IO: Tensor, matrix_II: Tensor, width: int) -> Tensor:
    """Once through all groups of ``width`` neighbours; changes ``kept_IO``; the number of exchanges, int64 ()."""
    import torch

    inputs = len(unit_IO)
    pull_IO = matrix_II @ unit_IO.masked_fill(kept_IO, 0.0)
    square_IO = unit_IO.square() * matrix_II.diagonal()[:, None]
    least_O = -1e-6 * square_IO.mean(0)  # what rounding can feign
    count = torch.zeros((), dtype=torch.int64, device=unit_IO.device)
    for first in range(0, inputs, max(1, _BLOCK // width) * width):
        block = slice(first, min(first + max(1, _BLOCK // width) * width, inputs))
        moved_BO = torch.zeros_like(unit_IO[block])
        for start in range(block.start, block.stop, width):
            group = slice(start, min(start + width, block.stop))
            within = slice(group.start - first, group.stop - first)
            taken_O = _exchange(
                unit_IO[group], kept_IO[group], pull_IO[group], square_IO[group], matrix_II[group, group], least_O,
                moved_BO[within],
            )  # fmt: skip
            pull_IO[block].addmm_(matrix_II[block, group], moved_BO[within])
            count += taken_O.sum()
        for rest in (slice(0, block.start), slice(block.stop, inputs)):
            pull_IO[rest].addmm_(matrix_II[rest, block], moved_BO)
    return count


def _exchange(
    unit_MO: Tensor,
    kept_MO: Tensor,
    pull_MO: Tensor,
    square_MO: Tensor,
    matrix_MM: Tensor,
    least_O: Tensor,
    moved_MO: Tensor,
) -> Tensor:
    """The best exchange of one group in every row that has one: changes ``kept_MO`` and what is pruned, ``moved_MO``.

    Returns: which rows made one, bool (O,).
    """
    import torch

    linear_MO = 2 * unit_MO * pull_MO
    prune_MO = (square_MO + linear_MO).masked_fill_(~kept_MO, float("inf"))
    revive_MO = (square_MO - linear_MO).masked_fill_(kept_MO, float("inf"))
    both_MMO = (-2 * matrix_MM)[:, :, None] * unit_MO[:, None] * unit_MO
    change_MMO = both_MMO.add_(prune_MO[:, None]).add_(revive_MO)
    change_O, pair_O = change_MMO.flatten(0, 1).min(0)
    taken_O = change_O < least_O
    out_1O, back_1O = (pair_O // len(unit_MO))[None], (pair_O % len(unit_MO))[None]
    moved_MO.scatter_(0, out_1O, unit_MO.gather(0, out_1O)).scatter_(0, back_1O, -unit_MO.gather(0, back_1O))
    moved_MO.mul_(taken_O)
    taken_1O = taken_O[None]
    kept_MO ^= torch.zeros_like(kept_MO).scatter_(0, out_1O, taken_1O).scatter_(0, back_1O, taken_1O)
    return taken_O
