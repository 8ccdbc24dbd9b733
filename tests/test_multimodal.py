"""Folders with a vision tower: the text decoder is pruned from text, everything else is copied byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import COMMON, add_tokenizer, randomise, token_windows, weights
from transformers import AutoConfig, AutoModelForImageTextToText

from ace_cli.model.files import Checkpoint
from ace_cli.model.streamed import StreamedModel

VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "mlp_ratio": 2, "projection_dim": 32,
}  # fmt: skip
#: model_type -> its text decoder, its vision tower, the rest.
FAMILIES: dict[str, dict[str, Any]] = {
    "llava": {"text_config": {"model_type": "llama"}, "vision_config": {"model_type": "clip_vision_model", **VISION}},
    "qwen2_vl": {
        "text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        "vision_config": {**VISION, "hidden_size": 64},
    },
    "gemma3": {"text_config": {"sliding_window": 8}, "vision_config": VISION, "mm_tokens_per_image": 4},
}


def make_multimodal(folder: Path, family: str) -> Path:
    settings = {**FAMILIES[family], "text_config": {**COMMON, **FAMILIES[family]["text_config"]}}
    torch.manual_seed(0)
    tokens = {name: COMMON["vocab_size"] - 1 - i for i, name in enumerate(("image_token_id", "video_token_id"))}
    config = AutoConfig.for_model(family, **settings, **tokens)
    model = AutoModelForImageTextToText.from_config(config)
    randomise(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make_multimodal(tmp_path_factory.mktemp(request.param), request.param))


def logits_of(folder: Path, ids_BL: torch.Tensor) -> torch.Tensor:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids_BL, use_cache=False).logits
    return logits


def test_the_decoder_streams_as_in_the_whole_model(folder: Path) -> None:
    ids_BL = token_windows(3, 20).clamp(max=100)
    model = StreamedModel(Checkpoint(folder), torch.device("cpu"), torch.float32)
    (batch,) = model.batches(ids_BL)
    model.run([batch])
    with torch.inference_mode(), model.head_loaded():
        loaded = [name for name, parameter in model.skeleton.named_parameters() if not parameter.is_meta]
        assert torch.equal(model.logits(ids_BL, batch.hidden_BLH), logits_of(folder, ids_BL))
    assert model.others
    assert not any(name.startswith(tuple(model.others)) for name in loaded), "the tower takes memory"


def test_a_run_prunes_the_text_decoder_alone(folder: Path, tmp_path: Path, prune_here: Any) -> None:
    report = prune_here(folder, tmp_path / "out", "metric=wanda", "sparsity=2:4")
    before, after = weights(folder), weights(tmp_path / "out" / "checkpoint")
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {slot["name"] for slot in report.slots}
    assert not any("vision" in name or "visual" in name or "projector" in name for name in changed)
    assert len(changed) == 14
    assert report.model["copied"]
    assert any("text decoder" in line for line in report.warnings)
    assert bool(logits_of(tmp_path / "out" / "checkpoint", token_windows(1, 8).clamp(max=100)).isfinite().all())


def test_the_text_decoder_writes_samples(folder: Path, tmp_path: Path, prune_here: Any) -> None:
    """Greedily as the whole model does, token by token, without a cache."""
    options = ("eval=self", "eval.seq_len=8", "eval.max_windows=2", "samples.prompts=[w5 w6 w7,w9]", "samples.tokens=3")
    report = prune_here(folder, tmp_path / "out", "metric=magnitude", *options)
    assert [sample.sampled for sample in report.samples] == [False, False, True, True], report.warnings
    for name, checkpoint in (("dense", folder), ("pruned", tmp_path / "out" / "checkpoint")):
        for sample in report.samples[:2]:
            ids = [int(word[1:]) for word in sample.prompt.split()]
            start = len(ids)
            while len(ids) < start + 3 and (ids[-1] != 2 or len(ids) == start):
                ids.append(int(logits_of(checkpoint, torch.tensor([ids]))[0, -1].argmax()))
            assert getattr(sample, name).split() == [f"w{token}" for token in ids[start:] if token > 2]
