"""LLM-Pruner's importance of coupled structures (Ma et al., NeurIPS 2023, arXiv 2305.11627)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.methods.gradients import Gradient, Source, seed_faults
from ace_cli.methods.metrics.base import Metric

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.methods.statistics import Seen, Statistic
    from ace_cli.methods.units import Units


class Form(Enum):
    """What a weight loses, by the terms of the loss's expansion."""

    first = "first"
    second = "second"
    mix = "mix"


@register("metric", "llm_pruner")
@dataclass
class LLMPruner(Metric):
    """I = sum over the vectors of a unit of sum |s|, or with ``vector=true`` of |sum s|; s of every weight is

        first   W g                      g = mean of the windows' gradients
        second  W^2 F                    F = mean of their squares
        mix     W g - 1/2 W^2 F

    A unit's vectors are the columns that read it and the rows that make it (gate and up of a channel). The code of the
    authors takes ``first`` where it is not told, its documentation ``mix``; both need ``source=model``, the whole
    model's loss. ``source=block`` (our reading, for models of any size) leads back targets that ``seed`` draws around
    what a block puts out; the mean of such gradients is 0, so only ``second`` says anything.

    Departures: units of every block are ranked, not those of blocks 4 to 29 alone; sums, no maxima or products over a
    unit. The authors' vector-wise importance of rows is of all rows, whichever the unit has; here of the unit's.
    """

    form: Form = Form.second
    vector: bool = False
    source: Source = Source.block
    seed: int = 0
    units = True
    weights = False

    def faults(self) -> list[str]:
        found = seed_faults(self.seed)
        if self.source is Source.block and self.form is not Form.second:
            why = "needs metric.source=model: the mean gradient of metric.source=block is 0"
            found.append(f"metric.form={self.form.value} {why}")
        return found

    def needs(self) -> tuple[Statistic, ...]:
        return self._gradients()

    def _gradients(self) -> tuple[Gradient, ...]:
        powers = {Form.first: (1,), Form.second: (2,), Form.mix: (1, 2)}[self.form]
        return tuple(Gradient(self.source, self.seed, power) for power in powers)

    def score_units(self, weight_OI: Tensor, seen: Seen, units: Units) -> Tensor:
        score_I = self._of_vectors(self._saliences(weight_OI, seen).T)
        for rows_IH, (made, rows_I) in zip(units.producers(), units.makers(), strict=True):
            score_I = score_I + self._of_vectors(self._saliences(rows_IH, made, rows_I))
        return units.summed(score_I.double())

    def _saliences(self, weight_OI: Tensor, seen: Seen, rows: Tensor | slice = slice(None)) -> Tensor:
        """s of every weight, float32 (O, I), of the rows that ``weight_OI`` holds."""
        means = [statistic.mean_OI[rows] for statistic in (seen[each] for each in self._gradients())]
        if self.form is Form.first:
            return weight_OI * means[0]
        second_OI = weight_OI.square() * means[-1]
        return second_OI if self.form is Form.second else weight_OI * means[0] - second_OI / 2

    def _of_vectors(self, salience_VN: Tensor) -> Tensor:
        """Of every vector, a row here: (V,)."""
        return salience_VN.sum(1).abs() if self.vector else salience_VN.abs().sum(1)
