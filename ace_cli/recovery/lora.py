"""Low-rank adapters on the pruned model (Hu et al., arXiv 2106.09685), merged where it has weights left.

W' = W + s keep * (B A), keep = W != 0: trained through the mask and merged with it, so that what was measured is what
is written (MaskLoRA of PERP, Zimmer et al., arXiv 2312.15230); with ``merge=false`` W stays and s B A is written beside
it, unmasked, as a PEFT adapter. What is learned is ``loss=kl``, the dense model's predictions as ``recover=distill``
does, or ``loss=lm``, the text itself. Adam, warm-up and cosine; nothing but the factors is trained.

``ranks=angular`` is CFSP's importance-guided rank (arXiv 2409.13199, Equation 9), whose formula is not published; our
reading: r_l = R N s_l / sum s, with s_l the sigmoid of each block's angle that ``allocation=angular`` has, rounded so
that the sum is R N; s = alpha / R in all blocks.

``init=svd`` starts from the closed form of 3BASiL (arXiv 2603.01376): the rank-R product nearest to W_dense - W in the
outputs. Inputs are those that the pruned model sees, from one pass over the calibration windows: corrections of the
blocks before are not seen, which spares a second pass. Shapes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from ace_cli.core.registry import register
from ace_cli.core.workers import ONE, Workers
from ace_cli.methods.allocation.angular import Angular
from ace_cli.methods.allocation.base import apportioned
from ace_cli.methods.angles import angular_distance
from ace_cli.model.adapted import ADAPTER, ADAPTER_FILES, peft
from ace_cli.recovery.adapters import Adapters, adapted_paths, adapter_faults
from ace_cli.recovery.base import RecoveryFacts
from ace_cli.recovery.fit import Fit
from ace_cli.recovery.objectives import LOGITS, DensePredictions, NextTokens, shared_steps
from ace_cli.recovery.training import put_back, training_faults
from ace_cli.recovery.whole import STATE, WholeModel, last_states, loaded, write_weights

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from torch import Tensor

    from ace_cli.core.stage import Progress
    from ace_cli.model.files import Checkpoint
    from ace_cli.model.streamed import StreamedModel


class Loss(Enum):
    """What is learned."""

    kl = "kl"  # the dense model's next-token distributions
    lm = "lm"  # the text's own next tokens


class Ranks(Enum):
    """How the ranks are shared out."""

    uniform = "uniform"  # every block the same
    angular = "angular"  # more where the block turns its states further


class Init(Enum):
    """Where the factors start."""

    none = "none"  # at no change
    svd = "svd"  # at the nearest product to what pruning took


@register("recover", "lora")
@dataclass
class Lora(WholeModel):
    """Adapters of ``rank`` on every linear layer, trained on the whole pruned model and merged (package peft).

    ``alpha`` / ``rank`` scales the product. ``ranks`` shares the ranks out, ``init`` says where it starts, ``loss``
    what is learned; ``merge=false`` writes the adapter beside the weights.
    """

    rank: int = 8
    alpha: float = 16.0
    ranks: Ranks = Ranks.uniform
    init: Init = Init.none
    loss: Loss = Loss.kl
    merge: bool = True

    def faults(self) -> list[str]:
        alone = self.init is Init.svd and self.epochs == 0  # the closed form, and no training
        epochs = 1 if alone else self.epochs
        faults = training_faults(epochs, self.lr, self.batch, self.held_out, self.seed, self.windows)
        faults += adapter_faults(self.rank, self.alpha)
        if self.init is Init.svd and self.merge:
            faults.append(
                "recover.init=svd stands for the weights that went, where a merge keeps zeros: add recover.merge=false"
            )
        return faults

    def misfits(self, cuts: bool, zeros: bool) -> list[str]:
        if cuts and self.init is Init.svd:
            return ["recover.init=svd compares weights with the dense ones: of units that were cut there are none"]
        return []

    def check_installed(self) -> None:
        peft()

    @property
    def files(self) -> tuple[str, ...]:
        """The adapter, where it is not merged."""
        return () if self.merge else ADAPTER_FILES

    def forwards(self, share: float = 1.0) -> float:
        return super().forwards(share) + share * (self.init is Init.svd)

    def trained_numbers(self, trained: int, shapes: Collection[tuple[int, int]]) -> int:
        return self.rank * sum(rows + columns for rows, columns in shapes)

    def whole_bytes(self, parameters: int, trained: int, shapes: Collection[tuple[int, int]]) -> int:
        factors = self.trained_numbers(trained, shapes)
        largest = max((rows * columns for rows, columns in shapes), default=0)
        return 4 * parameters + (4 + 4 + 8 + 4) * factors + 3 * 4 * largest + 6 * LOGITS

    def recover_model(
        self, dense: StreamedModel, pruned: Checkpoint, windows_NL: Tensor, held_NL: Tensor, target: Path,
        progress: Progress, workers: Workers = ONE,
    ) -> RecoveryFacts:  # fmt: skip
        import torch

        from ace_cli.model.streamed import StreamedModel

        streamed = StreamedModel(pruned, dense.device, torch.float32)
        own_NL, steps, held = shared_steps(windows_NL, held_NL, self.batch, workers)
        states_NLH, ranks = self._heard(dense, own_NL, progress, workers)
        student = loaded(pruned, dense.device, self)
        adapters = Adapters(student, streamed, ranks, self.alpha / self.rank, self.merge, self.seed)
        objective = (
            DensePredictions(dense, adapters.model, own_NL, states_NLH)
            if states_NLH is not None
            else NextTokens(dense, adapters.model, own_NL)
        )

        def start() -> dict[str, Tensor]:
            return adapters.started(corrections(dense, streamed, windows_NL, ranks, progress))

        begin = start if self.init is Init.svd else None
        fit = Fit(self, adapters.weights, objective, (steps, held), target / STATE, workers, start=begin)
        facts = fit.run(progress)
        if not (facts.after < facts.before and workers.first):
            return facts
        put_back(adapters.weights, fit.best)
        if self.merge:
            write_weights(streamed, pruned, adapters.merged(), target)
        else:
            adapters.write(target / ADAPTER, str(pruned.folder.with_suffix("")))  # where it will lie once it is whole
        return facts

    def _heard(
        self, dense: StreamedModel, windows_NL: Tensor, progress: Progress, workers: Workers
    ) -> tuple[Tensor | None, list[int]]:
        """The dense model's last states, if they are to be learned; and the rank of each block."""
        angles: list[float] = []

        def look(before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
            angles.append(angular_distance(before, after))

        guided = self.ranks is Ranks.angular
        if self.loss is Loss.lm and not guided:
            return None, [self.rank] * len(dense.blocks)
        states_NLH = last_states(dense, windows_NL, progress, look if guided else None)
        everyone = workers.told((len(windows_NL), angles))
        ranks = guided_ranks(self.rank, mean_angles(everyone)) if guided else [self.rank] * len(dense.blocks)
        return states_NLH if self.loss is Loss.kl else None, ranks


def mean_angles(everyone: Sequence[tuple[int, Sequence[float]]]) -> list[float]:
    """Over all windows, from how many each worker has and the means of its own; nothing of one that has none."""
    each = [(count, angles) for count, angles in everyone if count]
    windows = sum(count for count, _ in each)
    return [sum(count * angle for (count, _), angle in zip(each, of_block, strict=True)) / windows
            for of_block in zip(*(angles for _, angles in each), strict=True)]  # fmt: skip


def guided_ranks(rank: int, angles: Sequence[float]) -> list[int]:
    """CFSP's, in our reading: with the mean ``rank``, each at least 1. ``angles``: of every block, as shares of pi."""
    count = len(angles)
    scores = Angular().importances([1] * count, angles)
    wishes = [rank * count * score / sum(scores) for score in scores]
    return apportioned(wishes, [1] * count, rank * count, 1, [rank * count] * count)


def corrections(
    dense: StreamedModel,
    streamed: StreamedModel,
    windows_NL: Tensor,
    ranks: Sequence[int],
    progress: Progress,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Path of each adapted module -> the product up (O, R), down (R, I) nearest to what pruning took, in the outputs.

    ``streamed`` is the pruned model, run over ``windows_NL`` once; in memory are one block and X^T X of its inputs.
    """
    import torch

    from ace_cli.methods.low_rank import correction

    batches, found = list(streamed.batches(windows_NL, tokens=streamed.plain_tokens)), {}
    with progress("comparing with the dense weights", len(streamed.blocks)) as step, torch.no_grad():
        for index in streamed.one_by_one():
            block = streamed.blocks[index]
            wanted, paths = set(adapted_paths(block)), {id(m): p for p, m in block.module.named_modules()}
            slots = {f"{block.name}.{paths[id(slot.module)]}": slot for slot in block.slots if slot.leaf == "weight"}
            alone = Counter(id(slot.module) for slot in block.slots)  # others begin at no change
            slots = {path: slot for path, slot in slots.items() if path in wanted and alone[id(slot.module)] == 1}
            grams: dict[str, Tensor] = {}

            def add(path: str, x: Tensor, grams: dict[str, Tensor] = grams) -> None:
                x_TI = x.detach().flatten(0, -2).float()
                grams[path] = grams[path].addmm_(x_TI.T, x_TI) if path in grams else x_TI.T @ x_TI

            hooks = [
                slot.module.register_forward_pre_hook(lambda _, inputs, path=path: add(path, inputs[0]))
                for path, slot in slots.items()
            ]
            try:
                streamed.advance(index, batches)
            finally:
                for hook in hooks:
                    hook.remove()
            for path, slot in slots.items():
                dense_OI = slot.in_file(dense.checkpoint.read(slot.key)).to(dense.device).float()
                found[path] = correction(dense_OI - slot.weight_OI.float(), grams.pop(path), ranks[index])
            step()
    return found
