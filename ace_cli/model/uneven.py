"""Models whose blocks differ in width: no configuration of the stock classes says so, a few lines of code do.

config.json keeps, under "pruning", the shapes that differ from what the class builds. The file that is written beside
it resizes them, for transformers with ``trust_remote_code``; here they are resized without any code of the folder.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

#: In the "pruning" entry of config.json: parameter -> shape.
RESIZED = "resized"
#: The file in the folder and the class in it.
FILE, CLASS = "modeling_pruned.py", "PrunedModel"


def resize(model: nn.Module, shapes: dict[str, list[int]]) -> None:
    """Give the named parameters these shapes; what they hold is lost."""
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        old = getattr(module, leaf)
        new = torch.empty(shape, dtype=old.dtype, device=old.device)
        setattr(module, leaf, nn.Parameter(new, requires_grad=old.requires_grad))
        if leaf == "weight" and len(shape) == 2:
            names = ("nx", "nf") if hasattr(module, "nf") else ("out_features", "in_features")
            for attribute, size in zip(names, shape, strict=True):
                setattr(module, attribute, size)


def shapes_of(config: Any) -> dict[str, list[int]]:
    """What a configuration of transformers says about shapes that its class would not build."""
    found = getattr(config, "pruning", None)
    shapes: dict[str, list[int]] = found.get(RESIZED, {}) if isinstance(found, dict) else {}
    return shapes


def source_of(stock: str) -> str:
    """The text of the modelling file for the stock class of this name."""
    return f'''"""{stock} with the widths that config.json gives each layer under "pruning".

Load with AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).
"""

import torch
from torch import nn
from transformers import {stock}


class {CLASS}({stock}):
    """The stock model, its linear layers resized before the weights are read."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        resize(self, config.pruning["{RESIZED}"])


{inspect.getsource(resize)}'''
