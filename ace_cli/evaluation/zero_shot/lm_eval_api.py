"""Every name of lm-eval that no release promises to keep, each behind one of ours.

A release that moves one is mended here and nowhere else; ``tests/test_libraries.py`` says which one it was.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

#: ((context, answer) as text, context ids, answer ids), as lm-eval hands requests over.
Request = tuple[tuple[str, str] | None, list[int], list[int]]


class TokenModel(HFLM):  # type: ignore[misc]
    """lm-eval's own treatment of texts and tokens (``HFLM``); a subclass computes, by ``score_tokens`` alone."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal")
        self._device = device  # where the model computes: it may have no weights to tell by

    def score_tokens(self, requests: list[Request]) -> list[tuple[float, bool]]:
        """(log-probability of the answer, whether each of its tokens is the most likely), in the requests' order."""
        raise NotImplementedError

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """As in lm-eval, without its bars."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        return self.score_tokens(requests)
