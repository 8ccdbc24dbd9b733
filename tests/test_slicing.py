"""The residual stream made narrower: the basis, blocks in it, and whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import add_tokenizer, load, make, token_windows, weights
from torch import Tensor

from ace_cli.core.errors import AceError
from ace_cli.methods.metrics.slicegpt import SliceGPT
from ace_cli.model.files import Checkpoint
from ace_cli.model.pruned import verify
from ace_cli.model.streamed import StreamedModel

CPU = torch.device("cpu")
IDS = token_windows(2, 20, seed=1)
RUN = ("unit=hidden", "calib.seq_len=8", "calib.n_samples=16")


def remote(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(IDS, use_cache=False).logits
    return found


def streamed_logits(folder: Path) -> Tensor:
    model = StreamedModel(Checkpoint(folder), CPU, torch.float32)
    batches = list(model.batches(IDS))
    model.run(batches)
    with model.head_loaded():
        return model.logits(IDS, batches[0].hidden_BLH)


def test_the_basis_is_that_of_the_largest_moments() -> None:
    x_TH = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.arange(1.0, 7)
    total_HH = x_TH.T @ x_TH
    basis_HD = SliceGPT().basis(total_HH, 4)
    torch.testing.assert_close(basis_HD.T @ basis_HD, torch.eye(4, dtype=torch.float64))
    kept = [float((x_TH @ basis_HD[:, k]).square().sum()) for k in range(4)]
    values = torch.linalg.eigvalsh(total_HH).flip(0).tolist()
    assert kept == pytest.approx(values[:4])
    lost_TH = x_TH - x_TH @ basis_HD @ basis_HD.T
    assert float(lost_TH.square().sum()) == pytest.approx(sum(values[4:]))


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("qwen2", {"tie_word_embeddings": True}), ("qwen3", {}), ("gemma", {}), ("mistral", {})],
)
def test_at_no_share_the_model_computes_what_it_did(
    family: str, options: dict[str, Any], tmp_path: Path, prune_here: Any
) -> None:
    folder = add_tokenizer(make(tmp_path / "dense", family, **options))
    prune_here(folder, tmp_path / "run", *RUN, "sparsity=0")
    out = tmp_path / "run" / "checkpoint"
    torch.testing.assert_close(logits(remote(out)), logits(load(folder)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(streamed_logits(out), logits(remote(out)), rtol=1e-4, atol=1e-4)
    changed = weights(out)["model.layers.0.mlp.up_proj.weight"] - weights(folder)["model.layers.0.mlp.up_proj.weight"]
    assert float(changed.norm()) > 1  # in another basis


def test_a_sliced_model_is_narrower_everywhere(llama: Path, tmp_path: Path, prune_here: Any) -> None:
    report = prune_here(llama, tmp_path / "run", *RUN, "sparsity=30%", "html=true", "eval=self", "eval.seq_len=16")
    prune_here(llama, tmp_path / "again", *RUN, "sparsity=30%")
    out = tmp_path / "run" / "checkpoint"
    got = weights(out)
    assert (
        got["model.embed_tokens.weight"].shape == got["lm_head.weight"].shape == (*got["lm_head.weight"].shape[:1], 40)
    )
    assert got["model.layers.1.self_attn.o_proj.shortcut"].shape == (40, 40)
    assert report.size is not None
    assert report.size.parameters["pruned"] == sum(tensor.numel() for tensor in got.values())
    assert report.perplexity.pruned is not None
    assert report.fidelity is None
    assert verify(out) == 1
    torch.testing.assert_close(streamed_logits(out), logits(remote(out)), rtol=1e-4, atol=1e-4)
    remote(out).generate(token_windows(1, 4), max_new_tokens=3, do_sample=False)
    for name in ("model.safetensors", "config.json"):
        one, other = ((tmp_path / each / "checkpoint" / name).read_bytes() for each in ("run", "again"))
        assert one == other, name
    config = json.loads((out / "config.json").read_text())
    assert config["rms_norm_eps"] == pytest.approx(1e-6 * 64 / 40)


def test_what_cannot_be_sliced_is_refused(tmp_path: Path, prune_here: Any, configure: Any) -> None:
    for family in ("opt", "olmo2", "gemma2", "qwen3_moe"):
        with pytest.raises(AceError, match="unit=hidden"):
            prune_here(make(tmp_path / family, family), tmp_path / "run", *RUN)
    for options, words in (
        (["sparsity=2:4"], "sparsity=2:4 means nothing for unit=hidden"),
        (["metric=wanda"], "metric=wanda does not go with unit=hidden"),
        (["repair=lstsq"], "repair=lstsq does not go with unit=hidden"),
        (["allocation=owl"], "as wide everywhere"),
        (["recover=blocks"], "another basis"),
        (["keep=4"], "keep means nothing"),
    ):
        with pytest.raises(AceError, match=words):
            configure("unit=hidden", *options)
