"""What every repair shares: the layer-wise least-squares problem and what can be factored once per input.

Shapes: T tokens, I inputs, O outputs.

All repairs work in *unit coordinates*: with s_j = sqrt(G_jj), the weights become V = W s and the Gram matrix the
correlation-like R = G / (s s^T), whose diagonal is one. A repaired row z then has the error

    (v - z) A (v - z)^T,   A = R + shrinkage * I,

which is ||(w - w') X||^2 + shrinkage * ||(w - w') s||^2: the second term pulls towards the *original* weights, and is
the first one with uncorrelated inputs in place of the measured ones. No scale of the inputs changes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import TYPE_CHECKING

from ace_cli.kernels.selection import all_finite
from ace_cli.methods.repair.base import Repaired

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.statistics import Gram

#: Weights refitted at a time on a CPU.
_CACHED = 1 << 17

#: Inputs of a part of a Gram matrix whose loss is summed at a time.
_PART = 256

#: Columns of a triangular matrix that are solved at once.
_SOLVED = 256

#: Bytes for every element of a Gram matrix that its factors take at most, themselves included: measured at 3,072
#: inputs. A matrix in float64, its Cholesky factor and a copy; for the inverse, the damped matrix, too.
ROOT_BYTES, INVERSE_BYTES = 20, 24

#: And for every weight, beside itself: the one that is worked on, the new one, and what either loses.
COPIES = 12

LADDER = (1.0, 10.0, 100.0, 1000.0)


#: Of anything that is repeated until it is good enough: more is a slip of the keyboard that nobody would wait for.
MOST_STEPS = 10_000


def pull_faults(name: str, pull: float | None, tolerance: float) -> list[str]:
    """Faults of the knobs every repair here has: the pull towards the original weights, and when a fit is enough."""
    found = []
    if pull is not None and not 0 <= pull <= 1e9:
        found.append(f"repair.{name} is {pull}: give 0 up to 1e9, such as 0.01, or null for inputs / tokens")
    if not 0 <= tolerance < 1:
        found.append(f"repair.tolerance is {tolerance}: give 0 up to 1, such as 0.01")
    return found


@dataclass
class Factors:
    """One input's G = sum_t x_t x_t^T (I, I) and the factors made from it, shared by every slot that reads this input.

    Everything is computed on first use and kept; `notes` says which damping a factor needed in the end.
    """

    gram_II: Tensor
    n_tokens: int
    notes: list[str] = field(default_factory=list)
    _made: dict[tuple[str, float], Tensor] = field(default_factory=dict, repr=False)

    @property
    def dead_I(self) -> Tensor:
        """Inputs that were zero in every calibration token."""
        return self.gram_II.diagonal() <= 0

    @property
    def scale_I(self) -> Tensor:
        """s_j = sqrt(G_jj), and 1 for a dead input; float32."""
        return self.gram_II.diagonal().clamp_min(0).sqrt().masked_fill(self.dead_I, 1.0).float()

    def noise(self) -> float:
        """I / T, the variance of the eigenvalues of R when the true inputs are uncorrelated (Marchenko & Pastur, 1967).

        The shrinkage that suits the number of tokens: 0.28 for 576 inputs and 2,048 tokens, 0.035 with 8 times as many.
        """
        return self.gram_II.shape[0] / max(1, self.n_tokens)

    def edge(self) -> float:
        """(1 + sqrt(I / T))^2 - 1: by how much the largest eigenvalue of R exceeds 1 when the inputs are uncorrelated.

        Marchenko & Pastur (1967). 1.34 for 576 inputs and 2,048 tokens, 0.41 with 8 times as many.
        """
        return (1 + sqrt(self.noise())) ** 2 - 1

    def all_notes(self) -> list[str]:
        """What a report should say about this input."""
        dead, all_of_them = int(self.dead_I.sum()), self.dead_I.numel()
        if not dead:
            return self.notes
        what = ": nothing tells its weights apart but their size" if dead == all_of_them else ""
        return [*self.notes, f"{dead} of {all_of_them} inputs were zero in all {self.n_tokens} tokens{what}"]

    def damped(self, shrinkage: float) -> Tensor:
        """A = R + shrinkage * I in unit coordinates, (I, I) float32; a dead input has R_jj = 0.

        Raises ArithmeticError on NaN or Inf, which would otherwise pass for weights that need no repair.
        """
        key = ("damped", shrinkage)
        if key not in self._made:
            inverse_I = 1 / self.gram_II.diagonal().clamp_min(0).sqrt().masked_fill(self.dead_I, 1.0)
            unit = (self.gram_II * inverse_I[:, None]).mul_(inverse_I).float()
            if not all_finite(unit):
                raise ArithmeticError(f"the Gram matrix of {self.n_tokens} tokens holds NaN or Inf")
            unit.diagonal().add_(shrinkage)
            self._made[key] = unit
        return self._made[key]

    def inverse(self, ridge: float) -> Tensor:
        """(R + ridge * I)^{-1}, (I, I) float32, by Cholesky in float64 and the damping ladder."""
        key = ("inverse", ridge)
        if key not in self._made:
            import torch

            lower = self.cholesky(self.damped(0.0).double(), ridge)
            self._made[key] = torch.cholesky_inverse(lower).float()
        return self._made[key]

    def learned(self, cross_OI: Tensor, shrinkage: float, least_I: Tensor | None = None) -> Tensor:
        """D = C (G + shrinkage * diag(s^2))^{-1}, float64 (O, I), for C = sum_t d_t x_t^T, (O, I).

        s_j^2 is G_jj, or ``least_I`` (I,) where that is more. The exact minimum of sum_t ||D x_t - d_t||^2 +
        shrinkage * ||D s||^2: what of the outputs d the inputs tell. By Cholesky in float64 and the damping ladder.
        """
        import torch

        unit_II = self.damped(0.0).double()
        if least_I is not None:
            unit_II.diagonal().add_(shrinkage * (least_I / self.scale_I.square() - 1).clamp_min(0))
        lower_II = self.cholesky(unit_II, shrinkage)
        unit_IO = (cross_OI / self.scale_I).T.double()
        return torch.cholesky_solve(unit_IO, lower_II).T / self.scale_I

    def inverse_root(self, damping: float, unit: bool) -> Tensor:
        """U upper triangular with U^T U = H^{-1}, (I, I) float32 (SparseGPT, algorithm 1).

        unit=False: H = G with 1 on a dead diagonal, + damping * mean(diag) * I, as published.
        unit=True: H = R + damping * I in unit coordinates.
        """
        key = ("root of R" if unit else "root of G", damping)
        if key not in self._made:
            matrix = (self.damped(0.0) if unit else self.gram_II).flip(0, 1).double()
            matrix.diagonal()[self.dead_I.flip(0)] = 1.0
            lower = self.cholesky(matrix, damping * float(matrix.diagonal().mean()))
            del matrix
            # from its last input to its first H = L L^T, so H^{-1} = L^{-T} L^{-1}, and L^{-1} turned back is upper
            _invert_lower(lower)
            self._made[key] = lower.float().flip(0, 1)
        return self._made[key]

    def cholesky(self, matrix_II: Tensor, ridge: float) -> Tensor:
        """Lower Cholesky factor of matrix + ridge * I; a failure raises the ridge tenfold, three times at most, noted.

        Changes the matrix. Raises ArithmeticError when the last step fails too.
        """
        import torch

        diagonal_I = matrix_II.diagonal().clone()
        floor = 1e-8 * float(diagonal_I.mean())
        for step in LADDER:
            tried = ridge if step == 1.0 else max(ridge, floor) * step
            matrix_II.diagonal().copy_(diagonal_I + tried)
            lower: Tensor
            lower, failed = torch.linalg.cholesky_ex(matrix_II)
            if not int(failed) and bool(lower.diagonal().isfinite().all()):  # what is not finite reaches a pivot
                if step > 1.0:
                    self.notes.append(
                        f"damping raised {step:g} times, from {ridge:.3g} to {tried:.3g}: the Gram matrix was singular"
                    )
                return lower
        raise ArithmeticError(
            f"the Gram matrix has no Cholesky factor, even with {tried:.3g} on its diagonal: are there NaN or Inf?"
        )


def _invert_lower(lower_NN: Tensor) -> None:
    """In place, by halves: [[A, 0], [B, C]]^{-1} = [[A^{-1}, 0], [-C^{-1} B A^{-1}, C^{-1}]]."""
    import torch

    size = len(lower_NN)
    if size <= _SOLVED:
        lower_NN.copy_(torch.linalg.solve_triangular(lower_NN, torch.eye(size).to(lower_NN), upper=False))
        return
    half = size // 2
    first_AA, last_CC = lower_NN[:half, :half], lower_NN[half:, half:]
    _invert_lower(first_AA)
    _invert_lower(last_CC)
    lower_NN[half:, :half] = (last_CC @ lower_NN[half:, :half]).neg_() @ first_AA


def factors_of(gram: Gram) -> Factors:
    """The factors of a Gram statistic, made once and kept with it: slots that read one input share both."""
    if gram.factors is None:
        gram.factors = Factors(gram.total_II, gram.tokens)
    factors: Factors = gram.factors
    return factors


def row_errors(change_OI: Tensor, matrix_II: Tensor) -> Tensor:
    """e_i = d_i A d_i^T for every row d_i of the change, (O,)."""
    return ((change_OI @ matrix_II) * change_OI).sum(1)


def layer_loss(change_OI: Tensor, gram_II: Tensor) -> float:
    """sum_i d_i G d_i^T = ||(W - W') X||_F^2; float32 products of half the symmetric G, summed in float64."""
    import torch

    change_OI, gram_II = change_OI.float(), gram_II.float()
    total = change_OI.new_zeros((), dtype=torch.float64)
    for first in range(0, len(gram_II), _PART):
        part, rest = slice(first, first + _PART), slice(first + _PART, None)
        seen_OP = change_OI[:, part] @ gram_II[part, part]
        seen_OP.addmm_(change_OI[:, rest], gram_II[rest, part], alpha=2)  # and, mirrored, what rest sees of part
        total += seen_OP.mul_(change_OI[:, part]).sum(dtype=torch.float64)
    return float(total)


def refit_flops(rows: int, columns: int, steps: int) -> int:
    """Of ``refit`` and ``finish``, at most: rows that are near enough rest."""
    return 2 * (steps + 5) * rows * columns**2


def factor_flops(columns: int) -> int:
    """Of one of ``Factors``, in operations of float32: in float64 they take twice as long."""
    return 4 * columns**3


def refit(
    unit_OI: Tensor, keep_OI: Tensor, damped_II: Tensor, steps: int, tolerance: float, start_OI: Tensor | None = None
) -> Tensor:
    """argmin of sum_i (v_i - z_i) A (v_i - z_i)^T over Z that is zero where pruned; (O, I) in unit coordinates.

    Conjugate gradients on the kept inputs, as ALPS (arXiv 2406.07831) ends; every step lowers the error of every row.
    Each row starts from the better of its masked weights and `start_OI`, and rests once its residual (V - Z) A is below
    `tolerance` of V A, or what float32 resolves of it: on what is left of a residual then, steps lead away. Rows know
    nothing of each other: on a CPU, as many as its caches hold are fitted at a time.
    """
    import torch

    rows = max(16, _CACHED // unit_OI.shape[1]) if unit_OI.device.type == "cpu" else len(unit_OI)
    fitted = torch.empty_like(unit_OI)
    for first in range(0, len(unit_OI), rows):
        some = slice(first, first + rows)
        start = None if start_OI is None else start_OI[some]
        fitted[some] = _refit_rows(unit_OI[some], keep_OI[some], damped_II, steps, tolerance, start)
    return fitted


def _refit_rows(
    unit_OI: Tensor, keep_OI: Tensor, damped_II: Tensor, steps: int, tolerance: float, start_OI: Tensor | None
) -> Tensor:
    import torch

    kept = keep_OI.to(unit_OI.dtype)
    fitted = unit_OI * kept
    if start_OI is not None:
        better = row_errors(unit_OI - start_OI, damped_II) < row_errors(unit_OI - fitted, damped_II)
        fitted = torch.where(better[:, None], start_OI, fitted)
    residual = ((unit_OI - fitted) @ damped_II).mul_(kept)
    direction = residual.clone()
    size = residual.square().sum(1)
    enough = max(tolerance, torch.finfo(torch.float32).eps) ** 2 * (unit_OI @ damped_II).mul_(kept).square_().sum(1)
    turned = torch.empty_like(direction)
    for _ in range(steps):
        moving = size > enough
        if not bool(moving.any()):
            break
        torch.mm(direction, damped_II, out=turned).mul_(kept)
        curve = (direction * turned).sum(1)
        step = torch.where(moving & (curve > 0), size / curve, torch.zeros_like(size))[:, None]
        fitted.addcmul_(step, direction)
        residual.addcmul_(step, turned, value=-1)
        new = residual.square().sum(1)
        direction.mul_(torch.where(moving, new / size, torch.zeros_like(size))[:, None]).add_(residual)
        size = new
    return fitted


def finish(
    weight_OI: Tensor, new_OI: Tensor, keep_OI: Tensor, first_keep_OI: Tensor, gram_II: Tensor, notes: list[str]
) -> Repaired:
    """Exact zeros where pruned, losses against the weights of the first mask, and the notes."""
    weight = weight_OI.float()
    new = new_OI.float().masked_fill(~keep_OI, 0.0)
    before = layer_loss(weight.masked_fill(first_keep_OI, 0.0), gram_II)
    return Repaired(new, keep_OI, notes, before, layer_loss(weight - new, gram_II))
