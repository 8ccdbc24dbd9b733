"""A checkpoint with a LoRA adapter beside its weights, read as if it were merged.

The folder ``adapter`` in the checkpoint's own is what peft writes and loads: adapter_config.json and factors A (R, I)
and B (O, R) of every adapted weight, W + s B A with s = alpha / R.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ace_cli.core.errors import AceError
from ace_cli.core.json_reader import read_object
from ace_cli.model.files import Checkpoint
from ace_cli.model.transformers_api import is_transposed

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER = "adapter"
_CONFIG, _WEIGHTS, _CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
#: By their paths in the checkpoint.
ADAPTER_FILES = tuple(f"{ADAPTER}/{name}" for name in (_CONFIG, _CARD, _WEIGHTS))
#: How peft names a factor in the file: of the module at this path, A or B.
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def peft() -> ModuleType:
    """The library. Raises AceError where it is not installed."""
    try:
        import peft
    except ImportError as fault:
        raise AceError(f"recover=lora needs the package peft: {fault}.", 'pip install "ace-prune[recovery]"') from None
    return peft  # type: ignore[no-any-return]


def quietly(function: Callable[..., Any], *given: Any) -> Any:
    """What a function of peft gives, without transformers' remarks about the way peft asks it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return function(*given)


def with_adapter(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder``, with what its adapter adds if it has one."""
    return AdaptedCheckpoint(folder) if (folder / ADAPTER / _CONFIG).is_file() else Checkpoint(folder)


def write_adapter(adapted: Any, folder: Path, base: str) -> None:
    """The adapter of a peft model, into the new folder ``folder``; ``base`` is where it says that its model lies."""
    adapted.save_pretrained(str(folder), save_embedding_layers=False)  # else it asks the hub for the vocabulary's size
    config = read_object(folder / _CONFIG) | {"base_model_name_or_path": base}
    config["target_modules"] = sorted(config["target_modules"])  # a set: in another order in every process
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / _CARD).write_text(_TEXT, encoding="utf-8")


class AdaptedCheckpoint(Checkpoint):
    """Matrices that the adapter adds to are read in float32, with what it adds."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.adapter: Path = folder / ADAPTER

    def read(self, name: str) -> Tensor:
        stored = super().read(name)
        factors = self._factors.get(name)
        if factors is None:
            return stored
        down_RI, up_OR, scale, transposed = factors
        added_OI = scale * (up_OR.float() @ down_RI.float())
        return stored.float() + (added_OI.T if transposed else added_OI)

    @cached_property
    def _factors(self) -> dict[str, tuple[Tensor, Tensor, float, bool]]:
        """Tensor of the files -> A (R, I), B (O, R), s, and whether the file holds (I, O)."""
        import torch
        from safetensors.torch import load_file

        from ace_cli.model.streamed import StreamedModel

        config, found = read_object(self.adapter / _CONFIG), load_file(self.adapter / _WEIGHTS)
        model = StreamedModel(Checkpoint(self.folder), torch.device("cpu"), torch.float32)
        made: dict[str, tuple[Tensor, Tensor, float, bool]] = {}
        for name, down_RI in found.items():
            match = _FACTOR.fullmatch(name)
            if match is None or match[2] == "B":
                continue
            up_OR = found[name.replace(".lora_A.", ".lora_B.")]
            alpha = _of(config["alpha_pattern"], match[1], config["lora_alpha"])
            key = model.stored_as(f"{match[1]}.weight")
            if key is None:
                raise AceError(f"{self.adapter}: no tensor of {self.folder} is {match[1]}.", "Recover the model again.")
            turned = is_transposed(model.skeleton.get_submodule(match[1]))
            made[key] = down_RI, up_OR, alpha / len(down_RI), turned
        return made


def _of(patterns: dict[str, Any], path: str, usual: float) -> float:
    """peft's rule: the first pattern that matches the end of the module's path."""
    return float(next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), usual))


_TEXT = """# A LoRA adapter of the checkpoint around this folder

    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    model = PeftModel.from_pretrained(model, CHECKPOINT + "/adapter")

Merged, it would fill zeros of pruned weights; beside them it costs its own products and bytes.
"""
