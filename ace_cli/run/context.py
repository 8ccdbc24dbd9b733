"""What every step of one run reads: made once by the pipeline, handed from step to step."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ace_cli.core.timing import Clock, Phases
from ace_cli.core.workers import ONE, Workers
from ace_cli.evaluation.base import Windows
from ace_cli.evaluation.dense import DenseCache
from ace_cli.evaluation.zero_shot.harness import Tasks
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.cutting import Cutting
from ace_cli.pruning.slicing import Slicer
from ace_cli.report.terminal import Terminal
from ace_cli.run.config import RunConfig
from ace_cli.run.machine_limit import Limit
from ace_cli.run.plan import Plan


@dataclass(frozen=True)
class Texts:
    """What goes through the models: calibration windows, int64 (N, L); those that the whole model is trained on, and
    held out of that; evaluation windows; zero-shot tasks."""

    windows_NL: Tensor | None
    training_NL: Tensor | None
    held_NL: Tensor | None
    evaluation: Windows | None
    tasks: Tasks | None


@dataclass
class RunContext:
    """One run under way. ``command`` repeats it; ``dense`` is what is known of dense models.

    ``phases`` are what a person waits for; ``inner`` is what happens inside pruning, without waiting for a device: what
    it still computes counts where its result is needed. ``cutting``: the units that are taken out; then ``model`` has
    the weights that read them as its only slots. ``slicer``: makes the residual stream narrower, if that is asked for.
    """

    config: RunConfig
    command: str
    terminal: Terminal
    dense: DenseCache
    phases: Phases
    model: StreamedModel
    plan: Plan
    limit: Limit
    texts: Texts
    cutting: Cutting | None
    start: datetime.datetime
    workers: Workers = ONE
    slicer: Slicer | None = None
    inner: Clock = field(default_factory=Clock)

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.config.output_dir
