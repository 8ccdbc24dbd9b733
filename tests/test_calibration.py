"""Windows that begin with the start token, go on in the model's words, and are packed; experiments that compose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import load
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from ace_cli.core.registry import choices
from ace_cli.data.documents import text_start
from ace_cli.methods.patterns import Ratio, Scope
from ace_cli.methods.repair.sparsegpt import SparseGPT
from ace_cli.model.files import Checkpoint
from ace_cli.report.facts import Report
from ace_cli.run.config import RunConfig, config_folder

Text: Any = choices("calib")["text"]
SelfWritten: Any = choices("calib")["self"]
Configure = Callable[..., RunConfig]


def begin_texts_with_bos(folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(folder)
    return folder


def test_no_start_token_where_the_tokenizer_adds_none(llama: Path, documents: Path) -> None:
    checkpoint = Checkpoint(llama)
    assert text_start(checkpoint) is None
    on, off = (Text(8, 16, 0, flag, path=str(documents)).windows(checkpoint, "cpu") for flag in (True, False))
    assert torch.equal(on, off)


def test_every_window_begins_with_the_start_token_of_the_tokenizer(own_llama: Path, documents: Path) -> None:
    checkpoint = Checkpoint(begin_texts_with_bos(own_llama))
    on, off = (Text(8, 16, 0, flag, path=str(documents)).windows(checkpoint, "cpu") for flag in (True, False))
    assert on[:, 0].tolist() == [1] * 8
    assert torch.equal(on[:, 1:], off[:, 1:])
    assert off[:, 0].tolist() != [1] * 8


def test_the_model_writes_windows_on(llama: Path, documents: Path) -> None:
    """The given tokens stay; greedy comparison is not possible, but a second draw is the same and another seed not."""
    checkpoint = Checkpoint(llama)

    def draw(seed: int) -> torch.Tensor:
        return Text(6, 8, seed, continue_to=14, path=str(documents)).windows(checkpoint, "cpu")

    start = Text(6, 8, 0, path=str(documents)).windows(checkpoint, "cpu")
    assert draw(0).shape == (6, 14)
    assert torch.equal(draw(0)[:, :8], start)
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0)[:, 8:], draw(1)[:, 8:])


def test_continuation_follows_the_models_distribution(llama: Path) -> None:
    """With a cache or without: the next token of many equal windows has the model's own frequencies."""
    ids = SelfWritten(4000, 2, 0).windows(Checkpoint(llama), "cpu")
    with torch.inference_mode():
        expected = load(llama)(ids[:1, :1]).logits[0, 0].softmax(-1)
    found = ids[:, 1].bincount(minlength=len(expected)) / len(ids)
    assert float((found - expected).abs().max()) < 5 * float((expected * (1 - expected) / len(ids)).sqrt().max())


def test_packed_windows_lie_end_to_end(llama: Path, documents: Path) -> None:
    checkpoint = Checkpoint(llama)
    loose, packed = (Text(8, 16, 0, pack=pack, path=str(documents)).windows(checkpoint, "cpu") for pack in (None, 64))
    assert packed.shape == (2, 64)
    assert torch.equal(packed.reshape(8, 16), loose)


def test_faults_are_named(documents: Path) -> None:
    faults = Text(8, 16, 0, continue_to=16, pack=7, path=str(documents)).faults()
    assert [fault.split("=")[0] for fault in faults] == ["calib.continue_to", "calib.pack"]


def test_sparsegpt_brings_its_repair_and_compares_the_layer(configure: Configure) -> None:
    config = configure("model.path=org/name", "metric=sparsegpt")
    assert isinstance(config.repair, SparseGPT)
    assert config.repair.adaptive
    assert isinstance(config.pattern, Ratio)
    assert config.pattern.scope is Scope.layer
    with_rows = configure(
        "model.path=org/name", "metric=sparsegpt", "scope=row", "repair=sparsegpt", "repair.damping=1"
    )
    assert isinstance(with_rows.pattern, Ratio)
    assert with_rows.pattern.scope is Scope.row
    assert isinstance(with_rows.repair, SparseGPT)
    assert (with_rows.repair.adaptive, with_rows.repair.damping) == (True, 1)


@pytest.mark.parametrize("name", sorted(file.stem for file in (config_folder() / "experiment").glob("*.yaml")))
def test_every_experiment_composes(configure: Configure, name: str) -> None:
    if name == "search":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason='pip install "ace-prune[search]"')
    config = configure(f"experiment={name}")
    assert config.model.path


@pytest.mark.parametrize("name", sorted(file.stem for file in (config_folder() / "model").glob("*.yaml")))
def test_every_card_names_a_model(configure: Configure, name: str) -> None:
    path = [] if name != "custom" else ["model.path=org/name"]
    assert configure(f"model={name}", *path).model.path.count("/") == 1


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_the_best_recipe_runs_and_lowers_the_layer_errors(
    llama: Path, documents: Path, tmp_path: Path, prune_here: Callable[..., Report], sparsity: str
) -> None:
    permute = "ria" if sparsity == "2:4" else "none"
    report = prune_here(
        llama, tmp_path / "out", "experiment=best", f"sparsity={sparsity}", "calib=text", f"calib.path={documents}",
        "calib.continue_to=24", f"permute={permute}",
    )  # fmt: skip
    assert report.sparsity.achieved == pytest.approx(0.5)
    assert all(slot["diagnosis"]["loss_after"] < slot["diagnosis"]["loss_before"] for slot in report.slots)


def test_a_dropped_checkpoint_leaves_the_report(llama: Path, tmp_path: Path, prune_here: Callable[..., Report]) -> None:
    prune_here(llama, tmp_path / "out", "keep_checkpoint=false")
    assert not (tmp_path / "out" / "checkpoint").exists()
    assert (tmp_path / "out" / "report.json").is_file()
