"""What a method remembers of gradients: of a weight, window by window.

Shapes: L tokens of one window, I inputs, O outputs, B windows seen.

The gradient of a sum over tokens with respect to a weight W (O, I) is g = d^T x, x (L, I) the slot's inputs and d
(L, O) the gradient with respect to its outputs. So these statistics are fed with x and d, and no gradient of a
parameter is ever kept. Two sources of d:

* ``model``: of the loss of the dense model, mean over the targets of one window of -log p(next token). What the papers
  use; the whole model is in memory.
* ``block``: of one block, for models of any size (our reading). At the dense weights the error against the dense
  block's own output y has no gradient: it is at its minimum. So the target is drawn around y, every token off by its
  size: 1/2 sum_t |f(x)_t - y_t - s_t |y_t||^2 / |y_t|^2 has, up to the sign, the gradient d y_t = s_t / |y_t|, with s_t
  of independent signs. Over the draws its mean is 0, and its mean square is the diagonal of J^T J, the Gauss-Newton
  matrix of the block's relative error: how much moving the weight moves what the block puts out.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from ace_cli.methods.statistics import Statistic, accumulated

if TYPE_CHECKING:
    from torch import Tensor


class Source(Enum):
    """Whose error is led back: a block's, or the whole model's."""

    block = "block"
    model = "model"


@dataclass(unsafe_hash=True)
class Backward(Statistic):
    """A statistic of gradients. ``update(x_LI, d_LO, weight_OI)`` is called once for each window.

    ``seed`` draws the targets of ``source=block``.
    """

    source: Source = Source.block
    seed: int = 0

    needs_output = True
    needs_backward = True

    def flops(self, tokens: int, rows: int, columns: int) -> int:
        return 4 * tokens * rows * columns  # of the inputs, and of the weight


def _in_place(earlier: Any, later: Any) -> Any:
    return earlier.add_(later)


@dataclass(unsafe_hash=True)
class Gradient(Backward):
    """``total_OI`` = sum over windows of g^``power``, float32 (O, I), g the gradient of one window; ``windows``: B."""

    power: int = 1
    total_OI: Tensor = accumulated("OI", _in_place)
    windows: Tensor = accumulated("")

    def nbytes(self, tokens: int, rows: int, columns: int) -> int:
        return 4 * rows * columns

    def update(self, x_TI: Tensor, y_TO: Tensor, weight_OI: Tensor) -> None:
        gradient_OI = y_TO.float().T @ x_TI.float()
        total_OI = gradient_OI.square_() if self.power == 2 else gradient_OI
        self.add(len(x_TI), total_OI=total_OI, windows=x_TI.new_ones((), dtype=total_OI.dtype))

    @property
    def mean_OI(self) -> Tensor:
        """Mean over windows of g^power, float32 (O, I)."""
        return self.total_OI / self.windows


@dataclass(unsafe_hash=True)
class Salience(Backward):
    """Of every window what its rows and columns lose, to second order, if they go: s = W g - 1/2 W^2 g^2.

    ``rows_BO`` and ``columns_BI``: |sum of s| over a row, over a column (the vector as a whole); ``row_parts_BO`` and
    ``column_parts_BI``: sums of |s| (its elements). float32, one row for each window. g^2 of the window itself stands
    for the diagonal of the Hessian (empirical Fisher).
    """

    rows_BO: list[Tensor] = accumulated("BO")
    columns_BI: list[Tensor] = accumulated("BI")
    row_parts_BO: list[Tensor] = accumulated("BO")
    column_parts_BI: list[Tensor] = accumulated("BI")

    def update(self, x_TI: Tensor, y_TO: Tensor, weight_OI: Tensor) -> None:
        first_OI = (y_TO.float().T @ x_TI.float()).mul_(weight_OI)
        s_OI = first_OI.addcmul_(first_OI, first_OI, value=-0.5)
        rows_O, columns_I = s_OI.sum(1).abs_(), s_OI.sum(0).abs_()
        parts_OI = s_OI.abs_()
        self.add(
            len(x_TI), rows_BO=[rows_O[None]], columns_BI=[columns_I[None]], row_parts_BO=[parts_OI.sum(1)[None]],
            column_parts_BI=[parts_OI.sum(0)[None]],
        )  # fmt: skip


@dataclass(unsafe_hash=True)
class Gates(Backward):
    """``gates_BI``: of every window dL / dz_j = sum over i of W_ij g_ij, z_j = 1 a factor on input j; float32.

    With first-order terms alone: how fast the error changes when the input begins to leave.
    """

    gates_BI: list[Tensor] = accumulated("BI")

    def update(self, x_TI: Tensor, y_TO: Tensor, weight_OI: Tensor) -> None:
        gate_I = ((y_TO.float() @ weight_OI.float()) * x_TI.float()).sum(0)
        self.add(len(x_TI), gates_BI=[gate_I[None]])


def seed_faults(seed: int) -> list[str]:
    """What is wrong with the seed of a metric's drawn targets."""
    return [] if 0 <= seed < 2**62 else [f"metric.seed={seed}: must be between 0 and 2^62"]
