"""What a metric is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.kernels.threads import filled
from ace_cli.methods.patterns import Scope

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.patterns import Pattern
    from ace_cli.methods.repair.base import Repair
    from ace_cli.methods.statistics import Seen, Statistic
    from ace_cli.methods.units import Units

    #: Some rows of a weight, float32 (R, I), not to be changed, and which they are -> their scores, float32 (R, I).
    RowScores = Callable[[Tensor, slice], Tensor]


@dataclass
class Metric:
    """Statistics of a slot's inputs -> importance of its weights. Fields are knobs.

    The formula is ``score``; or ``scores_of_rows``, which a large weight is pruned by without leaving a CPU's caches.
    """

    #: What a ratio compares where the user does not say.
    default_scope = Scope.row
    #: Whether it scores channels and heads, single weights, whole blocks, experts.
    units = True
    weights = True
    #: Whether it finds products of thinner weights instead: ace_cli.methods.low_rank.
    ranks = False
    #: Whether it finds a basis of the residual stream.
    hidden = False
    blocks = False
    experts = False
    #: Whether it looks at what goes through blocks (``score_states``, ``score_experts``), and at outputs of experts.
    of_states = False
    reads_outputs = False
    #: What to choose instead where its own cost is too much, and what that loses; empty where nothing is much cheaper.
    cheaper = ""

    def needs(self) -> tuple[Statistic, ...]:
        """The statistics ``score`` reads; none for a metric that looks at weights alone."""
        return ()

    def faults(self) -> list[str]:
        """What is wrong with the knobs, one line each; empty when all is well."""
        return []

    def score(self, weight_OI: Tensor, seen: Seen) -> Tensor:
        """Importance, float32 (O, I), non-negative; higher = keep. ``weight_OI`` is float32 and must not be changed."""
        return scored(self.scores_of_rows(weight_OI, seen), weight_OI, slice(0, len(weight_OI)))

    def scores_of_rows(self, weight_OI: Tensor, seen: Seen) -> RowScores:
        """How to score any rows of ``weight_OI`` (of any float dtype); what all rows need is computed here, once."""
        raise NotImplementedError

    def score_units(self, weight_OI: Tensor, seen: Seen, units: Units) -> Tensor:
        """Importance of each unit, (U,), float32 or float64; higher = keep.

        ``weight_OI``, float32 and not to be changed, reads the units; ``seen`` is of its inputs. By default the squares
        of the weights' own scores, summed over a unit's columns: with Wanda's, what removing the unit does to the
        output if its inputs are uncorrelated.
        """
        return units.summed(self.score(weight_OI, seen).square_().sum(0))

    def score_states(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
        """Importance of a block, from the states (B, L, H) of each batch that go into it and come out of it."""
        raise NotImplementedError

    def of_routed(self, gate_T: Tensor, output_TH: Tensor) -> float:
        """What tokens routed to an expert add to its total: their gates, and the expert's own outputs for them."""
        raise NotImplementedError

    def score_experts(self, total_E: Tensor, tokens_E: Tensor, index: int) -> Tensor:
        """Importance of the experts of block ``index``, float64 (E,), from their totals and numbers of tokens."""
        raise NotImplementedError

    @property
    def by_rows(self) -> bool:
        """Whether the formula is ``scores_of_rows``, and all."""
        return type(self).score is Metric.score and type(self).refine is Metric.refine

    @property
    def refines_rows(self) -> bool:
        """Whether ``refine`` looks at one row at a time: then some rows of weight and mask can be given to it."""
        return type(self).refine is Metric.refine

    def refine(self, weight_OI: Tensor, keep_OI: Tensor, seen: Seen, pattern: Pattern) -> Tensor:
        """A better mask, bool (O, I), where scores of single weights do not say all; as many in every row and group.

        May raise ArithmeticError, in words, where the statistics do not allow it.
        """
        return keep_OI

    def with_repair(self, repair: Repair) -> Repair:
        """The repair that belongs to this metric, given the one asked for."""
        return repair

    def flops(self, rows: int, columns: int) -> int:
        """What ``refine`` costs for a weight (rows, columns), in operations of large matrix products; roughly."""
        return 0

    def nbytes(self, rows: int, columns: int) -> int:
        """What ``score`` and ``refine`` hold at most that is of the size of a Gram matrix, beside the statistics."""
        return 0

    def diagnose(self, seen: Seen) -> dict[str, Tensor | float]:
        """Numbers about one slot's statistics that show when the metric does not do what its name says.

        ``spread``, of a metric that multiplies weights by a factor of their input: largest over median factor.
        Tensors of one element are read when the block is done: until then no device is waited for.
        """
        return {}


def scored(scores: RowScores, weight_OI: Tensor, rows: slice) -> Tensor:
    """The scores of neighbouring rows of a weight, float32 (R, I); on a CPU in pieces that fit its caches."""
    some_RI = weight_OI[rows]
    if weight_OI.device.type != "cpu":
        return scores(some_RI, rows)

    def piece(some: slice) -> Tensor:
        return scores(some_RI[some], slice(rows.start + some.start, rows.start + some.stop))

    return filled(some_RI.new_empty(some_RI.shape), piece)


def spread(factor_I: Tensor) -> Tensor:
    """Largest over median, (); near 1, all inputs count the same and the metric is magnitude pruning."""
    return factor_I.max() / factor_I.median().clamp(min=1e-300)
