"""Which of transformers' classes builds a model, and which parts of it are not its text decoder."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ace_cli.core.errors import AceError
from ace_cli.model.transformers_api import needs_images


class LargeOnMeta(TorchFunctionMode):
    """Tensors of more than ``LIMIT`` elements are made on the meta device: those are weights, never tables.

    All experts of a layer are one tensor, of 30 GB in DeepSeek-V3, that a machine may refuse even to reserve. A
    configuration that asks for many times more tensors than the ``stored`` ones is refused before it has made them all.
    First values are given to tensors that hold any: on the meta device that would take half of a model's making.
    """

    LIMIT = 1 << 26
    #: Tensors made for each one stored: files may hold all experts of a layer in one, that a class makes singly.
    TIMES, SPARE = 1000, 10_000
    #: What gives a tensor its first values, in place; by name, because transformers has guarded copies of torch's own.
    FILLS = frozenset({
        "normal_", "uniform_", "trunc_normal_", "constant_", "ones_", "zeros_", "zero_", "fill_", "kaiming_normal_",
        "kaiming_uniform_", "xavier_normal_", "xavier_uniform_",
    })  # fmt: skip

    def __init__(self, stored: int) -> None:
        super().__init__()
        self._stored = stored
        self._made = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self.FILLS:
            filled = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if filled.is_meta:
                return filled
        elif func in (torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand) and args:
            self._made += 1
            if self._made > self.TIMES * self._stored + self.SPARE:
                raise AceError(
                    f"config.json asks for more than {self._made - 1:,} tensors, the files hold {self._stored:,}.",
                    "Mend it, or fetch it again.",
                )
            size = args[0] if isinstance(args[0], tuple | list) else args
            if math.prod(size) > self.LIMIT:
                kwargs = {**kwargs, "device": "meta"}
        elif func is torch.arange and max((abs(bound) for bound in args if type(bound) is int), default=0) > self.LIMIT:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def auto_class(config: Any) -> Any:
    """The auto class that builds a language model of ``config``, with images or without."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if needs_images(config) else AutoModelForCausalLM


def decoder_of(skeleton: Any) -> Any:
    """The model that turns token ids into hidden states."""
    from transformers import PreTrainedModel

    decoder = skeleton.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else skeleton.base_model  # some heads are called decoder


def other_models(skeleton: Any) -> dict[str, Any]:
    """Models inside ``skeleton`` that its text decoder is no part of (towers for images and sound), by path."""
    from transformers import PreTrainedModel

    decoder = decoder_of(skeleton)
    found: dict[str, Any] = {}
    for path, module in skeleton.named_modules():
        inside = any(path.startswith(f"{known}.") for known in found)
        if isinstance(module, PreTrainedModel) and not inside and not _related(module, decoder):
            found[path] = module
    return found


def _related(one: Any, other: Any) -> bool:
    return any(part is other for part in one.modules()) or any(part is one for part in other.modules())
