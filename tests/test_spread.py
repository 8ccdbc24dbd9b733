"""recover.spread: a whole model in training lies on several devices, some blocks on each. There need be no GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import composed
from tiny_models import make
from transformers import AutoModelForCausalLM

from ace_cli.core.device import with_others
from ace_cli.core.errors import AceError
from ace_cli.model.spread import share_out
from ace_cli.report.facts import Report
from ace_cli.run import checks

Prune = Callable[..., Report]
TAUGHT = ("metric=wanda", "recover.batch=64", "calib.n_samples=16", "recover.epochs=1")


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_every_device_has_blocks_in_their_order_and_none_is_split(tmp_path: Path, family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(make(tmp_path / "m", family, num_hidden_layers=7))
    where = share_out(model, 3)
    blocks = [where[path] for path in where if path.rpartition(".")[2].isdigit()]
    assert len(blocks) == 7
    assert blocks == sorted(blocks)
    assert set(where.values()) == {0, 1, 2}
    assert all(any(name.startswith(path) for path in where) for name, _ in model.named_parameters())


@pytest.mark.parametrize("recover", ["distill", "lora"])
def test_the_bytes_are_those_of_one_device(
    llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch, recover: str
) -> None:
    if recover == "lora":
        pytest.importorskip("peft", reason="extra recovery is not installed")
    spread = []

    def two(device: torch.device) -> list[torch.device]:
        spread.append(device)
        return [device, device]

    one = prune_here(llama, tmp_path / "one", *TAUGHT, f"recover={recover}", "recover.lr=3e-3")
    for name in ("ace_cli.core.device.with_others", "ace_cli.run.checks.with_others"):
        monkeypatch.setattr(name, two)
    both = prune_here(llama, tmp_path / "two", *TAUGHT, f"recover={recover}", "recover.lr=3e-3", "recover.spread=true")
    assert len(spread) >= 2
    assert one.recovery == both.recovery
    assert one.recovery is not None
    assert one.recovery["after"] < one.recovery["before"]
    files = [tmp_path / name / "checkpoint" / "model.safetensors" for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_without_a_second_device_it_is_refused(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    with pytest.raises(AceError, match=r"recover.spread=true: device=cpu has no other beside it"):
        prune_here(llama, tmp_path / "out", *TAUGHT, "recover=distill", "recover.spread=true")


def test_the_memory_of_all_devices_counts(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert with_others(torch.device("cuda:1")) == [torch.device("cuda", number) for number in (1, 0, 2)]
    config = composed("model=custom", f"model.path={llama}", "recover=distill", "recover.spread=true", "memory_gb=5")
    assert checks.spread_budget(config, torch.device("cuda:1")) == 15e9
