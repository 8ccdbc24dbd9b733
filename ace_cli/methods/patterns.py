"""Which weights stay: what a sparsity means, how many weights it takes, whether a weight obeys it.

Shapes: O outputs, I inputs, G groups. Among equal scores the weight with the smaller index is pruned first: exactly
"sort ascending and stably, prune the first k".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from math import floor
from types import ModuleType
from typing import TYPE_CHECKING

from ace_cli.core.errors import AceError
from ace_cli.kernels.selection import Scaled, count_nonzero, keep_largest, keep_n_of_m, zero_n_of_m, zero_smallest

if TYPE_CHECKING:
    from torch import Tensor


class Scope(Enum):
    """What is compared under a ratio."""

    row = "row"  # the weights of one output
    layer = "layer"  # all weights of a slot


class Pattern:
    """Scores -> keep."""

    #: M for a pattern N:M; 0 where a whole row or layer is compared.
    group_width = 0
    #: True where the scores of a row decide alone what stays of it.
    by_rows = True

    def misfit(self, rows: int, columns: int) -> str | None:
        """Why the pattern cannot be laid on a (rows, columns) weight; None if it can."""
        return None

    def pruned(self, rows: int, columns: int) -> int:
        """How many weights of a (rows, columns) slot are pruned."""
        raise NotImplementedError

    def keep(self, score_OI: Tensor) -> Tensor:
        """bool (O, I): True where the weight stays. ``score_OI``: float32 without NaN."""
        raise NotImplementedError

    def zero(self, score: Tensor | Scaled, weight_RI: Tensor, loops: ModuleType | None) -> bool:
        """``keep``, in place: +0.0 in what it does not keep of some rows of a weight; False if a score is not finite.

        Of a pattern that is ``by_rows``, on a CPU; both are contiguous, the weight of any float dtype.
        """
        raise NotImplementedError

    def compared(self, rows: int, columns: int) -> tuple[int, int]:
        """How many consecutive weights of a (rows, columns) slot are compared, and how many of them may be kept."""
        raise NotImplementedError

    def check(self, weight_OI: Tensor, first: int = 0, loops: ModuleType | None = None) -> tuple[int, str | None]:
        """How many weights (any float dtype, on a CPU) are 0, and where they break the pattern, None if they hold it.

        If ``by_rows``, some rows of the weight will do: ``first`` is the number of the first one. In one thread.
        """
        width, allowed = self.compared(*weight_OI.shape)
        nonzero, most = count_nonzero(weight_OI, width, loops)
        problem = None
        if most > allowed:
            group = int((weight_OI != 0).reshape(-1, width).sum(1).argmax())
            problem = f"{self._place(group, first, weight_OI.shape[1])} {most} non-zeros, {allowed} allowed"
        return weight_OI.numel() - nonzero, problem

    def _place(self, group: int, first: int, columns: int) -> str:
        """Group number ``group`` of what is compared, in words, and "has" or "have"."""
        raise NotImplementedError


@dataclass(frozen=True)
class Ratio(Pattern):
    """Prune floor(p * n) of every n weights, n a row or the layer; p is exact, so 0.29 of 100 is 29."""

    p: Fraction
    scope: Scope = Scope.row

    @property
    def by_rows(self) -> bool:  # type: ignore[override]
        """Not if the whole layer is compared."""
        return self.scope is Scope.row

    def __str__(self) -> str:
        return f"{float(self.p):g}"

    def pruned(self, rows: int, columns: int) -> int:
        return rows * floor(columns * self.p) if self.scope is Scope.row else floor(rows * columns * self.p)

    def keep(self, score_OI: Tensor) -> Tensor:
        compared_RN = score_OI.reshape(1, -1) if self.scope is Scope.layer else score_OI
        return keep_largest(compared_RN, floor(compared_RN.shape[1] * self.p)).view(score_OI.shape)

    def zero(self, score: Tensor | Scaled, weight_RI: Tensor, loops: ModuleType | None) -> bool:
        return zero_smallest(score, floor(weight_RI.shape[1] * self.p), weight_RI, loops)

    def compared(self, rows: int, columns: int) -> tuple[int, int]:
        width = columns if self.scope is Scope.row else rows * columns
        return width, width - floor(width * self.p)

    def _place(self, group: int, first: int, columns: int) -> str:
        return f"row {first + group} has" if self.scope is Scope.row else "the layer has"


@dataclass(frozen=True)
class NofM(Pattern):
    """Keep n of every m consecutive inputs of a row. Most research code prunes n of m: 2:4 hides it, 1:4 does not."""

    n: int
    m: int

    @property
    def group_width(self) -> int:  # type: ignore[override]
        """M."""
        return self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def misfit(self, rows: int, columns: int) -> str | None:
        return f"its {columns} inputs do not divide by {self.m}" if columns % self.m else None

    def pruned(self, rows: int, columns: int) -> int:
        return rows * columns * (self.m - self.n) // self.m

    def keep(self, score_OI: Tensor) -> Tensor:
        return keep_n_of_m(score_OI, self.n, self.m)

    def zero(self, score: Tensor | Scaled, weight_RI: Tensor, loops: ModuleType | None) -> bool:
        return zero_n_of_m(score, self.n, self.m, weight_RI, loops)

    def compared(self, rows: int, columns: int) -> tuple[int, int]:
        return self.m, self.n

    def _place(self, group: int, first: int, columns: int) -> str:
        row, group = divmod(group, columns // self.m)
        return f"row {first + row}, inputs {group * self.m} to {group * self.m + self.m - 1} have"


def parse_sparsity(value: object, scope: Scope) -> Pattern:
    """``0.5``, ``50%`` or ``n:m`` (keep n of m) -> a pattern. Raises AceError for anything else."""
    hint = "Give a fraction (0.5), a percentage (50%) or keep-N-of-M (2:4)."
    if isinstance(value, int) and not isinstance(value, bool) and value >= 60:
        n, m = divmod(value, 60)
        raise AceError(
            f"sparsity={value}: YAML reads an unquoted {n}:{m} as this base-60 number.",
            f'Write it as "{n}:{m}"; a percentage as {value}%.',
        )
    text = str(value).strip()
    if group := re.fullmatch(r"(\d{1,9}):(\d{1,9})", text):
        n, m = int(group[1]), int(group[2])
        if not 0 < n < m:
            raise AceError(f"sparsity={text}: N:M keeps N of every M weights, so 0 < N < M.", hint)
        return NofM(n, m)
    try:
        if len(text) > 40 or re.search(r"[eE][+-]?\d{4}", text):
            raise ValueError("more digits than a number of weights has, and hours to work them out")
        p = Fraction(text[:-1]) / 100 if text.endswith("%") else Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise AceError(f"sparsity={text}: not a sparsity.", hint) from None
    if not 0 <= p < 1:
        raise AceError(f"sparsity={text}: the fraction pruned must lie in [0, 1).", hint)
    return Ratio(p, scope)
