"""Zero-shot scores for people: per cent, with standard errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ace_cli.report.facts import Comparison, Score, ZeroShot


def task_head(facts: ZeroShot) -> list[str]:
    """The columns of ``task_rows``: one for each model."""
    return ["task", "metric", "items", *_models(facts)]


def task_rows(facts: ZeroShot) -> list[list[str]]:
    """One row for each task and metric, and the average of accuracies."""
    rows = [
        [task.name, metric, f"{task.items:,}" + ("" if task.all_items else " first"), *_cells(facts, by_model)]
        for task in facts.tasks
        for metric, by_model in task.scores.items()
    ]
    if facts.average and len(facts.tasks) > 1:
        rows.append([f"average of {len(facts.tasks)}", "acc", "", *_cells(facts, facts.average)])
    return rows


def comparison_head(facts: Comparison) -> list[str]:
    """The columns of ``comparison_rows``: one for each model."""
    return ["measure", "metric", "items", *facts.models]


def comparison_rows(facts: Comparison) -> list[list[str]]:
    """A row for each perplexity protocol, then the tasks."""
    rows = [
        [
            text.protocol.dataset, "perplexity", f"{text.protocol.windows} x {text.protocol.seq_len}",
            *(f"{text.models[name]:.3f}" if name in text.models else "" for name in facts.models),
        ]
        for text in facts.perplexity
    ]  # fmt: skip
    return rows + (task_rows(facts.zero_shot) if facts.zero_shot else [])


def comparison_lines(facts: Comparison) -> list[str]:
    """The protocols, one line each."""
    texts = [
        f"Perplexity on {text.protocol.dataset}: {'all' if text.protocol.all_windows else 'the first'} "
        f"{text.protocol.windows} windows of {text.protocol.seq_len} tokens without overlap, computed in "
        f"{text.protocol.dtype}, tokens {text.protocol.fingerprint[:8]}."
        for text in facts.perplexity
    ]
    return texts + ([task_line(facts.zero_shot)] if facts.zero_shot else [])


def task_line(facts: ZeroShot) -> str:
    """The protocol in one sentence."""
    which = "all items" if facts.limit is None else f"the first {facts.limit} items of each task"
    local = " and local data (ARC, OpenBookQA: validation split)" if facts.tasks[0].data.startswith("local") else ""
    return (
        f"Zero-shot, per cent ± standard error, {which}: lm-eval {facts.lm_eval}'s prompts and metrics{local}, "
        f"computed in {facts.dtype}."
    )


def task_protocol(zero_shot: Mapping[str, Any]) -> str:
    """What must be equal for two averages of report.json to stand in one column."""
    marks = " ".join(f"{task['name']}:{task['fingerprint'][:6]}" for task in zero_shot["tasks"])
    return f"{len(zero_shot['tasks'])} zero-shot tasks ({marks}), {zero_shot['dtype']}"


def _models(facts: ZeroShot) -> list[str]:
    return list(next(iter(facts.tasks[0].scores.values())))


def _cells(facts: ZeroShot, by_model: dict[str, Score]) -> list[str]:
    return [percent(by_model.get(model)) for model in _models(facts)]


def percent(score: Score | None) -> str:
    """ "41.2 ± 1.6"; empty for no score. Values that are no fractions (a perplexity) stay as they are."""
    if score is None:
        return ""
    factor, places = (100, 1) if 0 <= score.value <= 1 else (1, 3)
    error = f" ± {factor * score.stderr:.{places}f}" if score.stderr is not None else ""
    return f"{factor * score.value:.{places}f}{error}"
