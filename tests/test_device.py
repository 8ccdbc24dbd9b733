"""What is asked of a CUDA device, by what torch is called with: there need be none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ace_cli.core.device import choose_device
from ace_cli.core.errors import AceError
from ace_cli.run.checks import memory_budget


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Torch sees two GPUs; the devices that were made the current one."""
    current: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.parametrize(("name", "index"), [("cuda", 0), ("cuda:1", 1)])
def test_the_chosen_gpu_is_the_current_one(two_gpus: list[Any], name: str, index: int) -> None:
    """Or pinned memory and whatever says cuda alone would go to the first one."""
    assert choose_device(name) == torch.device(name)
    assert two_gpus == [index]


def test_a_gpu_that_is_not_there_is_refused(two_gpus: list[Any]) -> None:
    with pytest.raises(AceError, match="2 CUDA devices"):
        choose_device("cuda:2")
    assert not two_gpus


def test_what_torch_keeps_for_itself_on_a_gpu_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later job of a sweep finds torch's cache full of the last one's blocks: that is not another program's."""
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (10_000, 80_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: asked.append(device) or 30_000)
    device = torch.device("cuda:1")
    assert memory_budget(None, device) == pytest.approx(0.9 * 40_000)
    assert asked == [device, device]
    assert memory_budget(2.0, device) == 2e9
