"""The training of a whole model: its epochs, the best of them, and its state on disk."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ace_cli.recovery.base import RecoveryFacts
from ace_cli.recovery.training import LOWER, LOWERINGS, adam, copies, put_back, sizes, train

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from ace_cli.core.stage import Progress
    from ace_cli.core.workers import Workers
    from ace_cli.recovery.objectives import Objective, Step
    from ace_cli.recovery.whole import WholeModel


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
        order = torch.randperm(steps, generator=generator).tolist()

        def backward(number: int) -> None:
            self._objective.share(self._training[number], backward=True)

        for _ in train(
            self._optimiser, self._weights, self._keep, backward, order, self._done * steps, knobs.epochs * steps,
            self._workers,
        ):  # fmt: skip
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
