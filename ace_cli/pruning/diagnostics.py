"""What a run looks at for the report alone: the inputs of every slot, and what pruning did to every block's output.

Shapes: T tokens, I inputs, B windows, L window length, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ace_cli.methods.statistics import Statistic, accumulated

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.core.workers import Workers
    from ace_cli.model.calls import Batch
    from ace_cli.model.streamed import StreamedModel


@dataclass
class Observe:
    """``windows``: calibration windows on which each block's dense and pruned outputs are compared, 0 for none.

    ``tokens``: how many calibration tokens the statistics of activations look at, 0 for none.
    """

    windows: int = 2
    tokens: int = 256

    def faults(self) -> list[str]:
        """What is wrong with the knobs, one line each; empty when all is well."""
        return [
            f"observe.{name}={value}: must not be negative; 0 looks at nothing"
            for name, value in vars(self).items()
            if value < 0
        ]


# --- inputs of slots -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Where values lie: 5th percentile, median, 95th percentile, largest."""

    low: float
    median: float
    high: float
    largest: float


@dataclass(frozen=True)
class ActivationFacts:
    """What a slot's inputs look like, on ``tokens`` tokens.

    ``input_norm``: over inputs j, sqrt(E[x_j^2]); ``input_variance``: Var[x_j]; ``token_norm``: over tokens t, ||x_t||.
    ``above_one``: share of values with |x| > 1 (VarP's derivation assumes none); ``largest``: the largest |x|;
    ``largest_to_median``: of the input norms, near 1 a metric that multiplies by them is magnitude pruning;
    ``sinks``: tokens whose norm is more than ``SINK`` times the median.
    """

    tokens: int
    input_norm: Spread
    input_variance: Spread
    token_norm: Spread
    above_one: float
    largest: float
    largest_to_median: float
    sinks: int


#: A token this many times larger than the median one is a sink.
SINK = 10.0


@dataclass(unsafe_hash=True)
class Activations(Statistic):
    """The first ``most`` inputs of a slot: what it costs does not grow with the data."""

    most: int = 256
    _chunks_TI: list[Tensor] = accumulated("TI")
    _facts: ActivationFacts | None = field(default=None, init=False, compare=False, repr=False)

    def update(self, x_TI: Tensor, y_TO: Tensor, weight_OI: Tensor) -> None:
        if self.tokens < self.most:
            chunk_TI = x_TI[: self.most - self.tokens].clone()  # a view would keep the whole
            self.add(len(chunk_TI), _chunks_TI=[chunk_TI])

    def _join(self, workers: Workers) -> None:
        """Each keeps what it saw itself: the first worker writes the report."""

    def merge(self, other: Activations) -> None:
        """Those of ``other`` come after its own. ValueError once ``facts`` let go of the inputs."""
        if self._facts is not None or other._facts is not None:
            raise ValueError("the inputs are no longer there")
        for chunk_TI in other._chunks_TI if other.tokens else []:
            self.update(chunk_TI, chunk_TI, chunk_TI)

    def facts(self) -> ActivationFacts:
        """Computed once for all slots that read the same input."""
        import torch

        if self._facts is None:
            self._facts = _summed_up(torch.cat(self._chunks_TI).float())
            self._chunks_TI = []
        return self._facts


def _summed_up(x_TI: Tensor) -> ActivationFacts:
    import torch

    square_TI = x_TI.square()
    mean_square_I, mean_I = square_TI.mean(0), x_TI.mean(0)
    norm_T = square_TI.sum(1).sqrt()
    spreads = [mean_square_I.sqrt(), (mean_square_I - mean_I.square()).clamp(min=0), norm_T]
    at = x_TI.new_tensor([0.05, 0.5, 0.95, 1.0])
    numbers = torch.stack(
        [
            *torch.cat([torch.quantile(values, at) for values in spreads]),
            (square_TI > 1).float().mean(),
            square_TI.max().sqrt(),
            (norm_T > SINK * norm_T.median()).sum(),
        ]
    ).tolist()  # one wait for the device
    norm, variance, token = (Spread(*numbers[start : start + 4]) for start in (0, 4, 8))
    ratio = norm.largest / norm.median if norm.median else 0.0
    return ActivationFacts(len(x_TI), norm, variance, token, numbers[12], numbers[13], ratio, int(numbers[14]))


# --- outputs of blocks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputChange:
    """What pruning a block did to the states it puts out, for the same input: means over tokens.

    ``error``: ||pruned - dense|| / ||dense||; ``angle``: between the two, in degrees.
    """

    error: float
    angle: float


class BlockComparison:
    """Runs a few windows through each block before it is pruned: the first ones of the first batch, as ``batch``."""

    def __init__(self, model: StreamedModel, batch: Batch | None) -> None:
        self._model = model
        self._batch = batch
        self._dense_BLH: Tensor | None = None

    def before(self, index: int, batches: list[Batch]) -> None:
        """The loaded block is still dense; ``batches`` hold its inputs."""
        if self._batch is not None:
            self._batch.hidden_BLH = batches[0].hidden_BLH[: len(self._batch.ids_BL)]
            self._dense_BLH = self._model.forward(index, self._batch)

    def after(self, index: int, outputs_BLH: Tensor | None) -> OutputChange | None:
        """The loaded block is pruned now; ``outputs_BLH`` is what it made of the first batch, if it has run already."""
        if self._batch is None or self._dense_BLH is None:
            return None
        if outputs_BLH is None:
            outputs_BLH = self._model.forward(index, self._batch)
        return output_change(self._dense_BLH, outputs_BLH[: len(self._dense_BLH)])


def output_change(dense_BLH: Tensor, pruned_BLH: Tensor) -> OutputChange:
    """Per token, then the mean. The angle is 2 atan(|a - b| / |a + b|) of unit vectors: exact for small ones too."""
    import torch

    dense, pruned = dense_BLH.double().flatten(0, 1), pruned_BLH.double().flatten(0, 1)
    tiny = 1e-300
    size, size_pruned = dense.norm(dim=1, keepdim=True), pruned.norm(dim=1, keepdim=True)
    a, b = dense / size.clamp(min=tiny), pruned / size_pruned.clamp(min=tiny)
    angle = 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))
    error = (pruned - dense).norm(dim=1, keepdim=True) / size.clamp(min=tiny)
    return OutputChange(float(error.mean()), float(torch.rad2deg(angle).mean()))
