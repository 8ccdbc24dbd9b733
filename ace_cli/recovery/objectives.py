"""What a training of the whole model makes small, and the steps that it takes over its windows.

Shapes: N windows, B of them at once, L tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.recovery.training import half_precision, training_steps

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ace_cli.core.workers import Workers
    from ace_cli.model.streamed import StreamedModel

#: Bytes of one forward's logits in float32; a step of more tokens is taken in several forwards.
LOGITS = 256 << 20


@dataclass(frozen=True)
class Step:
    """One step of a training: this worker's windows, numbered in its own; ``count``: of all workers together."""

    own: range
    count: int


def shared_steps(
    windows_NL: Tensor, held_NL: Tensor, tokens: int, workers: Workers
) -> tuple[Tensor, list[Step], list[Step]]:
    """This worker's windows, some of every step of about so many ``tokens``; steps that train, steps held out."""
    import torch

    own: list[Tensor] = []
    steps, done = (list[Step](), list[Step]()), 0
    for given_NL, found in zip((windows_NL, held_NL), steps, strict=True):
        for step in training_steps(len(given_NL), given_NL.shape[1], tokens):
            own.append(given_NL[list(workers.part(step))])
            found.append(Step(range(done, done + len(own[-1])), len(step)))
            done += len(own[-1])
    return torch.cat(own), *steps


class Objective:
    """What is to get small: a mean over predictions on some of this worker's windows (N, L), int64."""

    #: What the bar says meanwhile.
    words: str
    #: Predictions of a window.
    predicted: int

    def __init__(self, student: nn.Module, windows_NL: Tensor, device: torch.device, vocabulary: int) -> None:
        self._student, self._windows_NL, self._device = student, windows_NL, device
        self._at_once = max(1, LOGITS // (4 * vocabulary * windows_NL.shape[1]))
        self.length = windows_NL.shape[1]

    def share(self, step: Step, backward: bool) -> float:
        """What this worker's windows add to the mean of the step's, nats; adds its gradient if ``backward``."""
        import torch

        total, predictions = 0.0, step.count * self.predicted
        for first in range(step.own.start, step.own.stop, self._at_once):
            rows = slice(first, min(first + self._at_once, step.own.stop))
            with torch.set_grad_enabled(backward):
                loss = self._sum(self._windows_NL[rows].to(self._device), rows) / predictions
                if backward:
                    loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def ready(self) -> AbstractContextManager[None]:
        """``share`` may be called inside this context."""
        return nullcontext()

    def _logits(self, ids_BL: Tensor) -> Tensor:
        logits: Tensor = self._student(input_ids=ids_BL, use_cache=False).logits
        return logits

    def _sum(self, ids_BL: Tensor, rows: slice) -> Tensor:
        raise NotImplementedError


class DensePredictions(Objective):
    """KL(dense || student) of the next-token distributions."""

    words = "learning from the dense model"

    def __init__(self, dense: StreamedModel, student: nn.Module, windows_NL: Tensor, states_NLH: Tensor) -> None:
        super().__init__(student, windows_NL, dense.device, dense.vocabulary)
        self._dense, self._states_NLH = dense, states_NLH
        self.predicted = self.length

    def ready(self) -> AbstractContextManager[None]:
        return self._dense.head_loaded()

    def _sum(self, ids_BL: Tensor, rows: slice) -> Tensor:
        from ace_cli.kernels.divergence import divergence

        hidden_BLH = self._states_NLH[rows].to(self._device)
        with half_precision(self._device):
            teacher_BLV = self._dense.logits(ids_BL, hidden_BLH)
            student_BLV = self._logits(ids_BL)
        return divergence(student_BLV.flatten(0, 1), teacher_BLV.flatten(0, 1))


class NextTokens(Objective):
    """Cross-entropy of the text's own next tokens: language modelling, without a teacher."""

    words = "learning from the text"

    def __init__(self, dense: StreamedModel, student: nn.Module, windows_NL: Tensor) -> None:
        super().__init__(student, windows_NL, dense.device, dense.vocabulary)
        self.predicted = max(1, self.length - 1)

    def _sum(self, ids_BL: Tensor, rows: slice) -> Tensor:
        import torch

        with half_precision(self._device):
            logits_BLV = self._logits(ids_BL)
        return torch.nn.functional.cross_entropy(
            logits_BLV[:, :-1].flatten(0, 1).float(), ids_BL[:, 1:].flatten(), reduction="sum"
        )
