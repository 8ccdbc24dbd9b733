"""A whole model over the GPUs of this machine, some blocks on each, by accelerate: for one that does not fit on one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ace_cli.model.transformers_api import block_classes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn


def spread_out(model: Any, devices: Sequence[torch.device], beside: float) -> Any:
    """The model with each part on its device; it takes inputs on any of them, and answers there. Trained as it is.

    ``beside``: bytes that training holds for each byte of a block.
    """
    from accelerate import dispatch_model

    names = [str(device) for device in devices]
    where = {path: names[number] for path, number in share_out(model, len(devices), beside).items()}
    return dispatch_model(model, where, main_device=names[0], force_hooks=True)


def share_out(model: nn.Module, count: int, beside: float) -> dict[str, int]:
    """Path of each part of the model -> the number of its device, of ``count``: neighbours together, no block on two.

    The fullest device has as little as that allows, so at most an even share and the largest part.
    """
    parts = _parts(model, beside)
    sizes = list(parts.values())
    low, high = max(sizes), sum(sizes)
    while low < high:  # the least that the fullest one can have
        middle = (low + high) // 2
        low, high = (low, middle) if _devices(sizes, middle)[-1] < count else (middle + 1, high)
    return dict(zip(parts, _devices(sizes, low), strict=True))


def _devices(sizes: Sequence[int], most: int) -> list[int]:
    """The device of each part in order, when each takes as many as fit into ``most``."""
    numbers, number, full = [], 0, 0
    for size in sizes:
        if full + size > most:
            number, full = number + 1, 0
        full += size
        numbers.append(number)
    return numbers


def _parts(model: nn.Module, beside: float) -> dict[str, int]:
    """Path of what stays in one piece, in the model's order -> its bytes: blocks, and what lies outside of them.

    A head that is the embedding lies with it, and comes first: its bytes count once.
    """
    whole, seen, inside = block_classes(model), set[int](), ""
    tied, found = dict[str, int](), dict[str, int]()
    for path, module in model.named_modules():
        if inside and path.startswith(inside):
            continue
        block = type(module).__name__ in whole
        if not path or not (block or not list(module.children())):
            continue
        inside = f"{path}." if block else ""
        own = {id(each): each.nbytes for each in module.parameters()}
        size = sum(nbytes for key, nbytes in own.items() if key not in seen)
        (tied if own and not size else found)[path] = round(size * (1 + beside * block))
        seen |= own.keys()
    return tied | found
