"""recover.spread: a whole model in training lies on several devices, some blocks on each. There need be no GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import make
from transformers import AutoModelForCausalLM

from ace_cli.core.device import with_others
from ace_cli.core.errors import AceError
from ace_cli.model.spread import _parts, share_out
from ace_cli.report.facts import Report

Prune = Callable[..., Report]
TAUGHT = ("metric=wanda", "recover.batch=64", "calib.n_samples=16", "recover.epochs=1")


@pytest.mark.parametrize("beside", [0, 4.25])
@pytest.mark.parametrize(
    ("family", "more"), [("llama", {"tie_word_embeddings": True}), ("llama", {}), ("gpt2", {}), ("mixtral", {})]
)
def test_every_device_has_neighbours_and_as_little_as_can_be(
    tmp_path: Path, family: str, more: dict[str, bool], beside: float
) -> None:
    model = AutoModelForCausalLM.from_pretrained(make(tmp_path / "m", family, num_hidden_layers=7, **more))
    where, parts = share_out(model, 3, beside), _parts(model, beside)
    blocks = [path for path in where if path.rpartition(".")[2].isdigit()]
    assert len(blocks) == 7
    assert [where[path] for path in blocks] == sorted(where[path] for path in blocks)
    assert set(where.values()) == {0, 1, 2}
    assert all(any(name.startswith(f"{path}.") for path in where) for name, _ in model.named_parameters())
    nbytes = {id(each): each.nbytes for each in model.parameters()}
    of_blocks = sum(each.nbytes for path in blocks for each in model.get_submodule(path).parameters())
    assert sum(parts.values()) == pytest.approx(sum(nbytes.values()) + beside * of_blocks, abs=7)
    filled = [sum(size for path, size in parts.items() if where[path] == device) for device in range(3)]
    cuts = itertools.combinations(range(1, len(parts)), 2)  # each way to cut a row of parts in three
    sizes = list(parts.values())
    assert max(filled) == min(max(sum(sizes[:a]), sum(sizes[a:b]), sum(sizes[b:])) for a, b in cuts)


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


def test_the_device_itself_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert with_others(torch.device("cuda:1")) == [torch.device("cuda", number) for number in (1, 0, 2)]


def test_what_each_device_needs_is_compared_with_its_memory(
    llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of LOGITS alone 1.6 GB are counted: that is what each of two has half of."""
    monkeypatch.setattr("ace_cli.run.checks.with_others", lambda device: [device, device])
    monkeypatch.setattr("ace_cli.core.device.with_others", lambda device: [device, device])
    with pytest.raises(AceError, match=r"needs 1.6 GB of memory, .*recover.spread=true takes all GPUs"):
        prune_here(llama, tmp_path / "a", *TAUGHT, "recover=distill", "memory_gb=1")
    with pytest.raises(AceError, match=r"needs 0.8 GB of memory on each GPU, 0.7 GB may be used"):
        prune_here(llama, tmp_path / "c", *TAUGHT, "recover=distill", "recover.spread=true", "memory_gb=0.7")
    prune_here(llama, tmp_path / "b", *TAUGHT, "recover=distill", "recover.spread=true", "memory_gb=0.9")
