"""No perplexity."""

from __future__ import annotations

from dataclasses import dataclass

from ace_cli.core.registry import register
from ace_cli.evaluation.task_options import TaskOptions


@register("eval", "none")
@dataclass
class NoEvaluation(TaskOptions):
    """Prune only, or measure tasks alone."""
