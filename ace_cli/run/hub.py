"""``push_to_hub=USER/NAME``: the finished checkpoint on the Hugging Face hub, with a card that machines read, too."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ace_cli.core.errors import AceError, TransientError, first_line
from ace_cli.report.card import card_of, loading
from ace_cli.report.verdict import sentence

if TYPE_CHECKING:
    from ace_cli.report.facts import Report

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def fault(name: str | None) -> str | None:
    """What is wrong with ``push_to_hub=name``; None when nothing is."""
    if name is None or _NAME.fullmatch(name):
        return None
    return f"push_to_hub={name}: must be USER/NAME"


def check(name: str) -> None:
    """Before any work: whether somebody is logged in who may write. Raises AceError if not."""
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as reason:  # offline, no token, a token that is void: each has errors of its own
        raise AceError(
            f"push_to_hub={name}: {first_line(reason)}", "Log in with `hf auth login`, or leave it out."
        ) from reason


def push(name: str, folder: Path, report: Report) -> str:
    """Upload the checkpoint in ``folder`` with its card to the model repository ``name``; returns its address.

    The folder itself is not changed. Raises TransientError where the hub does not take it: the run is finished.
    """
    from huggingface_hub import HfApi

    hub, card = HfApi(), hub_card(name, card_of(folder), report)
    try:
        address = str(hub.create_repo(name, exist_ok=True))
        hub.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=["README.md"],
                          commit_message="A model pruned with ace-prune")  # fmt: skip
        hub.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=name,
                        commit_message="Its card")  # fmt: skip
    except Exception as reason:  # whatever a network can do
        hint = f"The checkpoint is whole: repeat the command, or `hf upload {name} {folder}`."
        raise TransientError(f"push_to_hub={name}: {first_line(reason)}", hint) from reason
    return address


def hub_card(name: str, card: str, report: Report) -> str:
    """The checkpoint's own ``card`` with what was measured at its head (``model-index``) and how to load it by name."""
    import yaml

    _, head, text = card.split("---\n", 2)
    data: dict[str, Any] = yaml.safe_load(head)
    results = _results(report)
    if results:
        data["model-index"] = [{"name": name.partition("/")[2], "results": results}]
    told = dataclasses.asdict(dataclasses.replace(report, slots=[], blocks=[]))
    example = (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = {loading(name, report.own_code)}\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```'
    )
    shown = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return f"---\n{shown}---\n{text.rstrip()}\n\n{sentence(told)}\n\n{example}\n"


def _results(report: Report) -> list[dict[str, Any]]:
    """Of each data set its metrics, in the hub's form."""
    found = []
    if (protocol := report.perplexity.protocol) is not None:
        found.append(_result(protocol.dataset, {"perplexity": report.perplexity.pruned}))
    for task in report.zero_shot.tasks if report.zero_shot else []:
        found.append(_result(task.name, {metric: of["pruned"].value for metric, of in task.scores.items()
                                         if "pruned" in of}))  # fmt: skip
    return found


def _result(dataset: str, metrics: dict[str, Any]) -> dict[str, Any]:
    kind = re.sub(r"[^\w./-]+", "-", dataset.split()[0] if dataset.count("/") else dataset)
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": dataset, "type": kind},
        "metrics": [{"type": name, "value": value, "name": f"{name} (pruned)"} for name, value in metrics.items()],
    }
