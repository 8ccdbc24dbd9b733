"""A whole model over the GPUs of this machine, some blocks on each, by accelerate: for one that does not fit on one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ace_cli.model.transformers_api import block_classes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn


def share_out(model: nn.Module, count: int) -> dict[str, int]:
    """Path of each part of the model -> the number of its device, of ``count``: neighbours together, about as many
    bytes on each, no block on two."""
    from accelerate import infer_auto_device_map

    whole = sum(parameter.nbytes for parameter in model.parameters())
    largest = max((sum(each.nbytes for each in part.parameters()) for part in _parts(model)), default=0)
    most: dict[int | str, int | str] = dict.fromkeys(range(count), -(-whole // count) + largest)
    most[count - 1] = 2 * whole  # what is left
    return infer_auto_device_map(model, most, sorted(block_classes(model)))  # type: ignore[no-any-return]


def spread_out(model: Any, devices: Sequence[torch.device]) -> Any:
    """The model with each part on its device; it takes inputs on any of them, and answers there. Trained as it is."""
    from accelerate import dispatch_model

    names = [str(device) for device in devices]
    where = {path: names[number] for path, number in share_out(model, len(devices)).items()}
    return dispatch_model(model, where, main_device=names[0], force_hooks=True)


def _parts(model: nn.Module) -> list[nn.Module]:
    """What stays in one piece: the blocks, and what holds parameters outside of them."""
    whole, parts, inside = block_classes(model), list[Any](), set[int]()
    for module in model.modules():
        if id(module) in inside:
            continue
        if type(module).__name__ in whole or not list(module.children()):
            parts.append(module)
            inside |= {id(each) for each in module.modules()}
    return parts
