"""What every training of the whole model shares: what it learns from, its epochs, its state on disk, its result.

Shapes: N windows, B of them at once, L tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ace_cli.recovery.base import Recovery, RecoveryFacts
from ace_cli.recovery.training import (
    LOWER,
    LOWERINGS,
    adam,
    copies,
    half_precision,
    pace,
    put_back,
    sizes,
    training_faults,
    training_forwards,
    training_steps,
    with_gradients_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from ace_cli.core.stage import Progress
    from ace_cli.core.workers import Workers
    from ace_cli.model.blocks import Block
    from ace_cli.model.files import Checkpoint
    from ace_cli.model.streamed import StreamedModel

#: Bytes of one forward's logits in float32; a step of more tokens is taken in several forwards.
LOGITS = 256 << 20
#: In the folder of a training: what it needs to go on after an epoch.
STATE = "training"


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


@dataclass
class WholeModel(Recovery):
    """What a training of the whole model is told.

    ``epochs`` over the windows that train, in steps of ``batch`` tokens, with the learning rate ``lr`` after a tenth of
    the steps, then down a cosine to a tenth of it. ``seed`` orders the steps. A share ``held_out`` of all its windows
    trains nothing: what is kept is the epoch that is best on those.

    ``windows`` of the calibration text, held out or not: those that pruning saw, then the ones that follow. By default
    those that pruning saw are trained on, and the ones held out follow: a model looks better than it is on windows that
    weights were refitted to.

    ``spread``: the model lies on all GPUs of this machine, some blocks on each, so that it need not fit on one.
    """

    epochs: int = 2
    lr: float = 1e-3
    batch: int = 512
    held_out: float = 0.1
    seed: int = 0
    windows: int | None = None
    spread: bool = False

    in_stream = False
    whole = True
    #: Whether the learning rate of each weight is relative to its root mean square.
    relative = False
    #: Bytes that training holds for each byte of a block.
    beside = 0.0

    def faults(self) -> list[str]:
        return training_faults(self.epochs, self.lr, self.batch, self.held_out, self.seed, self.windows)

    @property
    def insists(self) -> bool:
        return self.windows is not None

    def trained_on(self, windows: int) -> tuple[int, int]:
        if self.windows is None:
            return windows, min(windows, math.ceil(windows * self.held_out / (1 - self.held_out)))
        held = min(self.windows - 1, max(1, round(self.windows * self.held_out)))
        return self.windows - held, held

    def trained_numbers(self, trained: int, shapes: Collection[tuple[int, int]]) -> int:
        """Of so many weights, in matrices of these shapes: how many numbers it trains."""
        return trained

    def disk_bytes(self, trained: int, shapes: Collection[tuple[int, int]]) -> int:
        # weight, best and two moments in float32; the next state is written before the last one goes
        return 2 * (4 + 4 + 8) * self.trained_numbers(trained, shapes)

    def forwards(self, share: float = 1.0) -> float:
        return share * training_forwards(self.epochs, self.held_out)


def loaded(pruned: Checkpoint, device: torch.device, knobs: WholeModel) -> Any:
    """The whole pruned model in float32, by transformers; on this device, or spread over all of its kind."""
    import torch

    from ace_cli.core.device import with_others
    from ace_cli.data.generation import whole_model
    from ace_cli.model.spread import spread_out

    hint = "Use recover=blocks, which needs one block at a time in memory."
    if knobs.spread:
        return spread_out(whole_model(pruned, torch.float32, "cpu", hint), with_others(device), knobs.beside)
    return whole_model(pruned, torch.float32, device, hint)


def last_states(
    dense: StreamedModel,
    windows_NL: Tensor,
    progress: Progress,
    look: Callable[[Sequence[Tensor], Sequence[Tensor]], None] | None = None,
) -> Tensor:
    """(N, L, H) after the dense model's last block, on the CPU; empty where there are no windows.

    ``look`` sees the states (B, L, H) of all batches that go into each block and come out of it.
    """
    import torch

    from ace_cli.core.memory import Trimmer

    if not len(windows_NL):
        return torch.empty(0)
    batches, trimmer = list(dense.batches(windows_NL, tokens=dense.plain_tokens)), Trimmer()
    with progress("listening to the dense model", len(dense.blocks)) as step, torch.inference_mode():
        for index in dense.one_by_one():
            before = [batch.hidden_BLH for batch in batches] if look is not None else []
            dense.advance(index, batches)
            if look is not None:
                look(before, [batch.hidden_BLH for batch in batches])
            del before
            trimmer()
            step()
    first = batches[0].hidden_BLH
    states_NLH, done = torch.empty(len(windows_NL), *first.shape[1:], dtype=first.dtype), 0
    del first
    while batches:
        hidden_BLH = batches.pop(0).hidden_BLH
        states_NLH[done : done + len(hidden_BLH)].copy_(hidden_BLH)
        done += len(hidden_BLH)
    return states_NLH


def slot_parameters(block: Block) -> set[str]:
    """The block's parameters that hold what was pruned, by their names in it."""
    paths = {id(module): path for path, module in block.module.named_modules()}
    return {".".join(filter(None, (paths[id(slot.module)], slot.leaf))) for slot in block.slots}


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


class Fit:
    """The training of ``weights``, changed in place: epochs, the best of them, what an interrupted one left on disk.

    ``steps`` that train, and those held out. ``workers`` train together: gradients are summed, and all have the same
    weights; the first one saves. ``keep``: of some, what may change, a bool of their shape. ``start``: values to train
    from, where these are not the ones that the model comes with; both are measured.
    """

    def __init__(
        self,
        knobs: WholeModel,
        weights: Mapping[str, nn.Parameter],
        objective: Objective,
        steps: tuple[Sequence[Step], Sequence[Step]],
        file: Path,
        workers: Workers,
        keep: Mapping[str, Tensor] | None = None,
        start: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self._knobs, self._objective, self._file = knobs, objective, file
        self._keep, self._start, self._workers = keep or {}, start, workers
        self._weights = {name: weight.requires_grad_(True) for name, weight in weights.items()}
        self._sizes = sizes(weights, self._keep) if knobs.relative else [1.0] * len(weights)
        self._training, self._held = steps
        self._done = self._lowered = 0
        self._optimiser = self._adam()
        self._errors: list[float] = []
        #: Name of each weight -> its values when the held-out windows were predicted best.
        self.best: dict[str, Tensor] = {}

    def run(self, progress: Progress) -> RecoveryFacts:
        """All epochs, or those that are left."""
        self._load()
        told = {"finished epochs": self._done, "their errors": self._errors, "lowered": self._lowered}
        self._workers.agree("before it is trained", told)
        with self._objective.ready():
            return self._run(progress)

    def _run(self, progress: Progress) -> RecoveryFacts:
        if not self._errors:
            self._measure()
            if self._start is not None:
                put_back(self._weights, self._start())
                self._measure()
        steps = len(self._training)
        while self._done < self._knobs.epochs or self._too_fast:
            if self._too_fast:
                self._lower()
            with progress(self._objective.words, self._knobs.epochs * steps, self._done * steps) as step:
                while self._done < self._knobs.epochs and not self._too_fast:
                    self._epoch(step)
                    if self._workers.several:
                        self._workers.agree("after an epoch", self._weights_alike())
                    if self._workers.first:
                        self._save()
        best = min(range(len(self._errors)), key=self._errors.__getitem__)
        epochs = max(0, best - (self._start is not None))
        return RecoveryFacts(self._errors[0], self._errors[best], epochs, self._lowered)

    @property
    def _too_fast(self) -> bool:
        """Whether the first epoch made the held-out windows worse, and a lower rate can be tried."""
        return self._done == 1 and self._lowered < LOWERINGS and not self._errors[-1] < self._errors[-2]

    def _lower(self) -> None:
        """Begin again, with a lower rate."""
        self._errors.pop()
        self._done, self._lowered = 0, self._lowered + 1
        put_back(self._weights, self._start() if self._start is not None else self.best)
        self._optimiser = self._adam()

    def _adam(self) -> torch.optim.Adam:
        weights, lr = self._weights.values(), self._knobs.lr * LOWER**self._lowered
        return adam(weights, [lr * size for size in self._sizes], next(iter(weights)).device)

    def _epoch(self, step: Callable[[], None]) -> None:
        import torch

        steps, knobs = len(self._training), self._knobs
        generator = torch.Generator().manual_seed(knobs.seed + self._done)
        for done, number in enumerate(torch.randperm(steps, generator=generator).tolist(), self._done * steps):
            pace(self._optimiser, done, knobs.epochs * steps)
            self._objective.share(self._training[number], backward=True)
            with_gradients_of(self._weights.values(), self._workers)
            for name, keep in self._keep.items():
                gradient = self._weights[name].grad
                if gradient is not None:
                    gradient.mul_(keep)  # a fifth of the time of masked_fill_
            self._optimiser.step()
            self._optimiser.zero_grad()
            step()
        self._measure()
        self._done += 1

    def _measure(self) -> None:
        """The error on the windows held out, now; the weights of the least one are kept."""
        windows = sum(held.count for held in self._held)
        mine = sum(self._objective.share(held, backward=False) * held.count for held in self._held)
        error = sum(self._workers.told(mine)) / windows
        error = error if error == error else float("inf")  # a training that diverged keeps what it had
        if error < min(self._errors, default=float("inf")) or not self.best:
            self.best = copies(self._weights)
        self._errors.append(error)

    def _weights_alike(self) -> dict[str, str]:
        from ace_cli.model.files import hash_of_tensor

        return {name: hash_of_tensor(weight.detach().cpu()) for name, weight in self._weights.items()}

    # --- on disk -------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """After an epoch: what the next one needs. Renamed into place, so that it is whole or not there."""
        from ace_cli.model.states import write_state

        self._file.parent.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for name, weight in self._weights.items():
            moments = self._optimiser.state[weight]
            tensors |= {f"weight {name}": weight.detach(), f"best {name}": self.best[name],
                        f"first {name}": moments["exp_avg"], f"second {name}": moments["exp_avg_sq"],
                        f"step {name}": moments["step"]}  # fmt: skip
        content = {"done": self._done, "errors": self._errors, "lowered": self._lowered}
        partial, final = (self._file.with_suffix(end) for end in (".partial", ".safetensors"))
        write_state(partial, final, tensors, {"state": json.dumps(content)})

    def _load(self) -> None:
        import torch
        from safetensors import safe_open

        file = self._file.with_suffix(".safetensors")
        if not file.is_file():
            return
        with safe_open(file, "pt") as stored:
            content = json.loads(stored.metadata()["state"])
            self._done, self._errors, self._lowered = content["done"], content["errors"], content.get("lowered", 0)
            self._optimiser = self._adam()  # at the rate that it had
            with torch.no_grad():
                for name, weight in self._weights.items():
                    weight.copy_(stored.get_tensor(f"weight {name}"))
                    self.best[name] = stored.get_tensor(f"best {name}").to(weight.device)
                    self._optimiser.state[weight] = {
                        "step": stored.get_tensor(f"step {name}").to(weight.device),  # fused kernels read it there
                        "exp_avg": stored.get_tensor(f"first {name}").to(weight.device),
                        "exp_avg_sq": stored.get_tensor(f"second {name}").to(weight.device),
                    }


def write_weights(streamed: StreamedModel, pruned: Checkpoint, weights: Mapping[str, Tensor], target: Path) -> None:
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
