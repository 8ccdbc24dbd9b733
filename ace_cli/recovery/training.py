"""What every recovery trains with: which windows are held out, the learning rate's course, half precision."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import torch
    from torch import Tensor

    from ace_cli.core.workers import Workers

    Backward = Callable[[int], object]


#: A learning rate with which the first epoch makes the held-out windows worse is too high for these weights: the
#: training begins again with this share of it, so many times at most. Norms, units that were cut, and families differ.
LOWER, LOWERINGS = 1 / 3, 3

#: Adafactor's: a weight of zeros moves, too.
SMALL = 1e-3


def training_faults(
    epochs: int, lr: float, batch: int, held_out: float, seed: int, windows: int | None = None
) -> list[str]:
    """What is wrong with the knobs that all of them share, one line each."""
    faults = []
    if epochs < 1:
        faults.append(f"recover.epochs={epochs}: must be at least 1; recover=none trains nothing")
    if not (math.isfinite(lr) and lr > 0):
        faults.append(f"recover.lr={lr}: must be a number above 0, like 1e-3")
    if batch < 1:
        faults.append(f"recover.batch={batch}: must be at least 1 token")
    if not 0 < held_out < 1:
        faults.append(f"recover.held_out={held_out}: must be a share between 0 and 1, like 0.1")
    if not 0 <= seed < 2**63:
        faults.append(f"recover.seed={seed}: must be between 0 and 2^63")
    if windows is not None and windows < 2:
        faults.append(f"recover.windows={windows}: must be at least 2, one held out")
    return faults


def training_forwards(epochs: int, held_out: float) -> float:
    """Of all tokens: a step is a forward and a backward of twice its cost; then targets and held-out windows.

    An epoch that is begun again with a lower rate comes on top.
    """
    return 3 * epochs * (1 - held_out) + 1 + held_out * (epochs + 1)


def adam(weights: Iterable[Tensor], rates: Iterable[float], device: torch.device) -> torch.optim.Adam:
    """With a learning rate for each weight, which ``train`` paces; in one pass over a weight where torch has that."""
    import torch

    groups = [{"params": [weight], "lr": lr, "rate": lr} for weight, lr in zip(weights, rates, strict=True)]
    return torch.optim.Adam(groups, betas=(0.9, 0.95), fused=device.type in ("cpu", "cuda"))


def sizes(weights: Mapping[str, Tensor], keep: Mapping[str, Tensor]) -> list[float]:
    """Root mean square of what may change of each weight, at least ``SMALL``: what a learning rate is relative to.

    A step of Adam is about as long as the rate, whatever the gradient; so it must be as long as the weights ask for:
    those of SmolLM2-135M are of 0.19, of Gemma 3 270M of 0.04, of Qwen2.5-1.5B of 0.016, norms up to 200. As Adafactor
    has it (Shazeer and Stern, arXiv 1804.04235, section 8).
    """
    found = []
    for name, weight in weights.items():
        kept = keep[name]
        mean = float((weight.detach() * kept).square().sum()) / max(1, int(kept.sum()))
        found.append(max(math.sqrt(mean), SMALL))
    return found


def copies(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their values now, for ``put_back``."""
    return {name: weight.detach().clone() for name, weight in weights.items()}


def put_back(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Give the weights these values, in place."""
    import torch

    with torch.no_grad():
        for name, value in values.items():
            weights[name].copy_(value)


def split(count: int, held_out: float) -> tuple[list[int], list[int]]:
    """Numbers of the batches to train on, and of those held out: the last ones. Of a single batch, both."""
    held = min(count - 1, max(1, round(count * held_out)))
    return (list(range(count - held)), list(range(count - held, count))) if held else ([0], [0])


def training_steps(count: int, length: int, tokens: int) -> list[range]:
    """Which of ``count`` windows each step takes: about so many ``tokens`` of them, neighbours."""
    at_once = max(1, tokens // length)
    return [range(first, min(first + at_once, count)) for first in range(0, count, at_once)]


def rate(done: int, steps: int) -> float:
    """Of the learning rate: up in a tenth of the steps, then down a cosine to a tenth."""
    warm = max(1, steps // 10)
    if done < warm:
        return (done + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (done - warm) / max(1, steps - warm))


def train(
    optimiser: torch.optim.Adam, weights: Mapping[str, Tensor], keep: Mapping[str, Tensor], backward: Backward,
    order: Sequence[int], done: int, steps: int, workers: Workers,
) -> Iterator[None]:  # fmt: skip
    """Take the steps ``order``, of which ``backward`` adds the gradients, of ``adam``'s ``weights``; a turn for each.

    ``done`` of ``steps`` were taken before: where on the cosine they are. ``keep``: of some weights what may change.
    ``workers`` train together.
    """
    for place, number in enumerate(order, done):
        for group in optimiser.param_groups:
            group["lr"] = group["rate"] * rate(place, steps)
        backward(number)
        if workers.several:
            workers.add_up([_gradient(weight) for weight in weights.values()])
        for name, kept in keep.items():
            if (gradient := weights[name].grad) is not None:
                gradient.mul_(kept)  # a fifth of the time of masked_fill_
        optimiser.step()
        optimiser.zero_grad()
        yield


def _gradient(weight: Tensor) -> Tensor:
    """Of a worker that had no windows zeros."""
    import torch

    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def half_precision(device: torch.device) -> AbstractContextManager[object]:
    """Products in bfloat16 where the machine is faster at them; weights and sums stay in float32."""
    import torch

    from ace_cli.core.torch_api import has_bfloat16_units

    fast = has_bfloat16_units() if device.type == "cpu" else device.type == "cuda"
    return torch.autocast(device.type, torch.bfloat16) if fast else nullcontext()
