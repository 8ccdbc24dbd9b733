"""A streamed model as lm-eval sees it: log-likelihoods of answers, block by block from the files.

Names of dimensions: B rows, L tokens, H hidden, P scored positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ace_cli.core.memory import Trimmer
from ace_cli.core.steps import NOBODY, Steps
from ace_cli.core.workers import ONE, Workers
from ace_cli.data.documents import load_tokenizer
from ace_cli.data.token_ids import check_ids
from ace_cli.evaluation.zero_shot.lm_eval_api import Request, TokenModel
from ace_cli.model.calls import Batch
from ace_cli.model.streamed import StreamedModel

#: Hidden states held at once: a bound that does not depend on the number of items; the blocks are read anew for each
#: such part.
HIDDEN_BYTES = 1 << 30
#: Tokens that go through a block at once, at most: sequences of unlike length pad each other.
BATCH_TOKENS = 8192
#: Rows of logits computed at once.
LOGIT_ROWS = 256

#: Opens a progress bar of so many steps and gives the function to call after each.


@dataclass
class _Row:
    """One sequence to be run, and the answers that end in it: (number of the request, its token ids)."""

    ids: tuple[int, ...]
    answers: list[tuple[int, list[int]]] = field(default_factory=list)


class StreamedLM(TokenModel):
    """lm-eval's own treatment of texts and tokens over a model that is never whole in memory.

    Batches are made of sequences of like length, as many as the streamed model takes at once: nothing to set. Only
    likelihoods are computed; tasks that write text are refused before (``harness.load``).
    """

    def __init__(self, model: StreamedModel, steps: Steps = NOBODY, workers: Workers = ONE) -> None:
        super().__init__(model.skeleton, load_tokenizer(model.checkpoint), model.device)
        self._streamed = model
        self._steps = steps
        self._workers = workers
        self._batch_tokens = min(BATCH_TOKENS, model.plain_tokens)

    def score_tokens(self, requests: list[Request]) -> list[tuple[float, bool]]:
        """As in ``TokenModel``, in float32. A sequence longer than the model is cut on the left, as in lm-eval."""
        used = {token for _, context, answer in requests for token in (*context, *answer)}
        check_ids(torch.tensor([*used, 0]), self._streamed.vocabulary, self._streamed.checkpoint, "the tasks")
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        parts = list(self._parts(_rows(requests, self.max_length)))
        self._steps.of(len(parts) * len(self._streamed.blocks))
        for part in parts:
            mine = [part[number] for number in self._workers.dealt(len(part))]
            for of_worker in self._workers.told(list(self._score(mine)) if mine else []):
                for number, (total, greedy) in of_worker:
                    results[number] = total, greedy
        return results

    def _parts(self, rows: list[_Row]) -> Iterator[list[list[_Row]]]:
        """Rows in batches of like length, batches in parts whose hidden states fit."""
        width = self._streamed.skeleton.config.get_text_config().hidden_size * self._streamed.dtype.itemsize
        room, part = HIDDEN_BYTES // width, list[list[_Row]]()
        while rows:
            length = len(rows[0].ids)
            count = max(1, self._batch_tokens // length)
            batch, rows = rows[:count], rows[count:]
            if part and room < len(batch) * length:
                yield part
                room, part = HIDDEN_BYTES // width, []
            room -= len(batch) * length
            part.append(batch)
        if part:
            yield part

    def _score(self, part: list[list[_Row]]) -> Iterator[tuple[int, tuple[float, bool]]]:
        model, trimmer = self._streamed, Trimmer()
        batches = list(model.embedded(_padded(rows) for rows in part))
        model.run(batches, lambda _: self._steps())
        with torch.inference_mode(), model.head_loaded():
            for rows, batch in zip(part, batches, strict=True):
                yield from self._read_off(rows, batch)
                trimmer()

    def _read_off(self, rows: list[_Row], batch: Batch) -> Iterator[tuple[int, tuple[float, bool]]]:
        answers = [(place, len(row.ids), *answer) for place, row in enumerate(rows) for answer in row.answers]
        hidden_PH = torch.cat([batch.hidden_BLH[place, end - len(ids) : end] for place, end, _, ids in answers])
        targets_P = torch.tensor([token for _, _, _, ids in answers for token in ids], device=hidden_PH.device)
        logs, hits = [], []
        for part_PH, part_P in zip(torch.split(hidden_PH, LOGIT_ROWS), torch.split(targets_P, LOGIT_ROWS), strict=True):
            logs_PV = self._log_probabilities(part_PH)
            logs.append(logs_PV.gather(1, part_P[:, None])[:, 0])
            hits.append(logs_PV.argmax(1) == part_P)
        sizes = [len(ids) for *_, ids in answers]
        logs_of = torch.split(torch.cat(logs).cpu().double(), sizes)
        hits_of = torch.split(torch.cat(hits).cpu(), sizes)
        for (_, _, number, _), log_P, hit_P in zip(answers, logs_of, hits_of, strict=True):
            yield number, (float(log_P.sum()), bool(hit_P.all()))

    def _log_probabilities(self, hidden_PH: Tensor) -> Tensor:
        """Rows of one token each: what follows the blocks looks at no other position."""
        ids_P1 = torch.zeros(len(hidden_PH), 1, dtype=torch.int64)
        return torch.log_softmax(self._streamed.logits(ids_P1, hidden_PH[:, None])[:, 0].float(), dim=-1)


def _rows(requests: list[Request], max_length: int) -> list[_Row]:
    """The sequences to run, longest first: requests that differ only in their last token share one."""
    rows: dict[tuple[int, ...], _Row] = {}
    for number, (_, context, answer) in enumerate(requests):
        ids = tuple((context + answer)[-(max_length + 1) :][:-1])
        rows.setdefault(ids, _Row(ids)).answers.append((number, answer))
    return sorted(rows.values(), key=lambda row: (-len(row.ids), row.ids))


def _padded(rows: list[_Row]) -> Tensor:
    """Token ids, int64 (B, L), filled on the right: a causal model does not look there."""
    length = len(rows[0].ids)
    return torch.tensor([[*row.ids, *[0] * (length - len(row.ids))] for row in rows])
