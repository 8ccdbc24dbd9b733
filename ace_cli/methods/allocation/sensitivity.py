"""ASVD's search for ranks by the sensitivity of every weight (Yuan et al., arXiv 2312.05821)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ace_cli.core.registry import register
from ace_cli.methods.allocation.base import Allocation
from ace_cli.methods.patterns import Pattern, Ratio

#: Shares of a weight's parameters that are tried: a tenth to nine tenths.
SHARES = tuple(Fraction(tenths, 10) for tenths in range(1, 10))


@register("allocation", "sensitivity")
@dataclass
class Sensitivity(Allocation):
    """Weights whose thinner products change least lose most (STRS): one limit for the error of all.

    Every weight is made a product alone, for each of ``SHARES``; it takes the largest share whose error is below a
    limit, and the limit is the least one with which the model loses what was asked for. What that is too much is given
    back to the weight that came last. Our reading: the error is that of the dense block's output, relative to every
    token's size, measured block by block; the authors measure the perplexity of the whole model for every try.
    """

    of_ranks = True

    def span(self, p: float) -> float:
        return 1.0

    def patterns(
        self, pattern: Pattern, blocks: Sequence[Mapping[str, tuple[int, int]]], measures: Sequence[Any]
    ) -> dict[str, Pattern]:
        """``measures``: of every block, slot name -> its error for each of ``SHARES``."""
        assert isinstance(pattern, Ratio)
        shapes = {name: shape for block in blocks for name, shape in block.items()}
        errors = {name: each for block in measures for name, each in block.items()}
        sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
        wanted, lost = pattern.p * sum(sizes.values()), Fraction(0)
        taken = dict.fromkeys(shapes, Fraction(0))
        steps = sorted((max(errors[name][: step + 1]), step, name) for name in shapes for step in range(len(SHARES)))
        for _, step, name in steps:
            if lost >= wanted:
                break
            more = min((SHARES[step] - taken[name]) * sizes[name], wanted - lost)
            taken[name] += more / sizes[name]
            lost += more
        return {name: Ratio(share, pattern.scope) for name, share in taken.items()}

    def refusal(self, pattern: Pattern) -> str | None:
        if isinstance(pattern, Ratio) and pattern.p > SHARES[-1]:
            return f"no weight may lose more than {float(SHARES[-1]):g} of its parameters"
        return None
