"""The same prompts written on by the dense and by the pruned model: what numbers do not show."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ace_cli.core import memory
from ace_cli.core.steps import NOBODY, Steps
from ace_cli.data.generation import draw, whole_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from ace_cli.model.files import Checkpoint

#: Somebody is to read them.
MOST_TOKENS = 10_000
#: Tokens of a run that counts as repeated when it comes again.
LOOP = 4
PROMPTS = ("The capital of France is", "Water boils when", "Once upon a time there was a")


@dataclass
class Samples:
    """Each prompt is written on greedily and drawn at ``temperature``, ``tokens`` long; the same seed for every model.

    A model whose weights would take more than ``max_gb`` in memory, or half of what is free, is not asked; 0 for never.
    """

    prompts: list[str] = field(default_factory=lambda: list(PROMPTS))
    tokens: int = 24
    seed: int = 0
    temperature: float = 0.8
    max_gb: float = 4.0

    def faults(self) -> list[str]:
        """What is wrong with the knobs, one line each; empty when all is well."""
        least = {"tokens": 1, "seed": 0, "max_gb": 0}
        faults = [
            f"samples.{name}={getattr(self, name)}: must be at least {low}"
            for name, low in least.items()
            if not getattr(self, name) >= low
        ]
        if self.tokens > MOST_TOKENS:
            faults.append(f"samples.tokens={self.tokens}: must be at most {MOST_TOKENS:,}")
        if not 0 < self.temperature < float("inf"):
            faults.append(f"samples.temperature={self.temperature}: must be above 0")
        if any(not prompt.strip() for prompt in self.prompts):
            faults.append("samples.prompts: a prompt is empty")
        return faults

    @property
    def wanted(self) -> bool:
        """Whether anybody asked for samples."""
        return bool(self.prompts) and self.max_gb > 0

    def refusal(self, parameters: int, dtype: torch.dtype) -> str | None:
        """Why a model of so many parameters is not asked; None if it is."""
        need = parameters * dtype.itemsize
        if need > self.max_gb * 1e9:
            return f"No samples: the model needs {need / 1e9:.1f} GB in memory, samples.max_gb={self.max_gb:g}."
        if need > memory.free() / 2:
            return f"No samples: the model needs {need / 1e9:.1f} GB in memory, more than half of what is free."
        return None


@dataclass
class Continuations:
    """One for each prompt; and of each the share of loops: see ``repeated``."""

    greedy: list[str]
    sampled: list[str]
    greedy_loops: list[float]
    sampled_loops: list[float]


def repeated(tokens: Sequence[int], n: int = LOOP) -> float:
    """Of the runs of ``n`` tokens, the share that stood in the text before: 0 where nothing repeats, near 1 in a loop.

    Of a text too short to repeat itself 0.
    """
    runs = [tuple(tokens[first : first + n]) for first in range(len(tokens) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def write_on(
    checkpoint: Checkpoint, options: Samples, device: torch.device, dtype: torch.dtype, steps: Steps = NOBODY
) -> Continuations:
    """All prompts, both ways, in one batch; a step is a token of each. The whole model is in memory meanwhile.

    Raises AceError when the folder has no tokenizer or transformers cannot load the model.
    """
    import torch
    from transformers import LogitsProcessorList

    from ace_cli.data.documents import load_tokenizer
    from ace_cli.data.token_ids import check_ids

    tokenizer = load_tokenizer(checkpoint)
    model = whole_model(checkpoint, dtype, device, "Use samples.prompts=[].")
    rows = tokenizer(options.prompts * 2)["input_ids"]
    check_ids(
        torch.tensor([token for row in rows for token in row]),
        model.get_input_embeddings().weight.shape[0],
        checkpoint,
        "the prompts",
    )
    longest = max(map(len, rows))
    # padded here, as the tokenizer is the one that calibration and evaluation use, too
    pad = next((id for id in (tokenizer.pad_token_id, tokenizer.eos_token_id) if id is not None), 0)
    ids_BL = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    seen_BL = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    choose = _DrawLast(len(options.prompts), options.temperature, options.seed, steps)
    steps.of(options.tokens)
    with torch.inference_mode():
        written_BL = model.generate(
            input_ids=ids_BL, attention_mask=seen_BL,
            max_new_tokens=options.tokens, do_sample=False, temperature=None, top_p=None, top_k=None,
            pad_token_id=pad, logits_processor=LogitsProcessorList([choose]),
        )  # fmt: skip
    texts = tokenizer.batch_decode(written_BL[:, longest:], skip_special_tokens=True)
    ends, count = _ends(model.generation_config.eos_token_id), len(options.prompts)
    loops = [repeated(_before(row, ends)) for row in written_BL[:, longest:].tolist()]
    return Continuations(texts[:count], texts[count:], loops[:count], loops[count:])


def _ends(told: int | list[int] | None) -> set[int]:
    """Tokens that end a text."""
    return set() if told is None else {told} if isinstance(told, int) else set(told)


def _before(row: list[int], ends: set[int]) -> list[int]:
    """What was written before the text ended, and padding began."""
    return row[: next((place for place, token in enumerate(row) if token in ends), len(row))]


class _DrawLast:
    """Leaves the first rows to greedy decoding; draws the others' next token."""

    def __init__(self, greedy: int, temperature: float, seed: int, steps: Steps) -> None:
        import torch

        self._greedy, self._temperature, self._steps = greedy, temperature, steps
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores_BV: Tensor) -> Any:
        import torch

        self._steps()
        drawn_N1 = draw(scores_BV[self._greedy :].float() / self._temperature, self._generator).to(scores_BV.device)
        only_NV = torch.full_like(scores_BV[self._greedy :], float("-inf")).scatter_(1, drawn_N1, 0.0)
        return torch.cat([scores_BV[: self._greedy], only_NV])
