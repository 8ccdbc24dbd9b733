"""Every name of torch that no release promises to keep, each behind one function of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones; without such units it is slower."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The module's own, by name; what is put in is what the module computes with, whatever its shape or dtype."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """As ``own_parameters``."""
    return module._buffers


def lacks_memory(fault: BaseException) -> bool:
    """Whether a device, or the host, had no memory left: torch says so by several types, one of them by its words."""
    return (
        isinstance(fault, MemoryError)
        or type(fault).__name__ == "OutOfMemoryError"
        or (isinstance(fault, RuntimeError) and "DefaultCPUAllocator" in str(fault))
    )


def is_convolution(module: nn.Module) -> bool:
    """Of any number of axes, transposed or not."""
    from torch.nn.modules.conv import _ConvNd

    return isinstance(module, _ConvNd)
