"""config.json as it comes from outside: its ranges checked, transformers' own object made of it, its code never run.

What decides how a model computes is the files' business; which code computes it (attention kernels, classes in the
folder) is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ace_cli.core.errors import AceError, first_line
from ace_cli.core.json_reader import read_object
from ace_cli.model.transformers_api import compute_plainly, known_model_types

#: Every count and every size in a real config.json is smaller; a larger one would be counted to for hours.
LARGEST = 1 << 24
_SIZES = re.compile(r"^(num|n|d|max)_|_(size|dim|rank|embeddings|positions|length|heads|labels|experts|token_id)$")
_NO_SIZES = re.compile(r"param|tokens|sample|seen")  # remarks on how the model was made
_BLOCKS = re.compile(r"layers?$")
#: A model is built although it lacks blocks, to name what is missing, but not with very many more than the files have.
_SPARE, _TIMES = 100, 10


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands. Raises AceError if it is no JSON object."""
    return read_object(folder / "config.json", "Mend it, or fetch it again.")


def check_config(folder: Path, tensors: Iterable[str]) -> None:
    """AceError if a number in config.json is beyond any model, or asks for many more blocks than ``tensors`` name."""
    file = folder / "config.json"
    numbers = [int(number) for name in tensors for number in re.findall(r"(?<![^.])\d{1,9}(?![^.])", name)]
    held = max(numbers, default=-1) + 1
    for name, value in _numbers(read_config(folder)):
        if _BLOCKS.search(name) and value > _TIMES * held + _SPARE:
            raise AceError(
                f"{file}: {name}={str(value)[:20]}, the files hold {held} blocks.", "Mend it, or fetch it again."
            )
        if abs(value) > LARGEST and _SIZES.search(name) and not _NO_SIZES.search(name):
            raise AceError(f"{file}: {name}={str(value)[:20]} is beyond any model.", "Mend it, or fetch it again.")


def transformers_config(folder: Path, experts: str | None = "eager") -> Any:
    """transformers' configuration of the model in ``folder``: attention and experts computed by plain torch.

    ``experts``: how those of a mixture are computed; None for the fastest way that transformers has.
    Raises AceError when transformers cannot make one without running code of the folder.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, dtype="float32")
    except Exception as fault:  # a damaged config.json fails in as many ways as there are classes
        raise not_understood(folder, fault) from fault
    config.dtype = None  # "auto" is then what is stored, not what the file says
    compute_plainly(config, experts)
    return config


def not_understood(folder: Path, fault: Exception) -> AceError:
    """Why transformers builds no model of ``folder``, and whether code of the folder would be needed for it."""
    if isinstance(fault, AceError):
        return fault
    content = read_config(folder)
    kind = content.get("model_type")
    if not isinstance(kind, str):
        return AceError(f"{folder / 'config.json'} names no model_type.", "Give the folder of a language model.")
    if kind in known_model_types():
        reason = f"transformers cannot build the model of {folder}: {first_line(fault)}"
        return AceError(reason, "Mend its config.json, or fetch it again.")
    code = " without running code that lies in the folder" if "auto_map" in content else ""
    return AceError(
        f"{folder}: this transformers does not know the model_type '{kind}'{code}.",
        "Only language models that transformers knows without remote code can be pruned.",
    )


def _numbers(content: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Every whole number of the file with the name it goes by."""
    left: list[tuple[str, Any]] = list(content.items())
    while left:
        name, value = left.pop()
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += [(name, inner) for inner in value]
        elif type(value) is int:
            yield name, value
