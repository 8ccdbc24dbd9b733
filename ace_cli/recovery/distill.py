"""Sparse fine-tuning of the whole model, taught by the dense one: knowledge distillation with fixed masks.

min over the kept weights of the mean over tokens of KL(dense || pruned) of the next-token distributions (Hinton et al.,
arXiv 1503.02531, temperature 1), on the calibration windows. Adam, warm-up and cosine; pruned positions get no gradient
and stay exactly zero. Embeddings, head and routers are not trained.

The dense model is never in memory beside the pruned one: its states after the last block are computed once, block by
block, and its head makes the distributions of each step's tokens from them. Shapes: N windows, L tokens, H hidden size,
V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ace_cli.core.registry import register
from ace_cli.core.workers import ONE, Workers
from ace_cli.recovery.base import Recovery, RecoveryFacts
from ace_cli.recovery.training import (
    adam,
    half_precision,
    rate,
    split,
    training_faults,
    training_forwards,
    training_steps,
    with_gradients_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from ace_cli.core.stage import Progress
    from ace_cli.model.files import Checkpoint
    from ace_cli.model.streamed import StreamedModel

#: Bytes of one forward's logits in float32; a step of more tokens is taken in several forwards.
LOGITS = 256 << 20
_STATE = "training"


@register("recover", "distill")
@dataclass
class Distill(Recovery):
    """The whole pruned model is trained on the dense model's predictions, once all blocks are pruned.

    ``epochs`` over the calibration windows but for the ``held_out`` share of them, in steps of ``batch`` tokens, with
    the learning rate ``lr`` after a tenth of the steps, then down a cosine to a tenth of it. ``seed`` orders the steps.
    What is kept is the epoch that predicts best on the windows held out.
    """

    epochs: int = 2
    lr: float = 3e-4
    batch: int = 512
    held_out: float = 0.1
    seed: int = 0

    in_stream = False
    whole = True

    def faults(self) -> list[str]:
        return training_faults(self.epochs, self.lr, self.batch, self.held_out, self.seed)

    def forwards(self) -> float:
        return training_forwards(self.epochs, self.held_out)

    def whole_bytes(self, parameters: int, trained: int) -> int:
        return 4 * parameters + (4 + 8 + 4 + 1) * trained + 6 * LOGITS

    def recover_model(
        self, dense: StreamedModel, pruned: Checkpoint, windows_NL: Tensor, target: Path, progress: Progress,
        workers: Workers = ONE,
    ) -> RecoveryFacts:  # fmt: skip
        import torch

        from ace_cli.data.generation import whole_model
        from ace_cli.model.streamed import StreamedModel

        streamed = StreamedModel(pruned, dense.device, torch.float32)
        steps = _steps(windows_NL, self.batch, workers)
        own_NL = windows_NL[[window for step in steps for window in step.windows]]
        states_NLH = _last_states(dense, own_NL, progress) if len(own_NL) else torch.empty(0)
        hint = "Use recover=blocks, which needs one block at a time in memory."
        student = whole_model(pruned, torch.float32, dense.device, hint)
        trained = _trained(streamed, student)
        teacher = _Teacher(dense, student, own_NL, states_NLH)
        fit = _Fit(self, student, trained, teacher, steps, target / _STATE, workers)
        with dense.head_loaded():
            facts = fit.run(progress)
        if workers.first:
            _write(streamed, pruned, {name: fit.best[name] for name in trained}, target)
        return facts


@dataclass(frozen=True)
class _Step:
    """One step: this worker's windows, as numbered in all and in its ``own``; ``count``: of all workers together."""

    windows: range
    own: range
    count: int


def _steps(windows_NL: Tensor, tokens: int, workers: Workers) -> list[_Step]:
    found, before = list[_Step](), 0
    for step in training_steps(windows_NL, tokens):
        mine = workers.part(step)
        found.append(_Step(mine, range(before, before + len(mine)), len(step)))
        before += len(mine)
    return found


def _last_states(dense: StreamedModel, windows_NL: Tensor, progress: Progress) -> Tensor:
    """(N, L, H) after the dense model's last block, on the CPU."""
    import torch

    batches = list(dense.batches(windows_NL, tokens=dense.plain_tokens))
    with progress("listening to the dense model", len(dense.blocks)) as step:
        dense.run(batches, lambda _: step())
    return torch.cat([batch.hidden_BLH.cpu() for batch in batches]).clone()


def _trained(streamed: StreamedModel, student: nn.Module) -> dict[str, Tensor]:
    """Parameter of the student -> what of it may change: kept weights of slots; norms and biases of blocks whole."""
    import torch

    slots = {f"{block.name}.{path}" for block in streamed.blocks for path in _slot_parameters(block)}
    stored = {f"{block.name}.{name}" for block in streamed.blocks for name in block.parts}
    keep = {}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(False)
        if name in slots:
            keep[name] = parameter != 0
        elif name in stored and parameter.dim() == 1:
            keep[name] = torch.ones_like(parameter, dtype=torch.bool)
    return keep


def _slot_parameters(block: Any) -> set[str]:
    paths = {id(module): path for path, module in block.module.named_modules()}
    return {".".join(filter(None, (paths[id(slot.module)], slot.leaf))) for slot in block.slots}


class _Teacher:
    """The dense model's predictions, and how far the student's are from them."""

    def __init__(self, dense: StreamedModel, student: nn.Module, windows_NL: Tensor, states_NLH: Tensor) -> None:
        self._dense, self._student = dense, student
        self._windows_NL, self._states_NLH = windows_NL, states_NLH
        vocabulary = dense.skeleton.get_input_embeddings().weight.shape[0]
        self._at_once = max(1, LOGITS // (4 * vocabulary * windows_NL.shape[1]))
        self._length = windows_NL.shape[1]

    def divergence(self, windows: range, count: int, backward: bool) -> float:
        """What these of ``count`` windows add to the mean over tokens of KL(dense || student), nats.

        Adds its gradient if ``backward``.
        """
        import torch

        total, tokens = 0.0, count * self._length
        for first in range(windows.start, windows.stop, self._at_once):
            rows = slice(first, min(first + self._at_once, windows.stop))
            with torch.set_grad_enabled(backward):
                loss = self._sum(rows) / tokens
                if backward:
                    loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def _sum(self, rows: slice) -> Tensor:
        from ace_cli.kernels.divergence import divergence

        device = self._dense.device
        ids_BL, hidden_BLH = self._windows_NL[rows].to(device), self._states_NLH[rows].to(device)
        with half_precision(device):
            teacher_BLV = self._dense.logits(ids_BL, hidden_BLH)
            student_BLV = self._student(input_ids=ids_BL, use_cache=False).logits
        return divergence(student_BLV.flatten(0, 1), teacher_BLV.flatten(0, 1))


class _Fit:
    """The training: epochs, the best of them, and what an interrupted one left on disk."""

    def __init__(
        self, options: Distill, student: nn.Module, keep: dict[str, Tensor], teacher: _Teacher, steps: list[_Step],
        folder: Path, workers: Workers,
    ) -> None:  # fmt: skip
        self._options, self._keep, self._teacher, self._folder = options, keep, teacher, folder
        self._workers = workers
        parameters = dict(student.named_parameters())
        self._weights = {name: parameters[name].requires_grad_(True) for name in keep}
        device = next(iter(self._weights.values())).device
        training, held = split(len(steps), options.held_out)
        self._training, self._held = [steps[i] for i in training], [steps[i] for i in held]
        self._optimiser = adam(self._weights.values(), options.lr, device)
        self._done = 0
        self._errors: list[float] = []
        self.best = {name: weight.detach().clone() for name, weight in self._weights.items()}

    def run(self, progress: Progress) -> RecoveryFacts:
        """All epochs, or those that are left."""
        self._load()
        self._workers.agree("before it is trained", {"finished epochs": self._done, "their errors": self._errors})
        if not self._errors:
            self._errors.append(self._error())
        steps = len(self._training)
        with progress("learning from the dense model", self._options.epochs * steps, self._done * steps) as step:
            while self._done < self._options.epochs:
                self._epoch(step)
                if self._workers.several:
                    self._workers.agree("after an epoch", self._weights_alike())
                if self._workers.first:
                    self._save()
        best = min(range(len(self._errors)), key=self._errors.__getitem__)
        return RecoveryFacts(self._errors[0], self._errors[best], best)

    def _epoch(self, step: Callable[[], None]) -> None:
        import torch

        steps, options = len(self._training), self._options
        generator = torch.Generator().manual_seed(options.seed + self._done)
        for done, number in enumerate(torch.randperm(steps, generator=generator).tolist(), self._done * steps):
            self._optimiser.param_groups[0]["lr"] = options.lr * rate(done, options.epochs * steps)
            windows = self._training[number]
            self._teacher.divergence(windows.own, windows.count, backward=True)
            with_gradients_of(self._weights.values(), self._workers)
            for name, weight in self._weights.items():
                if weight.grad is not None:
                    weight.grad.mul_(self._keep[name])  # a fifth of the time of masked_fill_
            self._optimiser.step()
            self._optimiser.zero_grad()
            step()
        error = self._error()
        if error < min(self._errors):  # false for NaN: a training that diverged keeps what it had
            self.best = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._errors.append(error)
        self._done += 1

    def _error(self) -> float:
        windows = sum(held.count for held in self._held)
        means = [self._teacher.divergence(held.own, held.count, backward=False) * held.count for held in self._held]
        error = sum(self._workers.told(sum(means))) / windows
        return error if error == error else float("inf")

    def _weights_alike(self) -> dict[str, str]:
        from ace_cli.model.files import hash_of_tensor

        return {name: hash_of_tensor(weight.detach().cpu()) for name, weight in self._weights.items()}

    # --- on disk -------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """After an epoch: what the next one needs. Renamed into place, so that it is whole or not there."""
        from safetensors.torch import save_file

        self._folder.parent.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for name, weight in self._weights.items():
            moments = self._optimiser.state[weight]
            tensors |= {f"weight {name}": weight.detach(), f"best {name}": self.best[name],
                        f"first {name}": moments["exp_avg"], f"second {name}": moments["exp_avg_sq"],
                        f"step {name}": moments["step"]}  # fmt: skip
        content = {"done": self._done, "errors": self._errors}
        partial, final = (self._folder.with_suffix(end) for end in (".partial", ".safetensors"))
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial,
                  {"state": json.dumps(content)})  # fmt: skip
        partial.replace(final)

    def _load(self) -> None:
        import torch
        from safetensors import safe_open

        file = self._folder.with_suffix(".safetensors")
        if not file.is_file():
            return
        with safe_open(file, "pt") as stored:
            content = json.loads(stored.metadata()["state"])
            self._done, self._errors = content["done"], content["errors"]
            with torch.no_grad():
                for name, weight in self._weights.items():
                    weight.copy_(stored.get_tensor(f"weight {name}"))
                    self.best[name].copy_(stored.get_tensor(f"best {name}"))
                    self._optimiser.state[weight] = {
                        "step": stored.get_tensor(f"step {name}"),
                        "exp_avg": stored.get_tensor(f"first {name}").to(weight.device),
                        "exp_avg_sq": stored.get_tensor(f"second {name}").to(weight.device),
                    }


def _write(streamed: StreamedModel, pruned: Checkpoint, weights: dict[str, Tensor], target: Path) -> None:
    """The weight files of ``pruned`` with these parameters in place of its own, in ``target``."""
    import torch

    from ace_cli.model.files import CheckpointWriter
    from ace_cli.model.header import DTYPES

    writer = CheckpointWriter(pruned, target)
    for block in streamed.blocks:
        for name, parts in block.parts.items():
            if (weight := weights.get(f"{block.name}.{name}")) is None:
                continue
            for part in parts:
                dtype: torch.dtype = getattr(torch, DTYPES[pruned.tensors[part.key].dtype][0])
                writer.write(part.key, part.place(weight).to(dtype).cpu().contiguous())
    writer.finish()
