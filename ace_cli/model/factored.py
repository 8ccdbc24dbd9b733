"""Models some of whose linear layers are products of two thinner ones, as config.json says under "pruning"."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ace_cli.model.uneven import CLASS

#: In the "pruning" entry of config.json: linear layer, by module path -> the rank of the product that takes its place.
FACTORED = "factored"


class Product(nn.Module):
    """x -> up(down(x)): weights (O, R) and (R, I)."""

    def __init__(self, linear: Any, rank: int) -> None:
        super().__init__()
        kind = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.down = nn.Linear(linear.in_features, rank, bias=False, **kind)
        self.up = nn.Linear(rank, linear.out_features, bias=linear.bias is not None, **kind)

    def forward(self, x: torch.Tensor) -> Any:
        """In the dtype of the weights."""
        return self.up(self.down(x))


def factor(model: nn.Module, ranks: dict[str, int]) -> None:
    """Put products in place of the named linear layers; what they hold is lost."""
    for name, rank in ranks.items():
        path, _, leaf = name.rpartition(".")
        product = Product(model.get_submodule(name), rank)
        setattr(model.get_submodule(path), leaf, product.requires_grad_(False))


def ranks_of(config: Any) -> dict[str, int]:
    """What a configuration of transformers says about products."""
    found = getattr(config, "pruning", None)
    ranks: dict[str, int] = found.get(FACTORED, {}) if isinstance(found, dict) else {}
    return ranks


def source_of(stock: str) -> str:
    """The text of the modelling file for the stock class of this name."""
    return f'''"""{stock} with products of thinner weights, as config.json says under "pruning".

Load with AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import {stock}


class {CLASS}({stock}):
    """The stock model, with products in place of linear layers before the weights are read."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        factor(self, config.pruning["{FACTORED}"])


{inspect.getsource(Product)}

{inspect.getsource(factor)}'''
