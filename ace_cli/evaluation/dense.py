"""What is measured of dense models. The jobs of a sweep share it by files: each model once under each protocol."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ace_cli import __version__
from ace_cli.core.locks import in_turn
from ace_cli.core.typed_json import typed
from ace_cli.evaluation.fidelity import DenseStates
from ace_cli.evaluation.samples import Continuations
from ace_cli.report.facts import TaskFacts

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass
class Dense:
    """A dense model's loss on each window, and its last states on the windows that fidelity looks at."""

    losses: list[float]
    states: DenseStates


@dataclass(frozen=True)
class DenseCache:
    """Measurements of dense models as files in ``folder``; None for a single run, which asks for each only once.

    A process that wants what another one is just measuring waits for it. ``key`` holds all that decides the numbers.
    """

    folder: Path | None = None

    def windows(self, key: tuple[Any, ...], measure: Callable[[], Dense]) -> Dense:
        """Losses and states on windows of text."""

        def load(facts: Any, tensors: list[Tensor]) -> Dense:
            return Dense(facts, DenseStates(tensors))

        return self._known(("windows", *key), measure, load, lambda dense: (dense.losses, dense.states.windows_LH))

    def tasks(self, key: tuple[Any, ...], measure: Callable[[], list[TaskFacts]]) -> list[TaskFacts]:
        """Scores on zero-shot tasks."""

        def load(facts: Any, _: list[Tensor]) -> list[TaskFacts]:
            return [typed(TaskFacts, task, "a task") for task in facts]

        return self._known(
            ("tasks", *key), measure, load, lambda found: ([dataclasses.asdict(task) for task in found], [])
        )

    def samples(self, key: tuple[Any, ...], measure: Callable[[], Continuations]) -> Continuations:
        """What prompts were written on to."""

        def load(facts: Any, _: list[Tensor]) -> Continuations:
            return Continuations(**facts)

        return self._known(("continuations", *key), measure, load, lambda found: (dataclasses.asdict(found), []))

    def _known(
        self,
        key: tuple[Any, ...],
        measure: Callable[[], T],
        load: Callable[[Any, list[Tensor]], T],
        parts: Callable[[T], tuple[Any, list[Tensor]]],
    ) -> T:
        if self.folder is None:
            return measure()
        self.folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(repr((__version__, *key)).encode()).hexdigest()[:32]
        with in_turn(self.folder / f"{name}.lock"):
            if (kept := _read(self.folder / f"{name}.safetensors")) is not None:
                return load(*kept)
            found = measure()
            _write(self.folder / f"{name}.safetensors", *parts(found))
            return found


def _read(file: Path) -> tuple[Any, list[Tensor]] | None:
    """The facts and tensors in ``file``; None where it is not there or not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            facts = json.loads(opened.metadata()["facts"])
            return facts, [opened.get_tensor(str(number)) for number in range(len(opened.keys()))]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def _write(file: Path, facts: Any, tensors: list[Tensor]) -> None:
    from ace_cli.model.states import write_state

    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")  # jobs of a sweep may write the same one
    named = {str(number): tensor for number, tensor in enumerate(tensors)}
    write_state(partial, file, named, {"facts": json.dumps(facts)})
