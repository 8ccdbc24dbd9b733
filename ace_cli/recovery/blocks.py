"""Block by block: what was kept of a block learns again what the dense block does.

After EBFT (arXiv 2402.12419) and the refinement of 3BASiL (arXiv 2603.01376): min over theta of the mean over tokens of
||f_theta(x) - y||^2 / ||y||^2, f one pruned block, x the states that the recovered prefix makes, y what the dense block
makes of the same x (``target=block``) or what the dense model has there (``target=model``). Adam, warm-up and cosine.

Where this departs from the papers: the error of a token is relative to its size, for a plain mean is ruled by a few
tokens with massive activations; a block that gets no better on windows held out from training stays as it was; and a
learning rate whose first epoch makes a block worse is lowered, for what is too much differs from family to family.

Shapes: B windows, L tokens, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from ace_cli.core.registry import register
from ace_cli.core.torch_api import own_parameters
from ace_cli.core.workers import ONE, Workers
from ace_cli.recovery.base import Recovery, RecoveryFacts
from ace_cli.recovery.training import (
    LOWER,
    LOWERINGS,
    adam,
    copies,
    half_precision,
    put_back,
    sizes,
    split,
    train,
    training_faults,
    training_forwards,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from ace_cli.model.calls import Batch
    from ace_cli.model.streamed import StreamedModel


class Target(Enum):
    """Whose outputs a block learns."""

    block = "block"  # the dense block's, of the states that come to it now
    model = "model"  # the dense model's at this depth: errors made before are mended, too


@register("recover", "blocks")
@dataclass
class Blocks(Recovery):
    """Every block is trained to put out what the dense one does, right after it is pruned.

    ``epochs`` over the calibration windows but for the ``held_out`` share of them, in steps of ``batch`` tokens, with
    the learning rate ``lr`` after a tenth of the steps, then down a cosine to a tenth of it, of each weight relative to
    its root mean square. ``seed`` orders the steps.
    """

    epochs: int = 4
    lr: float = 5e-3
    batch: int = 512
    target: Target = Target.block
    held_out: float = 0.1
    seed: int = 0

    @property
    def carries_dense(self) -> bool:  # type: ignore[override]
        """Targets of the dense model need its states."""
        return self.target is Target.model

    def faults(self) -> list[str]:
        return training_faults(self.epochs, self.lr, self.batch, self.held_out, self.seed)

    def forwards(self, share: float = 1.0) -> float:
        return training_forwards(self.epochs, self.held_out)

    def bytes_per_weight(self) -> int:
        return 4 + 4 + 8 + 4 + 1  # master copy, gradient, two moments, the best so far; what may change

    def recover(
        self, model: StreamedModel, index: int, batches: Sequence[Batch | None], targets: Sequence[Tensor | None],
        keep: Mapping[str, Tensor], workers: Workers = ONE,
    ) -> RecoveryFacts:  # fmt: skip
        training, held = split(len(batches), self.held_out)
        module = model.blocks[index].module
        loaded = dict(module.named_parameters())
        masters = _masters(module, keep)
        step = _Step(model, index, batches, targets, workers)
        before = best = step.error(held)
        kept, epochs, own = copies(masters), 0, sizes(masters, keep)
        for lowered in range(LOWERINGS + 1):
            rates = [self.lr * LOWER**lowered * size for size in own]
            for epoch in self._epochs(index, step, masters, keep, training, rates):
                error = step.error(held)
                if error < best:  # false for NaN: a block that diverged keeps what it had
                    best, epochs, kept = error, epoch, copies(masters)
                elif epoch == 1 and lowered < LOWERINGS:
                    put_back(masters, kept)
                    break
            else:
                break
        better = {name: weight.masked_fill_(~keep[name], 0) for name, weight in kept.items()} if epochs else {}
        _put(module, {**loaded, **better})
        return RecoveryFacts(before, best, epochs, lowered)

    def _epochs(
        self, index: int, step: _Step, masters: Mapping[str, nn.Parameter], keep: Mapping[str, Tensor],
        training: Sequence[int], rates: Sequence[float],
    ) -> Iterator[int]:  # fmt: skip
        """Trains ``masters``, each at its rate, for another epoch at each turn; its number, from 1."""
        import torch

        optimiser, count = adam(masters.values(), rates, step.device), len(training)
        generator = torch.Generator().manual_seed(self.seed + index)
        for epoch in range(1, self.epochs + 1):
            order = [training[number] for number in torch.randperm(count, generator=generator).tolist()]
            done, steps = (epoch - 1) * count, self.epochs * count
            for _ in train(optimiser, masters, keep, step.backward, order, done, steps, step.workers):
                pass
            yield epoch


class _Step:
    """One batch through the block, with its error against the target: this worker's share of both."""

    def __init__(
        self, model: StreamedModel, index: int, batches: Sequence[Batch | None], targets: Sequence[Tensor | None],
        workers: Workers,
    ) -> None:  # fmt: skip
        self._model, self._index, self.workers, self.device = model, index, workers, model.device
        self._batches, self._targets = batches, targets
        windows = [0 if batch is None else len(batch.ids_BL) for batch in batches]
        everyone = zip(*workers.told(windows), strict=True)
        self._shares = [mine / max(1, sum(each)) for mine, each in zip(windows, everyone, strict=True)]

    def backward(self, number: int) -> None:
        """Adds the gradients of one batch's error."""
        import torch

        if (batch := self._batches[number]) is not None:
            with torch.enable_grad():
                self._loss(number, batch).backward()  # type: ignore[no-untyped-call]

    def error(self, numbers: list[int]) -> float:
        """Mean over the batches, without gradients; of all workers."""
        import torch

        with torch.no_grad():
            mine = [(number, batch) for number in numbers if (batch := self._batches[number]) is not None]
            error = sum(float(self._loss(number, batch)) for number, batch in mine)
        return sum(self.workers.told(error)) / len(numbers)

    def _loss(self, number: int, batch: Batch) -> Tensor:
        target_BLH = self._targets[number]
        assert target_BLH is not None
        call, calls = batch.calls[self._index], [*batch.calls]
        calls[self._index] = replace(call, args=_in_float32(call.args), kwargs=_in_float32(call.kwargs))
        batch = replace(batch, hidden_BLH=batch.hidden_BLH.float(), calls=calls)
        with half_precision(self.device):
            out_BLH = self._model.forward(self._index, batch)
        error: Tensor = relative_error(out_BLH.float(), target_BLH.float()) * self._shares[number]
        return error


def relative_error(out_BLH: Tensor, target_BLH: Tensor) -> Tensor:
    """Mean over tokens of ||out - target||^2 / ||target||^2."""
    size_BL = target_BLH.square().sum(-1).clamp(min=1e-12)
    return ((out_BLH - target_BLH).square().sum(-1) / size_BL).mean()


def _in_float32(value: Any) -> Any:
    """What a block is called with beside hidden states, its masks and rotary tables in the dtype of the weights."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(map(_in_float32, value))
    if isinstance(value, dict):
        return {name: _in_float32(each) for name, each in value.items()}
    return value


def _masters(module: nn.Module, keep: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The block's parameters in float32; those in ``keep`` with gradients."""
    from torch import nn

    masters = {}
    for name, parameter in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        master = nn.Parameter(parameter.detach().float().clone(), requires_grad=name in keep)
        own_parameters(module.get_submodule(owner))[leaf] = master
        if name in keep:
            masters[name] = master
    return masters


def _put(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give the block these parameters, without gradients."""
    from ace_cli.model.weights import assign

    for name, weight in weights.items():
        assign(module, name, weight)
