"""What is used of the library compressed-tensors, an extra: its packing of codes into int32 and its configuration."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ace_cli.core.errors import AceError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "pack-quantized"


def library(part: str = "") -> ModuleType:
    """The library, or a module of it. Raises AceError where it is not installed, or too old."""
    name = f"compressed_tensors.{part}".rstrip(".")
    try:
        return import_module(name)
    except ImportError as fault:
        why = "is not installed" if fault.name in ("compressed_tensors", "loguru") else "is too old"
        raise AceError(
            f"quantize needs the package compressed-tensors, which {why}.", 'pip install "ace-prune[quantise]"'
        ) from None


def _helpers() -> ModuleType:
    return library("compressors.pack_quantized.helpers")


def packed(codes_OI: Tensor, bits: int) -> Tensor:
    """int8 (O, I) -> int32 (O, ceil(I * bits / 32))."""
    return _helpers().pack_to_int32(codes_OI, bits)  # type: ignore[no-any-return]


def unpacked(packed_OP: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """The way back, int8."""
    import torch

    return _helpers().unpack_from_int32(packed_OP, bits, torch.Size(shape))  # type: ignore[no-any-return]


def settings(bits: int, group: int | None, ignore: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a model whose linear layers, but for ``ignore``, have packed weights."""
    quantization = library("quantization")
    strategy = "channel" if group is None else "group"
    weights = quantization.QuantizationArgs(num_bits=bits, group_size=group, symmetric=True, strategy=strategy)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights, format=FORMAT)
    config = quantization.QuantizationConfig(
        config_groups={"group_0": scheme}, format=FORMAT, quantization_status="compressed", ignore=ignore
    )
    return config.model_dump(mode="json")  # type: ignore[no-any-return]
