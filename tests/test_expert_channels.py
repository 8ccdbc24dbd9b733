"""Channels inside experts: every expert chooses its own, and config.json of the stock class says how many there are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import stopped_before
from safetensors.torch import save_file
from tiny_models import EXPERTS, add_tokenizer, load, make, token_windows, weights
from torch import Tensor

from ace_cli.core.errors import AceError
from ace_cli.model import expert_links
from ace_cli.model.files import Checkpoint
from ace_cli.model.pruned import verify
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.unit_cutting import UnitCutting
from ace_cli.pruning.units.channel import Channel

RUN = ("unit=channel", "unit.multiple=8", "sparsity=25%", "calib.seq_len=16")
#: What a family needs beyond its row for its shapes to tell keys apart: dense layers, shared experts of another width.
MORE: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"shared_expert_intermediate_size": 80, "mlp_only_layers": [0], "num_hidden_layers": 3},
    "qwen3_moe": {"mlp_only_layers": [0], "num_hidden_layers": 3},
    "deepseek_v3": {"n_shared_experts": 2, "intermediate_size": 104},
    "glm4_moe": {"n_shared_experts": 2},
    "llama4_text": {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 104},
}
#: Keys of config.json that change, and to what.
KEYS: dict[str, dict[str, int]] = {
    "mixtral": {"intermediate_size": 72},
    "qwen2_moe": {"intermediate_size": 72, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"intermediate_size": 72, "moe_intermediate_size": 24},
    "olmoe": {"intermediate_size": 72},
    "deepseek_v2": {"intermediate_size": 72, "moe_intermediate_size": 24},
    "deepseek_v3": {"intermediate_size": 80, "moe_intermediate_size": 24},
    "glm4_moe": {"intermediate_size": 72, "moe_intermediate_size": 24},
    "granitemoe": {"intermediate_size": 72},
    "phimoe": {"intermediate_size": 72},
    "gpt_oss": {"intermediate_size": 72},
    "llama4_text": {"intermediate_size": 72, "intermediate_size_mlp": 80},
}


def logits(folder: Path) -> Tensor:
    with torch.inference_mode():
        found: Tensor = load(folder)(token_windows(2, 20, seed=1), use_cache=False).logits
    return found


def zeroed(folder: Path, kept: dict[str, list[int]], out: Path) -> Path:
    """The dense model with zeros in place of the channels that went."""
    model, tensors = StreamedModel(Checkpoint(folder), torch.device("cpu"), torch.float32), weights(folder)
    readers = {slot.name: slot for block in model.blocks for slot in block.slots if slot.name in kept}
    assert readers.keys() == kept.keys()
    for name, slot in readers.items():
        gone = [channel for channel in range(slot.shape[1]) if channel not in kept[name]]
        slot.in_file(tensors[slot.key])[:, gone] = 0
    shutil.copytree(folder, out)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("family", EXPERTS)
def test_channels_of_every_family_go_and_the_folder_loads_anywhere(
    family: str, tmp_path: Path, prune_here: Any
) -> None:
    folder, out = add_tokenizer(make(tmp_path / "dense", family, **MORE.get(family, {}))), tmp_path / "run"
    report = prune_here(folder, out, *RUN, "repair=none")
    cuts = json.loads((out / "checkpoint" / "pruning.json").read_text())["cuts"]
    kept = {cut["name"]: cut["kept"] for cut in cuts}
    model = StreamedModel(Checkpoint(folder), torch.device("cpu"), torch.float32)
    inside = {slot.name for block in model.blocks for experts in block.experts for slot in experts.slots}
    of_experts = [stays for name, stays in kept.items() if name in inside]
    assert len({tuple(stays) for stays in of_experts}) > 1  # experts do not agree
    assert len({len(stays) for stays in of_experts}) == 1
    before, after = (json.loads((each / "config.json").read_text()) for each in (folder, out / "checkpoint"))
    assert {key: after[key] for key in before if before[key] != after[key]} == KEYS[family]
    expected = logits(zeroed(folder, kept, tmp_path / "zeroed"))  # the few tokens of an expert: sums in another order
    assert torch.allclose(logits(out / "checkpoint"), expected, atol=2e-6)
    assert verify(out / "checkpoint") == len(kept)
    sizes = [sum(tensor.numel() for tensor in weights(each).values()) for each in (folder, out / "checkpoint")]
    assert report.size.parameters == {"dense": sizes[0], "pruned": sizes[1]}


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of one tensor for each expert, and of one for all of them, transposed and with biases."""
    return {
        family: add_tokenizer(
            make(tmp_path_factory.mktemp(family), family, **{**MORE.get(family, {}), "num_hidden_layers": 3})
        )
        for family in ("deepseek_v3", "gpt_oss")
    }


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("deepseek_v3", ()),
        ("gpt_oss", ("propagate=block",)),
        ("gpt_oss", ("recover=blocks", "recover.epochs=1")),
    ],
)
def test_killed_and_continued_gives_the_same_bytes(
    family: str, more: tuple[str, ...], mixtures: dict[str, Path], tmp_path: Path, prune_here: Any
) -> None:
    prune_here(mixtures[family], tmp_path / "whole", *RUN, *more)
    with stopped_before(".2.mlp.experts"):
        prune_here(mixtures[family], tmp_path / "killed", *RUN, *more)
    report = prune_here(mixtures[family], tmp_path / "killed", *RUN, *more)
    assert any("continued" in warning for warning in report.warnings)
    whole, killed = (
        (tmp_path / name / "checkpoint" / "model.safetensors").read_bytes() for name in ("whole", "killed")
    )
    assert whole == killed  # the blocks before and those after: so each of two runs makes the same ones
    assert verify(tmp_path / "killed" / "checkpoint") > 0


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("deepseek_v3", ("metric=cfsp", "metric.form=eq8")),
        ("gpt_oss", ("metric=wanda", "repair=obs")),
        ("deepseek_v3", ("metric=flap", "calib.experts=all")),
    ],
)
def test_scores_and_refits_take_experts_too(
    family: str, options: tuple[str, ...], mixtures: dict[str, Path], tmp_path: Path, prune_here: Any
) -> None:
    prune_here(mixtures[family], tmp_path / "run", *RUN, *options)
    assert verify(tmp_path / "run" / "checkpoint") > 0
    assert bool(logits(tmp_path / "run" / "checkpoint").isfinite().all())


def test_a_refit_brings_experts_closer_to_what_they_made(
    mixtures: dict[str, Path], tmp_path: Path, prune_here: Any
) -> None:
    dense, errors = logits(mixtures["gpt_oss"]), []
    for repair in ("none", "lstsq"):
        prune_here(mixtures["gpt_oss"], tmp_path / repair, *RUN, f"repair={repair}", "calib.n_samples=64")
        errors.append(float((logits(tmp_path / repair / "checkpoint") - dense).norm()))
    assert errors[1] < errors[0]


def test_the_dense_model_teaches_one_of_narrower_experts(
    mixtures: dict[str, Path], tmp_path: Path, prune_here: Any
) -> None:
    taught = ("recover=distill", "recover.lr=1e-4", "recover.batch=32", "recover.epochs=1", "calib.n_samples=96")
    report = prune_here(mixtures["gpt_oss"], tmp_path / "run", *RUN, "repair=none", *taught)
    assert report.recovery["after"] < report.recovery["before"]
    assert verify(tmp_path / "run" / "checkpoint") > 0


def test_what_is_so_many_times_as_wide_stays_so(tmp_path: Path, prune_here: Any) -> None:
    """DeepSeek says of its shared experts only how many they are; a dense layer has a key of its own."""
    folder = add_tokenizer(make(tmp_path / "dense", "deepseek_v3", n_shared_experts=2))
    report = prune_here(folder, tmp_path / "run", *RUN[:2], "keep=16")
    widths = {name.split("layers.")[1]: stay for name, stay in report.size.stay.items()}
    assert widths["0.mlp.down_proj.weight"] == 48
    assert widths["1.mlp.shared_experts.down_proj.weight"] == 32
    assert {stay for name, stay in widths.items() if ".experts." in name} == {16}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["unit.uneven=true", "allocation=angular"], "unit.uneven=true: .* has experts, whose layers keep one width"),
        (["keep=16"], "keep=16: there are 32 channels in an expert, and 104 elsewhere"),
        (["unit.multiple=64"], "unit.multiple=64 is more than the 32 channels there are"),
        (["sparsity=1%"], "takes none of the 32 channels away"),
        (["metric=llm_pruner"], "metric=llm_pruner: gradients of single experts are not taken yet"),
    ],
)
def test_what_makes_no_sense_is_refused(options: list[str], words: str, tmp_path: Path, prune_here: Any) -> None:
    folder = add_tokenizer(make(tmp_path / "dense", "deepseek_v3", **MORE["deepseek_v3"]))
    with pytest.raises(AceError, match=words):
        prune_here(folder, tmp_path / "run", *RUN[:2], *([] if "keep=16" in options else RUN[2:3]), *options)
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_experts_that_are_not_laid_out_alike_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "dense", "gpt_oss")
    model = StreamedModel(Checkpoint(folder), torch.device("cpu"), torch.float32)
    halves = expert_links._layouts

    def wrong(experts: Any) -> Any:
        return list(halves(experts))[:1]  # gates first, values behind them: not what this family does

    monkeypatch.setattr(expert_links, "_layouts", wrong)
    with pytest.raises(AceError, match=r"gate_up_proj.0: how channels lie inside GptOssExperts was not found"):
        UnitCutting(model, Channel(), "channel")
