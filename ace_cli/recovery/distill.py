"""Sparse fine-tuning of the whole model, taught by the dense one: knowledge distillation with fixed masks.

min over the kept weights of the mean over tokens of KL(dense || pruned) of the next-token distributions (Hinton et al.,
arXiv 1503.02531, temperature 1), on the calibration windows. Adam, warm-up and cosine; pruned positions get no gradient
and stay exactly zero. Embeddings, head and routers are not trained.

The dense model is never in memory beside the pruned one: its states after the last block are computed once, block by
block, and its head makes the distributions of each step's tokens from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.core.workers import ONE, Workers
from ace_cli.recovery.base import RecoveryFacts
from ace_cli.recovery.fit import Fit
from ace_cli.recovery.objectives import LOGITS, DensePredictions, shared_steps
from ace_cli.recovery.whole import STATE, WholeModel, last_states, loaded, slot_parameters, write_weights

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from torch import Tensor, nn

    from ace_cli.core.stage import Progress
    from ace_cli.model.files import Checkpoint
    from ace_cli.model.streamed import StreamedModel


#: Bytes beside each weight that is trained: gradient, two moments, the best so far; what may change.
BESIDE = 4 + 8 + 4 + 1


@register("recover", "distill")
@dataclass
class Distill(WholeModel):
    """The whole pruned model is trained on the dense model's predictions, once all blocks are pruned.

    ``lr`` of each weight is relative to its root mean square.
    """

    lr: float = 1.5e-3

    relative = True
    beside = BESIDE / 4

    def whole_bytes(self, parameters: int, trained: int, shapes: Collection[tuple[int, int]]) -> int:
        return 4 * parameters + BESIDE * trained + 6 * LOGITS

    def recover_model(
        self, dense: StreamedModel, pruned: Checkpoint, windows_NL: Tensor, held_NL: Tensor, target: Path,
        progress: Progress, workers: Workers = ONE,
    ) -> RecoveryFacts:  # fmt: skip
        import torch

        from ace_cli.model.streamed import StreamedModel

        streamed = StreamedModel(pruned, dense.device, torch.float32)
        own_NL, steps, held = shared_steps(windows_NL, held_NL, self.batch, workers)
        states_NLH = last_states(dense, own_NL, progress)
        student = loaded(pruned, dense.device, self)
        keep, parameters = _trained(streamed, student), dict(student.named_parameters())
        predictions = DensePredictions(dense, student, own_NL, states_NLH)
        weights = {name: parameters[name] for name in keep}
        fit = Fit(self, weights, predictions, (steps, held), target / STATE, workers, keep)
        facts = fit.run(progress)
        if facts.epochs and workers.first:
            write_weights(streamed, pruned, fit.best, target)
        return facts


def _trained(streamed: StreamedModel, student: nn.Module) -> dict[str, Tensor]:
    """Parameter of the student -> what of it may change: kept weights of slots; norms and biases of blocks whole."""
    import torch

    slots = {f"{block.name}.{path}" for block in streamed.blocks for path in slot_parameters(block)}
    stored = {f"{block.name}.{name}" for block in streamed.blocks for name in block.parts}
    keep = {}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(False)
        if name in slots:
            keep[name] = parameter != 0
        elif name in stored and parameter.dim() == 1:
            keep[name] = torch.ones_like(parameter, dtype=torch.bool)
    return keep
