"""What an allocation is, and the arithmetic that every allocation shares.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import TYPE_CHECKING, Any

from ace_cli.methods.patterns import NofM, Pattern, Ratio, Scope

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.statistics import Seen, Statistic

#: No block loses more than this share of its weights: a row without weights is dead, whatever the rule says.
MOST = 0.99


@dataclass
class Allocation:
    """The sparsity asked for -> the pattern of each slot. A rule looks at blocks: all slots of one lose the same share.

    A subclass says what it measures in the dense model (``needs``, ``measure``), how measures become sparsities
    (``sparsities``) and how far apart these can get (``span``).
    """

    #: False if the rule does not look at the model at all.
    surveys = True
    #: Whether it is one for units alone, whose scores are its measure (``measure_units``).
    units_only = False
    #: Whether its measure is of the states that go into a block and come out of it (``measure_states``).
    of_states = False
    #: Whether it is one for ranks alone: it tries products of every weight.
    of_ranks = False

    def faults(self) -> list[str]:
        """What is wrong with the knobs, one line each; empty when all is well."""
        return []

    def needs(self) -> tuple[Statistic, ...]:
        """The statistics, of the dense model's inputs, that ``measure`` reads; none for a rule about weights alone."""
        return ()

    def measure(self, weights: Sequence[Tensor], seen: Sequence[Seen]) -> float:
        """One number for a block, from its slots' weights (float32 (O, I), not to be changed) and statistics."""
        return 0.0

    def measure_states(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
        """One number for a block, from the states (B, L, H) of each batch that go into it and come out, dense."""
        raise NotImplementedError

    def measure_units(self, score_U: Tensor) -> Any:
        """What ``sparsities`` reads of a block, from the scores of its units."""
        raise NotImplementedError

    def shares(self, p: float, sizes: Sequence[int], measures: Sequence[Any], high: float) -> list[float]:
        """The share of its units that each block loses, between 0 and ``high``; their mean by ``sizes`` is ``p``."""
        return bounded(self.sparsities(p, sizes, measures), sizes, p, 0.0, high)

    def span(self, p: float) -> float:
        """The furthest apart that the sparsities of two blocks can get around a mean of ``p``."""
        raise NotImplementedError

    def sparsities(self, p: float, sizes: Sequence[int], measures: Sequence[Any]) -> list[float]:
        """The sparsity of each block by the rule alone, bounds aside; their mean weighted by ``sizes`` is ``p``."""
        raise NotImplementedError

    def refusal(self, pattern: Pattern) -> str | None:
        """Why the rule makes no sense with ``pattern``; None if it does. Known before any model is loaded."""
        if isinstance(pattern, Ratio):
            if pattern.p == 0:
                return "sparsity=0 prunes nothing: there is nothing to allocate"
            if pattern.p > Fraction(str(MOST)):
                return f"no block may lose more than {MOST:g} of its weights: sparsity={pattern} leaves nothing to move"
        if isinstance(pattern, NofM):
            return self._refusal_of_groups(pattern.n, pattern.m)
        return None

    def _refusal_of_groups(self, n: int, m: int) -> str | None:
        """Mixed N:M needs a sparser and a denser N:M of the same M, and a rule that spreads blocks that far apart."""
        if n == 1 or n == m - 1:
            other, one = ("fewer", "more") if n == 1 else ("more", "fewer")
            return (
                f"no block can keep {other} than {n} of {m}, so none may keep {one} if the mean is to stay {n}:{m}: "
                "take a larger M (4:8), or a fraction"
            )
        span = self.span(1 - n / m) * m
        if span < 1 - 1e-9:  # around a whole number, blocks less than one apart all round back to it
            return (
                f"its blocks differ by at most {span:.2g} of every {m} weights, so each would stay {n}:{m}: "
                "at least 1 is needed (raise its strength, or take a larger M)"
            )
        return None

    def patterns(
        self, pattern: Pattern, blocks: Sequence[Mapping[str, tuple[int, int]]], measures: Sequence[float]
    ) -> dict[str, Pattern]:
        """Slot name -> its pattern. ``blocks``: each one's slots as name -> (rows, columns); ``measures``: one a block.

        As many weights are pruned as with ``pattern`` everywhere, up to what is left when no row, or group, of any
        slot can take one more. N:M becomes mixed N:M: the same M, N of its own for each block, between 1 and M - 1,
        because a block without any zero would be no N:M for whoever asked for the format.
        """
        filled = [index for index, block in enumerate(blocks) if block]
        blocks, measures = [blocks[index] for index in filled], [measures[index] for index in filled]
        sizes = [sum(rows * columns for rows, columns in block.values()) for block in blocks]
        if isinstance(pattern, NofM):
            p, low, high = 1 - pattern.n / pattern.m, 1 / pattern.m, 1 - 1 / pattern.m
        else:
            assert isinstance(pattern, Ratio)
            p, low, high = float(pattern.p), 0.0, MOST
        shares = bounded(self.sparsities(p, sizes, measures), sizes, p, low, high)
        if min(shares) == max(shares):
            return {name: pattern for block in blocks for name in block}
        if isinstance(pattern, NofM):
            return _mixed(pattern, blocks, sizes, shares)
        return _ratios(pattern, blocks, shares)


def input_weighted(weight_OI: Tensor, seen: Seen) -> Tensor:
    """A_ij = |W_ij| sqrt(E[x_j^2]), float32 (O, I): Wanda's score, which OWL and DLP look at."""
    from ace_cli.methods.statistics import SecondMoment

    return weight_OI.abs() * seen[SecondMoment()].mean_I.sqrt().float()


def weighted_mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    """sum_l values_l sizes_l / sum_l sizes_l."""
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def between_zero_and_one(values: Sequence[float]) -> list[float]:
    """(v - min) / (max - min); all 0 where the values do not differ."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


def centred(offsets: Sequence[float], sizes: Sequence[int], p: float) -> list[float]:
    """``offsets`` moved together so that their mean, weighted by ``sizes``, is ``p``."""
    if max(offsets) == min(offsets):
        return [p] * len(offsets)
    middle = weighted_mean(offsets, sizes)
    return [p + offset - middle for offset in offsets]


def bounded(shares: Sequence[float], sizes: Sequence[int], p: float, low: float, high: float) -> list[float]:
    """clip(shares + t, low, high) with the one t that keeps the weighted mean at ``p``; t = 0 where nothing clips."""
    if low <= min(shares) and max(shares) <= high:
        return list(shares)

    def moved(t: float) -> list[float]:
        return [min(max(share + t, low), high) for share in shares]

    below, above = low - max(shares), high - min(shares)
    for _ in range(100):
        t = (below + above) / 2
        below, above = (t, above) if weighted_mean(moved(t), sizes) < p else (below, t)
    return moved(above)


def _ratios(
    pattern: Ratio, blocks: Sequence[Mapping[str, tuple[int, int]]], shares: Sequence[float]
) -> dict[str, Pattern]:
    """A ratio k / n for each slot, n a row or the slot, k near n p_l: as many weights in all as ``pattern`` prunes."""
    names, wishes, units, lengths, total = [], [], [], [], 0
    for block, share in zip(blocks, shares, strict=True):
        for name, (rows, columns) in block.items():
            unit, length = (rows, columns) if pattern.scope is Scope.row else (1, rows * columns)
            names.append(name)
            wishes.append(length * share)
            units.append(unit)
            lengths.append(length)
            total += pattern.pruned(rows, columns)
    counts = apportioned(wishes, units, total, 0, [floor(length * MOST) for length in lengths])
    return {
        name: Ratio(Fraction(count, length), pattern.scope)
        for name, count, length in zip(names, counts, lengths, strict=True)
    }


def _mixed(
    pattern: NofM, blocks: Sequence[Mapping[str, tuple[int, int]]], sizes: Sequence[int], shares: Sequence[float]
) -> dict[str, Pattern]:
    """N_l:M for each block: whole numbers of zeros a group, nearest to M p_l, with the mean that was asked for."""
    m, total = pattern.m, (pattern.m - pattern.n) * sum(sizes)
    zeros = apportioned([m * share for share in shares], sizes, total, 1, [m - 1] * len(sizes))
    return {name: NofM(m - count, m) for block, count in zip(blocks, zeros, strict=True) for name in block}


def apportioned(
    wishes: Sequence[float], units: Sequence[int], total: int, least: int, most: Sequence[int]
) -> list[int]:
    """Whole numbers c_s near ``wishes``, least <= c_s <= most_s, with sum_s units_s c_s = ``total``.

    Largest remainders (Hamilton's method): round down, then give one more to those that lost most while their unit
    still fits (or take one from those that lost least, where rounding down was not enough). What remains of the total
    is less than the smallest unit that could still take one. Ties by order.
    """
    counts = [max(least, min(floor(wish), top)) for wish, top in zip(wishes, most, strict=True)]
    left = total - sum(count * unit for count, unit in zip(counts, units, strict=True))

    def by_loss() -> list[int]:
        return sorted(range(len(counts)), key=lambda s: counts[s] - wishes[s])

    while left < 0:
        for s in reversed(by_loss()):
            if left < 0 and counts[s] > least:
                counts[s] -= 1
                left += units[s]
    given = True
    while given:
        given = False
        for s in by_loss():
            if units[s] <= left and counts[s] < most[s]:
                counts[s] += 1
                left -= units[s]
                given = True
    return counts
