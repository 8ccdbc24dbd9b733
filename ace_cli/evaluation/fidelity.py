"""How close the pruned model's predictions are to the dense model's, without any labels.

Shapes: T tokens, H hidden size, V vocabulary. Measured on the first evaluation windows, beside perplexity: the dense
model's states after its last block are kept, and both models' logits are made of theirs while the pruned model is
evaluated. Nothing outside the blocks is pruned, so one head serves both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.model.streamed import StreamedModel

#: Whole windows of at most so many tokens together (one window in any case): what fidelity is measured on.
TOKENS = 4096
#: Tokens whose two distributions are in memory at once.
CHUNK = 256


def looked_at(length: int) -> int:
    """How many of the first windows, of so many tokens each, fidelity looks at."""
    return max(1, TOKENS // length)


@dataclass
class DenseStates:
    """The dense model's states after the last block, on the CPU: one (L, H) tensor for each of the first windows.

    Given to ``perplexity`` as what watches the dense model. ``most``: windows that are kept, by default those of
    ``looked_at``.
    """

    windows_LH: list[Tensor] = field(default_factory=list)
    most: int | None = None

    def __call__(self, ids_L: Tensor, hidden_LH: Tensor, logits_TV: Tensor) -> None:
        if len(self.windows_LH) < (looked_at(len(ids_L)) if self.most is None else self.most):
            self.windows_LH.append(hidden_LH.cpu().clone())

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(window_LH.nbytes for window_LH in self.windows_LH)


class FidelityMeter:
    """Compares pruned windows with the dense ones, in their order; given to ``perplexity`` for the pruned model.

    Per window, over the tokens that have a target: KL divergence dense || pruned of the next-token distributions
    (nats), how often both find the same token most likely, and the cosine of the states after the last block.
    """

    def __init__(self, model: StreamedModel, dense: DenseStates) -> None:
        self._model = model
        self._dense = dense.windows_LH
        self.kl: list[float] = []  # mean of each window
        self.agreement: list[float] = []
        self.cosine: list[float] = []
        self.tokens = 0

    def __call__(self, ids_L: Tensor, hidden_LH: Tensor, logits_TV: Tensor) -> None:
        """One window (its ids, its states after the last block, its logits but for the last token's)."""
        import torch

        if len(self.kl) == len(self._dense):
            return
        dense_LH = self._dense[len(self.kl)].to(hidden_LH.device)
        kl, agree = 0.0, 0
        for start in range(0, len(logits_TV), CHUNK):
            rows = slice(start, min(start + CHUNK, len(logits_TV)))
            dense_TV = self._model.logits(ids_L[None, rows], dense_LH[None, rows])[0].float()
            kl += float(_divergence(dense_TV, logits_TV[rows]))
            agree += int((dense_TV.argmax(-1) == logits_TV[rows].argmax(-1)).sum())
        cosine_T = torch.cosine_similarity(dense_LH[:-1].float(), hidden_LH[:-1].float(), dim=-1)
        self.kl.append(kl / len(logits_TV))
        self.agreement.append(agree / len(logits_TV))
        self.cosine.append(float(cosine_T.double().mean()))
        self.tokens += len(logits_TV)


def _divergence(dense_TV: Tensor, pruned_TV: Tensor) -> Tensor:
    """Sum over tokens of KL(dense || pruned), from logits, float64."""
    import torch

    log_p_TV, log_q_TV = dense_TV.log_softmax(-1), pruned_TV.float().log_softmax(-1)
    # summed over the vocabulary in float32: at most some 1e5 terms of one sign in effect
    return torch.nn.functional.kl_div(log_q_TV, log_p_TV, reduction="none", log_target=True).sum(-1).double().sum()
