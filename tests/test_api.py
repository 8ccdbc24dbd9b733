"""The Python functions: the same composition, results and refusals as the command line's."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from tiny_models import add_tokenizer, make
from transformers import AutoModelForCausalLM, AutoTokenizer

from ace_cli import evaluate, load_report, prune
from ace_cli.core.errors import AceError

FEW = {"name": "self", "n_samples": 8}
NONE = {"eval": "none", "device": "cpu", "samples": {"prompts": []}, "html": False, "quiet": True}


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_the_same_bytes_as_the_command_line(llama: Path, tmp_path: Path, prune_here) -> None:  # type: ignore[no-untyped-def]
    report = prune_here(llama, tmp_path / "a", "metric=ria", "metric.alpha=0.25", "sparsity=2:4")
    result = prune(
        llama, metric={"name": "ria", "alpha": 0.25}, sparsity="2:4", calib=FEW, output_dir=tmp_path / "b", **NONE
    )
    assert digest(result.checkpoint) == digest(Path(report.checkpoint))
    assert result.report.sparsity.achieved == 0.5
    again = load_report(tmp_path / "b")
    assert json.dumps(dataclasses.asdict(again)) == json.dumps(dataclasses.asdict(result.report))
    model = result.model(use_cache=False)
    assert not model.config.use_cache
    assert float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean()) == 0.5


def test_a_model_in_memory_is_pruned_and_not_changed(tmp_path: Path) -> None:
    folder = add_tokenizer(make(tmp_path / "m", "llama"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    result = prune(model, tokenizer, metric="wanda", sparsity=0.5, calib=FEW, output_dir=tmp_path / "out", **NONE)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    plain = prune(folder, metric="wanda", sparsity=0.5, calib=FEW, output_dir=tmp_path / "plain", **NONE)
    assert digest(result.checkpoint) == digest(plain.checkpoint)
    assert not list(tmp_path.glob(".in-memory-*"))


def test_odd_names_are_values_not_grammar(tmp_path: Path) -> None:
    folder = add_tokenizer(make(tmp_path / "a=b, (c) #1", "llama"))
    result = prune(folder, metric="magnitude", sparsity="50%", output_dir=tmp_path / "o=1,2", **NONE)
    assert result.checkpoint == tmp_path / "o=1,2" / "checkpoint"


def test_faults_are_the_command_lines(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(AceError, match="Did you mean 'wanda'"):
        prune(llama, metric="wand", output_dir=tmp_path / "out", **NONE)
    with pytest.raises(AceError, match="n_samples=0"):
        prune(llama, metric="wanda", calib={"name": "self", "n_samples": 0}, output_dir=tmp_path / "out", **NONE)
    with pytest.raises(AceError, match="no report"):
        load_report(tmp_path)
    assert not (tmp_path / "out").exists()


def test_evaluate_side_by_side(llama: Path, documents: Path) -> None:
    found = evaluate(llama, text=documents, seq_len=16, max_windows=2, quiet=True)
    assert found.models == [str(llama)]
    assert found.perplexity[0].models[str(llama)] > 1
    with pytest.raises(AceError, match="nothing to measure"):
        evaluate(llama)


def test_a_model_of_uneven_widths_is_loaded_too(llama: Path, tmp_path: Path) -> None:
    uneven = {"name": "channel", "uneven": True, "multiple": 16}
    result = prune(
        llama, unit=uneven, allocation="angular", sparsity=0.3, calib=FEW, output_dir=tmp_path / "out", **NONE
    )
    widths = {block.mlp.up_proj.out_features for block in result.model().model.layers}
    assert len(widths) > 1
