"""A model as transformers builds it, without its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ace_cli.core.errors import AceError
from ace_cli.core.memory import off_the_heap
from ace_cli.core.torch_api import own_buffers
from ace_cli.model.auto import LargeOnMeta, auto_class
from ace_cli.model.configuration import check_config, not_understood, transformers_config
from ace_cli.model.files import Checkpoint
from ace_cli.model.loading import shape
from ace_cli.model.transformers_api import kept_in_float32


def checked_skeleton(checkpoint: Checkpoint, device: torch.device) -> Any:
    """The model without weights; its buffers (rotary tables, embedding scales) are computed for real, on ``device``.

    Raises AceError for a configuration or weights that cannot be those of a model to prune.
    """
    if method := _quantisation(checkpoint):
        raise AceError(f"{checkpoint.folder} is quantised ({method}).", "Prune the 16-bit original, then quantise.")
    check_config(checkpoint.folder, checkpoint.tensors)
    # in float32, or tables of positions lose their digits
    skeleton = skeleton_of(checkpoint).eval()
    _move_buffers(skeleton, device)
    return skeleton


def skeleton_of(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Any:
    """The model that transformers builds from the folder's config.json for ``dtype``, its parameters on meta.

    Layers of widths of their own get them. Raises AceError for a configuration that its class cannot follow.
    """
    from accelerate import init_empty_weights

    config = transformers_config(checkpoint.folder)
    try:
        with off_the_heap(), init_empty_weights(include_buffers=False), LargeOnMeta(len(checkpoint.tensors)):
            model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
            shape(model, config)
            return model
    except Exception as fault:  # a damaged config.json fails in as many ways as there are model classes
        raise not_understood(checkpoint.folder, fault) from fault


def in_float32(checkpoint: Checkpoint, skeleton: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """Which parameters and stored buffers are in float32 when transformers loads the model in ``dtype``.

    Those that the class names (routers, say), and those that it makes so whatever is asked for.
    """
    if dtype == torch.float32:
        return lambda _: False
    named = kept_in_float32(skeleton, dtype)
    with torch.device("meta"):  # a second model, but of names alone: the first one was made in float32
        made = {
            name for name, value in skeleton_of(checkpoint, dtype).state_dict().items() if value.dtype == torch.float32
        }
    return lambda name: name in made or named(name)


def _quantisation(checkpoint: Checkpoint) -> str | None:
    """How the weights are quantised, by what the configuration says or the tensors are called."""
    config = checkpoint.config()
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            if isinstance(entry := part.get(key), dict):
                return str(entry.get("quant_method", "unknown method"))
    packed = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax", ".SCB", "_blocks")
    return next((f"it holds {name}" for name in checkpoint.tensors if name.endswith(packed)), None)


def _move_buffers(root: nn.Module, device: torch.device) -> None:
    for module in root.modules():
        buffers = own_buffers(module)
        for name, buffer in buffers.items():
            if buffer is not None and not buffer.is_meta:
                buffers[name] = buffer.to(device)
