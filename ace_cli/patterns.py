"""Which weights stay: scores -> keep. Exact counts, stable ties, the same choice on every device.

Shapes: O outputs, I inputs, G groups. Among equal scores the weight with the smaller index is pruned first: exactly
"sort ascending and stably, prune the first k".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from math import floor
from typing import TYPE_CHECKING

from ace_cli.errors import AceError

if TYPE_CHECKING:
    from torch import Tensor

#: Rows are handled in chunks of about this many scores, so that intermediates stay in the processor's caches.
_CHUNK = 1 << 18


class Scope(Enum):
    """What is compared under a ratio."""

    row = "row"  # the weights of one output
    layer = "layer"  # all weights of a slot


class Pattern:
    """Scores -> keep."""

    #: M for a pattern N:M; 0 where a whole row or layer is compared.
    group_width = 0

    def misfit(self, rows: int, columns: int) -> str | None:
        """Why the pattern cannot be laid on a (rows, columns) weight; None if it can."""
        return None

    def pruned(self, rows: int, columns: int) -> int:
        """How many weights of a (rows, columns) slot are pruned."""
        raise NotImplementedError

    def keep(self, score_OI: Tensor) -> Tensor:
        """bool (O, I): True where the weight stays. ``score_OI``: float32 without NaN."""
        raise NotImplementedError

    def violation(self, weight_OI: Tensor) -> str | None:
        """Where a stored weight breaks the pattern (non-zeros beyond those allowed); None if it holds."""
        raise NotImplementedError


@dataclass(frozen=True)
class Ratio(Pattern):
    """Prune floor(p * n) of every n weights, n a row or the layer; p is exact, so 0.29 of 100 is 29."""

    p: Fraction
    scope: Scope = Scope.row

    def __str__(self) -> str:
        return f"{float(self.p):g}"

    def pruned(self, rows: int, columns: int) -> int:
        return rows * floor(columns * self.p) if self.scope is Scope.row else floor(rows * columns * self.p)

    def keep(self, score_OI: Tensor) -> Tensor:
        import torch

        if self.scope is Scope.layer:
            flat_1N = score_OI.reshape(1, -1)
            return _keep_largest(flat_1N, floor(flat_1N.shape[1] * self.p)).view_as(score_OI)
        k = floor(score_OI.shape[1] * self.p)
        return torch.cat([_keep_largest(chunk_RI, k) for chunk_RI in _row_chunks(score_OI)])

    def violation(self, weight_OI: Tensor) -> str | None:
        if self.scope is Scope.layer:
            weight_OI = weight_OI.reshape(1, -1)
        kept = weight_OI.shape[1] - floor(weight_OI.shape[1] * self.p)
        nonzero_O = _count_true(weight_OI != 0)
        if int(nonzero_O.max()) <= kept:
            return None
        row = int(nonzero_O.argmax())
        where = f"row {row}" if self.scope is Scope.row else "the layer"
        return f"{where} has {int(nonzero_O[row])} non-zeros, {kept} allowed"


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
        import torch

        groups = self._keep_groups if self.m <= 8 else self._keep_groups_sorted
        return torch.cat([groups(chunk_RI.reshape(-1, self.m)).view_as(chunk_RI) for chunk_RI in _row_chunks(score_OI)])

    def _keep_groups(self, score_GM: Tensor) -> Tensor:
        """A weight stays if fewer than n of its group beat it: m (m - 1) / 2 comparisons of whole columns."""
        import torch

        columns = [column_G.contiguous() for column_G in score_GM.unbind(1)]
        beaten_by: list[Tensor | int] = [0] * self.m
        for i in range(self.m):
            for j in range(i + 1, self.m):
                later_wins_G = columns[j] >= columns[i]
                beaten_by[i] = later_wins_G.byte() + beaten_by[i]
                beaten_by[j] = (~later_wins_G).byte() + beaten_by[j]
        return torch.stack([torch.as_tensor(count_G) < self.n for count_G in beaten_by], dim=1)

    def _keep_groups_sorted(self, score_GM: Tensor) -> Tensor:
        """The same by a stable sort, cheaper where m is large."""
        import torch

        order_GM = score_GM.sort(dim=1, stable=True).indices[:, : self.m - self.n]
        return score_GM.new_ones(score_GM.shape, dtype=torch.bool).scatter_(1, order_GM, False)

    def violation(self, weight_OI: Tensor) -> str | None:
        nonzero_GM = (weight_OI != 0).short().reshape(-1, self.m)
        nonzero_G = sum(nonzero_GM[:, 1:].unbind(1), start=nonzero_GM[:, 0])
        if int(nonzero_G.max()) <= self.n:
            return None
        row, group = divmod(int(nonzero_G.argmax()), weight_OI.shape[1] // self.m)
        return (
            f"row {row}, inputs {group * self.m} to {group * self.m + self.m - 1} have {int(nonzero_G.max())} "
            f"non-zeros, {self.n} allowed"
        )


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
    if group := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = int(group[1]), int(group[2])
        if not 0 < n < m:
            raise AceError(f"sparsity={text}: N:M keeps N of every M weights, so 0 < N < M.", hint)
        return NofM(n, m)
    try:
        p = Fraction(text[:-1]) / 100 if text.endswith("%") else Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise AceError(f"sparsity={text}: not a sparsity.", hint) from None
    if not 0 <= p < 1:
        raise AceError(f"sparsity={text}: the fraction pruned must lie in [0, 1).", hint)
    return Ratio(p, scope)


def _keep_largest(score_RN: Tensor, k: int) -> Tensor:
    """bool (R, N): all but the k smallest of each row, ties by index."""
    import torch

    if k == 0:
        return score_RN.new_ones(score_RN.shape, dtype=torch.bool)
    threshold_R1 = _kth_smallest(score_RN, k)
    keep_RN = score_RN > threshold_R1
    short_R = score_RN.shape[1] - k - _count_true(keep_RN)
    if bool((tied := short_R > 0).any()):  # several weights share the threshold: the last of them stay
        equal_RN = score_RN[tied] == threshold_R1[tied]
        from_the_end_RN = equal_RN.flip(1).cumsum(1).flip(1)
        keep_RN[tied] |= equal_RN & (from_the_end_RN <= short_R[tied, None])
    return keep_RN


def _kth_smallest(score_RN: Tensor, k: int) -> Tensor:
    """The k-th smallest of each row, (R, 1): an order statistic, so any exact algorithm gives the same."""
    if score_RN.device.type != "cpu":
        return score_RN.kthvalue(k, dim=1, keepdim=True).values
    import numpy as np

    # introselect with vector instructions: four times faster than torch's kthvalue, fourteen than a stable sort
    kth_R = np.partition(score_RN.numpy(), k - 1, axis=1)[:, k - 1]
    return score_RN.new_tensor(kth_R)[:, None]


def _count_true(flag_RN: Tensor) -> Tensor:
    """How many are true in each row, int32 (R,); twice as fast as a sum of bools."""
    import torch

    return flag_RN.view(torch.uint8).sum(1, dtype=torch.int32)


def _row_chunks(score_OI: Tensor) -> tuple[Tensor, ...]:
    import torch

    return torch.split(score_OI, max(1, _CHUNK // score_OI.shape[1]))
