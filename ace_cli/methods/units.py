"""Units: inputs of a weight that go or stay together with all that makes them, and how many of them stay.

A channel of a multilayer perceptron is a row of gate and up and a column of down; a head is rows of q, k and v and
columns of o. Scores and repairs look at the weight that *reads* the units, and may ask for the rows that make them.

Shapes: O outputs, I inputs, R regions of which each keeps the same number of its W units, U = R W units, C inputs of
each, K units of one region that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import TYPE_CHECKING

from ace_cli.core.errors import AceError
from ace_cli.methods.allocation.base import apportioned

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.statistics import Seen


@dataclass(frozen=True)
class Units:
    """The units of one reading weight. ``columns_RWC``: its inputs that belong to each.

    ``producers()``: the weights whose rows make the inputs, each float32 (I, inputs of its own), row i for input i.
    ``makers()``: of the same weights what was seen of their gradients, and for each input its row (I,).
    """

    columns_RWC: Tensor
    producers: Callable[[], list[Tensor]] = lambda: []
    makers: Callable[[], list[tuple[Seen, Tensor]]] = lambda: []

    @property
    def count(self) -> int:
        """U."""
        return self.columns_RWC.shape[0] * self.columns_RWC.shape[1]

    def summed(self, score_I: Tensor) -> Tensor:
        """One number for each input -> their sums over a unit's, (U,)."""
        return score_I[self.columns_RWC.to(score_I.device)].sum(2).flatten()

    def best(self, score_U: Tensor, stay: int) -> Tensor:
        """bool (U,): the ``stay`` units of largest score in each region; among equal ones the first goes first."""
        import torch

        score_RW = score_U.view(self.columns_RWC.shape[:2])
        order_RW = score_RW.sort(dim=1, stable=True).indices
        keep_RW = torch.zeros_like(score_RW, dtype=torch.bool)
        return keep_RW.scatter_(1, order_RW[:, score_RW.shape[1] - stay :], True).flatten()

    def inputs(self, keep_U: Tensor, total: int) -> Tensor:
        """bool (U,) -> bool (I,) of a weight with ``total`` inputs: those that stay. Inputs of no unit always do."""
        import torch

        keep_I = torch.ones(total, dtype=torch.bool, device=keep_U.device)
        keep_I[self.columns_RWC.to(keep_U.device).flatten(0, 1)[~keep_U].flatten()] = False
        return keep_I


def rounded(width: int, wish: Fraction, multiple: int) -> int:
    """The multiple nearest to ``wish``, upwards in the middle; never more than ``width``."""
    return min(width, floor(wish / multiple + Fraction(1, 2)) * multiple)


def equal_width(name: str, width: int, share: Fraction, multiple: int) -> int:
    """How many of ``width`` units stay where all blocks keep the same number. AceError if none would, or all."""
    if multiple > width:
        raise AceError(
            f"unit.multiple={multiple} is more than the {width} {name}s there are.", f"Use {width} or less, such as 1."
        )
    stay = rounded(width, width * (1 - share), multiple)
    hint = f"Lower unit.multiple ({multiple}), or choose another share."
    if stay <= 0:
        raise AceError(f"sparsity={float(share):g} leaves none of the {width} {name}s.", hint)
    if stay == width and share:
        raise AceError(f"sparsity={float(share):g} takes none of the {width} {name}s away.", hint)
    return stay


def kept_width(name: str, width: int, keep: int, multiple: int) -> int:
    """``keep`` as it was asked for. AceError if there are not so many, or loaders would not like the number."""
    if not 0 < keep <= width:
        raise AceError(f"keep={keep}: a block has {width} {name}s.", f"Give 1 to {width}.")
    if keep % multiple and keep != width:
        near = keep // multiple * multiple
        hint = f"Use {near or near + multiple} or {near + multiple}, or unit.multiple=1."
        raise AceError(f"keep={keep} is no multiple of unit.multiple={multiple}.", hint)
    return keep


def uneven_widths(widths: Sequence[int], stay: Sequence[int], shares: Sequence[float], multiple: int) -> list[int]:
    """Widths near (1 - share) of each block's, multiples of ``multiple``, that sum up to what ``stay`` does.

    At least one multiple stays in each block. What does not divide stays with the first blocks that have room for it.
    """
    wishes = [width * (1 - share) / multiple for width, share in zip(widths, shares, strict=True)]
    most = [width // multiple for width in widths]
    counts = apportioned(wishes, [1] * len(widths), sum(stay) // multiple, 1, most)
    return [count * multiple for count in counts]
