"""The model card of a pruned checkpoint: README.md with the hub's metadata. It tells nothing of the machine."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ace_cli.report.markdown import table

#: Of the source's card: the licence, and what is true of a pruned model, too.
_KEPT = ("license", "license_name", "license_link", "language", "datasets", "base_model", "pipeline_tag", "tags")
_LONGEST = 1 << 20


def model_card(base: str, on_hub: bool, command: str, summary: Mapping[str, Any], source_card: str = "") -> str:
    """README.md of a checkpoint pruned from ``base``, which is a name on the hub or not.

    ``source_card`` is the README.md of ``base``: the licence and other data at its head are kept.
    """
    import yaml

    data: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", **_head(source_card)}
    if on_hub:
        data |= {"base_model": base, "base_model_relation": "finetune"}
    tags = data.pop("tags", [])
    own = ["pruning", "sparsity", str(summary["method"]), str(summary["pattern"])]
    data["tags"] = list(dict.fromkeys([*(tags if isinstance(tags, list) else [tags]), *own]))
    head = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    facts = table(["", ""], [[name, str(value)] for name, value in summary.items() if name != "targets"])
    return f"---\n{head}---\n\n# {base}, pruned\n\n{_loading(summary)}\n\n{facts}\n\nMade by\n\n```\n{command}\n```\n"


def _loading(summary: Mapping[str, Any]) -> str:
    if summary.get("unit", "weight") == "weight":
        return "A standard dense Transformers checkpoint with zeroed weights: load it as any other."
    return (
        "A smaller dense Transformers checkpoint: load it as any other, but with trust_remote_code=True if there is a "
        "modeling_pruned.py beside it."
    )


def loading(name: str, own_code: bool) -> str:
    """How transformers loads a folder or a model on the hub; ``own_code``: whether that runs code of its own."""
    return f'AutoModelForCausalLM.from_pretrained("{name}"{", trust_remote_code=True" if own_code else ""})'


def card_of(folder: Path) -> str:
    """The text of README.md in ``folder``; empty if there is none that can be read."""
    try:
        with open(folder / "README.md", encoding="utf-8") as stream:
            return stream.read(_LONGEST)
    except (OSError, UnicodeDecodeError):
        return ""


def without_places(command: str) -> str:
    """``command`` for others to read: without output_dir, and of every absolute path only the last name."""
    words = [word for word in shlex.split(command) if not word.startswith("output_dir=")]
    return shlex.join(map(_without_place, words))


def _without_place(word: str) -> str:
    name, equals, value = word.rpartition("=")
    if value.strip("'\"").startswith(("/", "~")):
        return f"{name}{equals}{Path(value.strip(chr(34) + chr(39))).name}"
    return re.sub(r"(?<![^\[,=:'\"])[/~][^,\]'\"]*/", "", word)  # in a list


def _head(card: str) -> dict[str, Any]:
    """What is kept of the data between the two lines of dashes that a card begins with."""
    import yaml

    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card, re.DOTALL)
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except (yaml.YAMLError, RecursionError, ValueError):  # the card is for people: it may hold anything
        return {}
    data = data if isinstance(data, dict) else {}
    return {name: data[name] for name in _KEPT if _plain(data.get(name))}


def _plain(value: Any) -> bool:
    """Words, or a list of words: what the licence and tags of a card are."""
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(isinstance(word, str) for word in value)
    )
