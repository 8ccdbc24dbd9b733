"""The choices of a run, as the engine takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from ace_cli.methods import catch_up

if TYPE_CHECKING:
    from ace_cli.methods.metrics.base import Metric
    from ace_cli.methods.patterns import Pattern
    from ace_cli.methods.repair.base import Repair
    from ace_cli.methods.statistics import Seen, Statistic
    from ace_cli.pruning.cutting import Cutting


class Propagate(Enum):
    """How pruning changes the calibration inputs of what comes after."""

    sublayer = "sublayer"  # each slot is pruned the moment its input is complete, in the same forward: one forward
    block = "block"  # observe the whole dense block, prune it, run it again: Wanda's protocol, two forwards
    dense = "dense"  # everything sees what the dense model computes: one forward


class Permute(Enum):
    """Whether inputs are reordered before N:M groups are laid on them."""

    none = "none"
    ria = "ria"


@dataclass(frozen=True)
class Recipe:
    """The choices of a run; ``patterns`` is what the allocation made of the sparsity asked for, by slot name.

    An expert is observed on the tokens routed to it; on all of its layer's if ``all_experts``, or if those routed to it
    are fewer than ``min_tokens``. ``catch_up``: how far weights are first moved to where they put out what the dense
    model does.
    """

    metric: Metric
    patterns: Mapping[str, Pattern]
    repair: Repair
    propagate: Propagate
    permute: bool = False
    all_experts: bool = False
    min_tokens: int = 1
    observed_tokens: int = 0  # of each slot's inputs, for the report alone
    cutting: Cutting | None = None  # units that are cut out, instead of weights that become zeros
    ranks: Mapping[str, int] = field(default_factory=dict)  # slot name -> the rank of the product it becomes
    gradients: Mapping[str, Seen] = field(default_factory=dict)  # of the whole model, by slot name
    catch_up: float = 0.0

    @property
    def wanted(self) -> tuple[Statistic, ...]:
        """The statistics that the methods read, each once."""
        moving = catch_up.needs(self.catch_up)
        return tuple(dict.fromkeys((*self.metric.needs(), *self.repair.needs(), *moving)))
