"""Models whose residual stream is narrower than their class builds it, in another basis before every norm.

config.json keeps, under "pruning", the shapes (see `ace_cli.model.uneven`) and the pairs of modules between which the
basis changes: what goes into a norm is the residual stream h, and h S + out is to come of it. The linear layer that
makes ``out`` has a parameter ``shortcut`` = S - I for that, so that the model's own ``h + out`` becomes h S + out.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ace_cli.model.uneven import CLASS, RESIZED, resize

#: In the "pruning" entry of config.json: [norm, linear layer] pairs, by module path.
SHORTCUTS = "shortcuts"


def add_shortcuts(model: nn.Module, pairs: list[list[str]]) -> None:
    """For each (norm, linear): what goes into the norm, times the linear's ``shortcut``, is added to its output."""
    for before, after in pairs:
        norm, linear = model.get_submodule(before), model.get_submodule(after)
        weight: Any = linear.weight
        seen: list[Any] = []
        shortcut = torch.empty(len(weight), len(weight), dtype=weight.dtype, device=weight.device)
        linear.shortcut = nn.Parameter(shortcut, requires_grad=weight.requires_grad)

        def note(module: Any, args: Any, seen: list[Any] = seen) -> None:
            seen[:] = args[:1]

        def add(module: Any, args: Any, output: Any, seen: list[Any] = seen) -> Any:
            return output + seen.pop() @ module.shortcut

        norm.register_forward_pre_hook(note)
        linear.register_forward_hook(add)


def shortcuts_of(config: Any) -> list[list[str]]:
    """What a configuration of transformers says about changes of basis."""
    found = getattr(config, "pruning", None)
    pairs: list[list[str]] = found.get(SHORTCUTS, []) if isinstance(found, dict) else []
    return pairs


def source_of(stock: str) -> str:
    """The text of the modelling file for the stock class of this name."""
    return f'''"""{stock} with a narrower residual stream, as config.json says under "pruning".

Load with AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import {stock}


class {CLASS}({stock}):
    """The stock model, resized and with changes of basis, before the weights are read."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        resize(self, config.pruning["{RESIZED}"])
        add_shortcuts(self, config.pruning["{SHORTCUTS}"])


{inspect.getsource(resize)}

{inspect.getsource(add_shortcuts)}'''
