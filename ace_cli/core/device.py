"""What this machine computes with: which device, in which dtype, and what its processor is good at."""

from __future__ import annotations

import re
from enum import Enum
from typing import TYPE_CHECKING

from ace_cli.core import workers
from ace_cli.core.errors import AceError
from ace_cli.core.torch_api import has_bfloat16_units

if TYPE_CHECKING:
    import torch

    from ace_cli.model.files import Checkpoint


class Dtype(Enum):
    """The dtype of computation. auto: the stored one; float32 on a CPU without units for it."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def device_faults(name: str) -> list[str]:
    """What is wrong with the name of a device, one line; whether this machine has it is for ``choose_device``."""
    if re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        return []
    return [f"device={name}: must be auto, cpu, cuda or cuda:N"]


def choose_device(name: str) -> torch.device:
    """``auto``: a GPU where there is one; of several workers, each takes its own. AceError for one not there."""
    import torch

    if workers.size() > 1:
        return _of_worker(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda"):
        count = torch.cuda.device_count()
        index = int(name.partition(":")[2] or 0)
        if index >= count:
            raise AceError(f"device={name}: this machine shows torch {count} CUDA devices.", "Use device=cpu, or auto.")
        torch.cuda.set_device(index)  # or libraries that ask for "cuda", and pinned memory, would wake the first one
    return torch.device(name)


def with_others(device: torch.device) -> list[torch.device]:
    """This device first, then all others of its kind that this machine has."""
    import torch

    if device.type != "cuda":
        return [device]
    first = torch.cuda.current_device() if device.index is None else device.index
    others = [number for number in range(torch.cuda.device_count()) if number != first]
    return [torch.device("cuda", number) for number in (first, *others)]


def _of_worker(name: str) -> torch.device:
    """Each worker of a machine has a GPU of its own, or all compute on the CPU."""
    import torch

    number, workers_here = workers.on_this_machine()
    count = torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    if name.startswith("cuda:"):
        raise AceError(f"device={name}: {workers_here} workers cannot share it.", "Use device=cuda: each has its own.")
    if count < workers_here:
        raise AceError(
            f"device={name}: {workers_here} workers, and this machine shows torch {count} CUDA devices.",
            "Start one worker for each device, or use device=cpu.",
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def choose_dtype(choice: Dtype, device: torch.device, source: Checkpoint) -> torch.dtype:
    """``auto``: the stored 16-bit dtype where it is computed fast, else float32."""
    import torch

    if choice is not Dtype.auto:
        return getattr(torch, choice.value)  # type: ignore[no-any-return]
    if device.type == "cpu" and not has_bfloat16_units():
        return torch.float32
    stored = {"F16": torch.float16, "BF16": torch.bfloat16} if device.type != "cpu" else {"BF16": torch.bfloat16}
    kinds = {entry.dtype for entry in source.tensors.values() if len(entry.shape) >= 2}
    return stored.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def brought_back(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU; where they are on a GPU, copied through pinned memory and waited for once, together."""
    import torch

    if not any(tensor.is_cuda for tensor in tensors.values()):
        return {name: tensor.cpu() for name, tensor in tensors.items()}
    back = {name: torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for name, each in tensors.items()}
    for name, tensor in tensors.items():
        back[name].copy_(tensor, non_blocking=True)
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        torch.cuda.synchronize(device)
    return back
