"""Calibration windows: how many of a text source, how long, and what the model adds to them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from ace_cli.core.steps import NOBODY, Steps
from ace_cli.data.generation import CALIBRATION, TRAINING, continue_windows
from ace_cli.data.sources.base import FromSource, offer

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.model.files import Checkpoint


class ExpertTokens(Enum):
    """Which tokens an expert is observed on."""

    routed = "routed"
    all = "all"


@dataclass
class Calibration(FromSource):
    """``n_samples`` token windows of ``seq_len``; the same seed gives the same windows.

    ``start_token`` puts the text-start token first in every window, where the tokenizer adds one to every text: a model
    that never saw a text without it is observed as it works. ``continue_to`` lets the model write each window on to
    that length. ``pack`` then lays the windows end to end in rows of that many tokens: fewer first positions.

    ``experts``: an expert of a mixture is observed on the tokens ``routed`` to it, or on ``all``; on all of them, too,
    where fewer than ``min_tokens`` are routed to it.
    """

    n_samples: int = 128
    seq_len: int = 16
    seed: int = 0
    start_token: bool = True
    continue_to: int | None = None
    pack: int | None = None
    experts: ExpertTokens = ExpertTokens.routed
    min_tokens: int = 32

    def faults(self) -> list[str]:
        """What is wrong with the knobs, one line each; empty when all is well."""
        faults = []
        if self.n_samples < 1:
            faults.append(f"calib.n_samples={self.n_samples}: must be at least 1")
        if self.seq_len < 2:
            faults.append(f"calib.seq_len={self.seq_len}: must be at least 2")
        if self.min_tokens < 1:
            faults.append(f"calib.min_tokens={self.min_tokens}: must be at least 1")
        if self.seed < 0:
            faults.append(f"calib.seed={self.seed}: must not be negative")
        if self.continue_to is not None and self.continue_to <= self.seq_len:
            faults.append(f"calib.continue_to={self.continue_to}: must be more than calib.seq_len={self.seq_len}")
        if self.pack is not None and (self.pack < 2 or self.tokens % self.pack):
            faults.append(f"calib.pack={self.pack}: must divide the {self.tokens} tokens of all windows")
        return list(dict.fromkeys([*faults, *self.source.faults("calib")]))  # both may know the seed

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return self.n_samples * (self.continue_to or self.seq_len)

    @property
    def length(self) -> int:
        """Tokens that go through the model in one row."""
        return self.pack or self.continue_to or self.seq_len

    @property
    def rows(self) -> int:
        """Rows that go through the model."""
        return self.tokens // self.length

    @property
    def length_option(self) -> str:
        """The option that decides ``length``."""
        return f"calib.{'pack' if self.pack else 'continue_to' if self.continue_to else 'seq_len'}"

    def windows(self, checkpoint: Checkpoint, device: str, steps: Steps = NOBODY, more: int = 0) -> Tensor:
        """Token ids, int64 (rows, ``length``), on the CPU. Raises AceError when the source cannot give them.

        ``steps`` hears how far it is. ``more``: so many rows that follow, too; TooFewWindows where there are fewer.
        """
        import torch

        source, further = self.source, math.ceil(more * self.n_samples / self.rows)
        ids_NL = source.draw(checkpoint, self.n_samples, self.seq_len, self.seed, device, steps, further)
        if self.start_token:
            ids_NL = source.begin(ids_NL, checkpoint)
        if longer := self.continue_to:
            parts = zip((ids_NL[: self.n_samples], ids_NL[self.n_samples :]), (CALIBRATION, TRAINING), strict=True)
            ids_NL = torch.cat([
                continue_windows(checkpoint, part, longer, self.seed, purpose, device, steps)
                for part, purpose in parts if len(part)
            ])  # fmt: skip
        return ids_NL.flatten()[: (self.rows + more) * self.length].reshape(-1, self.length)


offer("calib", Calibration)
