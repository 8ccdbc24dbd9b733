"""Evaluation windows: how many of a text source, and how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ace_cli.core.registry import name_of
from ace_cli.core.steps import NOBODY, Steps
from ace_cli.data.sources.base import FromSource, offer
from ace_cli.evaluation.task_options import TaskOptions

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.model.files import Checkpoint


#: Of a text that the model writes itself, a pass through the whole of it each: more would outlast all else.
MOST_WRITTEN = 100_000_000


class Windows(NamedTuple):
    """Token ids, int64 (n, seq_len), on the CPU; and whether the text has no more windows than these."""

    ids_NL: Tensor
    whole: bool


@dataclass
class Evaluation(TaskOptions, FromSource):
    """Windows of ``seq_len`` tokens, at most ``max_windows`` of them (all when null), for perplexity."""

    seq_len: int = 2048
    max_windows: int | None = None

    @property
    def dataset(self) -> str:
        """Data set and split, as the report names them."""
        return self.source.dataset

    def faults(self) -> list[str]:
        """What is wrong with the knobs, one line each; empty when all is well."""
        faults = super().faults()
        if self.seq_len < 2:
            faults.append(f"eval.seq_len={self.seq_len}: must be at least 2")
        if self.max_windows is not None and self.max_windows < 1:
            faults.append(f"eval.max_windows={self.max_windows}: must be at least 1, or null for all")
        if self.max_windows is None and self.source.endless:
            name = name_of("eval", self)
            faults.append(f"eval.max_windows=null: eval={name} writes as many windows as it is told; give a number")
        if self.source.endless and (self.max_windows or 0) * self.seq_len > MOST_WRITTEN:
            faults.append(f"eval.max_windows={self.max_windows}: at most {MOST_WRITTEN:,} tokens are written in all")
        return faults + self.source.faults("eval")

    def windows(self, checkpoint: Checkpoint, device: str, steps: Steps = NOBODY) -> Windows:
        """The windows to be measured; ``checkpoint`` is the dense model. Raises AceError when there are none.

        ``steps`` hears how far it is.
        """
        ids_NL = self.source.cut(checkpoint, self.seq_len, self.max_windows, device, steps)
        return Windows(ids_NL[: self.max_windows].clone(), self.max_windows is None or len(ids_NL) <= self.max_windows)


offer("eval", Evaluation)
