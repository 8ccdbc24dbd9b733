"""``.bin`` files of torch -> a safetensors folder. They are pickles: only tensors are ever unpickled."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ace_cli.core.errors import AceError, first_line
from ace_cli.core.steps import NOBODY, Steps
from ace_cli.model.folder import INDEX, copy_other_files
from ace_cli.model.header import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

_SAFE = "Give a safetensors folder of this model."


def import_bin(source: Path, files: list[Path], folder: Path, steps: Steps = NOBODY) -> None:
    """Write the tensors of ``files`` and what lies beside them in ``source`` into ``folder``; a step is a file.

    Raises AceError if a file would run code, is damaged, or holds anything else than tensors by name.
    """
    from safetensors.torch import save_file

    places: dict[str, str] = {}
    steps.of(len(files))
    for number, file in enumerate(files, 1):
        state = read_bin(file)
        name = f"model-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors"
        # Tied tensors share memory, which safetensors refuses: each gets its own copy.
        save_file({key: value.clone().contiguous() for key, value in state.items()}, folder / name, {"format": "pt"})
        places |= dict.fromkeys(state, name)
        steps()
    copy_other_files(source, folder)
    if len(files) > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}, indent=2))


def read_bin(file: Path) -> dict[str, Tensor]:
    """Tensor name -> tensor, mapped from the file where its format allows it."""
    import torch

    try:
        mapped = zipfile.is_zipfile(file)  # files of torch before 1.6 are not
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as fault:
        asked = re.search(r"GLOBAL (\S+)", str(fault))  # torch's own message goes on to say how to run it
        what = f"it asks for {asked[1]}, which is no tensor" if asked else "it is no pickle of tensors"
        raise AceError(f"{file} cannot be read safely: {what}.", _SAFE) from fault
    except Exception as fault:  # damaged files fail in many layers
        raise AceError(f"{file} cannot be read: {first_line(fault)}", "Fetch the file again.") from fault
    if not isinstance(state, dict):
        raise AceError(f"{file} holds {_kind(state)}, where tensors by name are expected.", _SAFE)
    for name, value in state.items():
        if why := _misfit(name, value):
            raise AceError(f"{file}: {why}.", _SAFE)
    return state


def _misfit(name: Any, value: Any) -> str:
    """Why an entry is no weight to be stored; empty if it is one."""
    import torch

    if not isinstance(name, str):
        return f"it holds {_kind(name)} {str(name)[:50]}, where the name of a tensor is expected"
    if not isinstance(value, torch.Tensor):
        return f"{name} is {_kind(value)}, no tensor"
    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        return f"{name} is no plain tensor"
    if str(value.dtype).removeprefix("torch.") not in {kind for kind, _ in DTYPES.values()}:
        return f"{name} is stored as {value.dtype}"
    if value.numel() * value.itemsize > value.untyped_storage().nbytes():
        return f"{name} has more values than the file stores"
    return ""


def _kind(value: Any) -> str:
    names = {dict: "a dictionary", list: "a list", tuple: "a tuple", int: "a number", float: "a number", str: "a text"}
    return names.get(type(value), f"a {type(value).__name__}")
