"""LoRA adapters, peft's, on the linear layers of a whole model's blocks.

Shapes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ace_cli.core.errors import AceError
from ace_cli.model.adapted import peft, quietly, write_adapter
from ace_cli.model.transformers_api import is_transposed
from ace_cli.recovery.whole import slot_parameters

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from ace_cli.model.blocks import Block
    from ace_cli.model.streamed import StreamedModel

_NAME = "default"  # peft's for the only one


class Adapters:
    """Products s B A beside the weights of ``student``, B zero and A random by ``seed``.

    ``ranks``: one for each block; s is ``scale`` in all. ``masked``: what is zero in a weight stays so, and counts as
    such while it is trained; else the product is added as it is. Experts kept as one parameter get none. Raises
    AceError for a model without linear layers in its blocks.
    """

    def __init__(
        self, student: nn.Module, streamed: StreamedModel, ranks: Sequence[int], scale: float, masked: bool, seed: int
    ) -> None:
        paths = [path for block in streamed.blocks for path in adapted_paths(block)]
        if not paths:
            kind = type(student).__name__
            raise AceError(f"recover=lora: the blocks of {kind} have no linear layers.", "Use recover=blocks.")
        transposed = all(is_transposed(student.get_submodule(path)) for path in paths)
        self._scale, blocks = scale, [f"{re.escape(block.name)}\\..+" for block in streamed.blocks]
        even = ranks[0] if len(set(ranks)) == 1 else None
        config = peft().LoraConfig(
            r=even or ranks[0], lora_alpha=scale * (even or ranks[0]), lora_dropout=0.0, target_modules=paths,
            fan_in_fan_out=transposed, bias="none", task_type="CAUSAL_LM",
            rank_pattern={} if even else dict(zip(blocks, ranks, strict=True)),
            alpha_pattern={} if even else {block: scale * r for block, r in zip(blocks, ranks, strict=True)},
        )  # fmt: skip
        self.model = quietly(peft().get_peft_model, student, config)
        self._layers = {path: self.model.get_submodule(f"base_model.model.{path}") for path in paths}
        self._masked = masked
        for layer in self._layers.values():
            if masked and bool((layer.base_layer.weight == 0).any()):
                layer.forward = self._through_mask(layer)
        _draw(self._layers, seed)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """What is trained: the factors by "A" or "B" and the path of their module."""
        return {
            f"{letter} {path}": factors[_NAME].weight
            for path, layer in self._layers.items()
            for letter, factors in (("A", layer.lora_A), ("B", layer.lora_B))
        }

    def started(self, products: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """``weights`` at which each s B A is the product up (O, R) down (R, I) given for its module's path."""
        root = self._scale**0.5
        return {
            f"{letter} {path}": factor / root
            for path, (up_OR, down_RI) in products.items()
            for letter, factor in (("A", down_RI), ("B", up_OR))
        }

    def merged(self) -> dict[str, Tensor]:
        """Name of each adapted parameter -> the weight with its product, as it is stored. Changes the student."""
        import torch

        from ace_cli.kernels.masked_linear import masked_sum

        found = {}
        with torch.no_grad():
            for path, layer in self._layers.items():
                weight = layer.base_layer.weight
                weight_OI, down_RI, up_OR = self._parts(layer)
                if self._masked:
                    weight_OI.copy_(masked_sum(weight_OI, down_RI, up_OR, self._scale))
                else:
                    weight_OI.addmm_(up_OR, down_RI, alpha=self._scale)
                found[f"{path}.weight"] = weight.detach()
        return found

    def write(self, folder: Path, base: str) -> None:
        """As peft loads them, for the checkpoint that will lie at ``base``."""
        write_adapter(self.model, folder, base)

    def _parts(self, layer: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Weight (O, I), A (R, I) and B (O, R)."""
        weight = layer.base_layer.weight
        turned = is_transposed(layer.base_layer)
        return weight.T if turned else weight, layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight

    def _through_mask(self, layer: Any) -> Callable[[Tensor], Tensor]:
        from ace_cli.kernels.masked_linear import masked_linear

        def forward(x: Tensor) -> Tensor:
            weight_OI, down_RI, up_OR = self._parts(layer)
            return masked_linear(x, weight_OI, layer.base_layer.bias, down_RI, up_OR, self._scale)

        return forward


def adapter_faults(rank: int, alpha: float) -> list[str]:
    """What is wrong with the knobs of adapters, one line each."""
    faults = [] if rank >= 1 else [f"recover.rank={rank}: must be at least 1"]
    return faults if 0 < alpha < float("inf") else [*faults, f"recover.alpha={alpha:g}: must be above 0"]


def adapted_paths(block: Block) -> list[str]:
    """The linear layers of a block that hold slots, by their paths in the whole model."""
    from torch import nn

    names = (name.removesuffix(".weight") for name in slot_parameters(block) if name.endswith(".weight"))
    modules = {name: block.module.get_submodule(name) for name in sorted(names)}
    linear = (name for name, module in modules.items() if isinstance(module, nn.Linear) or is_transposed(module))
    return [f"{block.name}.{name}" for name in linear]


def _draw(layers: Mapping[str, Any], seed: int) -> None:
    """B zero and A uniform between -1 / sqrt(I) and 1 / sqrt(I), as peft has them; the same on every device."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for path in sorted(layers):
        down_RI, up_OR = (getattr(layers[path], f"lora_{letter}")[_NAME].weight for letter in "AB")
        drawn_RI = torch.rand(down_RI.shape, generator=generator).mul_(2).sub_(1).div_(down_RI.shape[1] ** 0.5)
        with torch.no_grad():
            down_RI.copy_(drawn_RI)
            up_OR.zero_()
