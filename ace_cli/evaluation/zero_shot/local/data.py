"""The seven's data from local folders, in the columns that the prompts of lm-eval's own tasks are written for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ace_cli.evaluation.task_options import place

Doc = dict[str, Any]


def load(task_data: str, task: str, **_: Any) -> dict[str, Any]:
    """Split -> data set. ``task_data`` comes from the task manager, ``task`` from the task's file. No network."""
    from datasets import load_from_disk

    docs = load_from_disk(str(place(Path(task_data), task)))
    if task == "boolq":
        docs = docs.add_column("label", [int(answer) for answer in docs["answer"]])
    if task == "hellaswag":
        docs = docs.add_column("query", [_hellaswag_query(doc) for doc in docs])
        docs = docs.add_column("choices", [[_cleaned(ending) for ending in endings] for endings in docs["endings"]])
    return {"validation": docs}


def _hellaswag_query(doc: Doc) -> str:
    return _cleaned(f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}")


def _cleaned(text: str) -> str:
    """WikiHow's headings end a sentence; its other notes in brackets are dropped."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def winogrande_answer(doc: Doc) -> int:
    """Which option is right: 0 or 1."""
    return int(doc["answer"]) - 1


def winogrande_contexts(doc: Doc) -> list[str]:
    """The sentence up to the gap, with each option in it."""
    return [doc["sentence"].partition("_")[0] + doc[option] for option in ("option1", "option2")]


def winogrande_rest(doc: Doc) -> str:
    """The sentence after the gap."""
    return str(doc["sentence"].partition("_")[2].strip())
