"""A model folder as it comes from outside: which files in it count, and that nothing in it points out of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ace_cli.core.errors import AceError
from ace_cli.core.json_reader import read_object

INDEX = "model.safetensors.index.json"
#: The only sub-folder that tokenizers read.
TEMPLATES = "additional_chat_templates"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")


def check_folder(folder: Path) -> None:
    """AceError if the folder holds an adapter beside a model, or a link to a file that is not its own."""
    if (folder / "adapter_config.json").exists():
        raise AceError(
            f"{folder} holds a PEFT adapter (adapter_config.json), which transformers would load on top of the model.",
            "Merge it first with peft (model.merge_and_unload(), then save_pretrained), or take it out of the folder.",
        )
    for file in (*folder.iterdir(), *(folder / TEMPLATES).glob("*")):
        aside = file.name.startswith(".") or (file.is_dir() and file.name != TEMPLATES)  # never read
        if file.is_symlink() and not aside and not _is_own(file, folder):
            raise AceError(
                f"{file} is a link to {file.readlink()}, outside of the folder and of the hub's cache.",
                "Put the file itself there.",
            )


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name from an index; empty where there is no index.

    Raises AceError if a name is no plain name of a file beside the index, or the file is missing.
    """
    if not index.is_file():
        return {}
    found: Any = read_object(index).get("weight_map")
    if not isinstance(found, dict):
        raise AceError(f"{index} has no weight_map.", "Fetch the file again.")
    for tensor, name in found.items():
        if not isinstance(name, str) or not _is_plain(name):
            raise AceError(
                f"{index} says that {tensor} is in {name!r}, which is no name of a file beside it.",
                "Fetch the file again.",
            )
    if missing := sorted(name for name in set(found.values()) if not (index.parent / name).is_file()):
        raise AceError(f"{index.parent} lacks {', '.join(missing)} named in {index.name}.", "Fetch the files again.")
    return found


def other_files(folder: Path) -> list[str]:
    """Tokenizer, chat templates, generation config, licence: every file that is not a weight, by its path in it."""
    top = (file for file in folder.iterdir() if not file.name.endswith(_WEIGHTS) and not file.name.startswith("."))
    files = (*top, *(folder / TEMPLATES).glob("*.jinja"))
    return sorted(file.relative_to(folder).as_posix() for file in files if file.is_file())


def is_document(name: str) -> bool:
    """Whether the file is for people alone, and decides nothing."""
    return name.lower().endswith(".md") or name.lower().startswith(("license", "notice"))


def copy_other_files(source: Path, folder: Path) -> None:
    """Copy every file that is not a weight."""
    for name in other_files(source):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and len(name) < 256 and not any(letter in name for letter in "/\\:\0")


def _is_own(link: Path, folder: Path) -> bool:
    """Whether the link ends in ``folder``, or in the hub's cache, where snapshots are made of links."""
    from huggingface_hub.constants import HF_HUB_CACHE

    target, home = Path(os.path.realpath(link)), Path(os.path.realpath(folder))
    places = [home, Path(os.path.realpath(HF_HUB_CACHE))]
    if home.parent.name == "snapshots":  # a cache elsewhere: models--x--y/snapshots/REVISION beside blobs
        places.append(home.parent.parent / "blobs")
    return any(target.is_relative_to(place) for place in places)
