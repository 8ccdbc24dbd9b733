"""Weights as products of thinner ones: the formulas in slow float64, and whole runs."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import flip_a_bit, stopped_before
from tiny_models import add_tokenizer, load, make, token_windows, weights
from torch import Tensor
from transformers import AutoModelForCausalLM

from ace_cli.core.errors import AceError
from ace_cli.methods.allocation.sensitivity import SHARES, Sensitivity
from ace_cli.methods.low_rank import fewer, rank_of
from ace_cli.methods.metrics.asvd import ASVD
from ace_cli.methods.metrics.svd_llm import SVDLLM
from ace_cli.methods.patterns import Ratio
from ace_cli.methods.repair.lstsq import LeastSquares
from ace_cli.methods.statistics import Gram, Seen, Size
from ace_cli.model.files import Checkpoint
from ace_cli.model.pruned import Violation, verify
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.sensitivity import sensitivities

RANK = 3


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, Tensor, Seen]:
    """A weight (7, 10), its correlated inputs in float64, and what was seen of them in two parts."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(7, 10, generator=generator)
    x_TI = torch.randn(60, 10, generator=generator) @ torch.randn(10, 10, generator=generator) + 0.3
    seen = Seen((Gram(), Size()))
    for statistic in seen:
        for part in x_TI.split(35):
            statistic.update(part, part, weight_OI)
    return weight_OI, x_TI.double(), seen


def best(weight_OI: Tensor, second_II: Tensor) -> Tensor:
    """The nearest product of rank 3 where an error counts by ``second_II``: of W C^(1/2), by its eigenvectors."""
    values, vectors = torch.linalg.eigh(second_II)
    root_II = vectors @ torch.diag(values.sqrt()) @ vectors.T
    scaled_OI = weight_OI.double() @ root_II
    _, directions = torch.linalg.eigh(scaled_OI @ scaled_OI.T)
    top_OR = directions[:, -RANK:]
    return top_OR @ (top_OR.T @ scaled_OI) @ torch.linalg.inv(root_II)


def loss(change_OI: Tensor, second_II: Tensor) -> float:
    return float((change_OI @ second_II * change_OI).sum())


@pytest.mark.parametrize("shrinkage", [0.0, 0.2, None])
def test_svd_llm_is_the_nearest_product_on_what_was_seen(
    layer: tuple[Tensor, Tensor, Seen], shrinkage: float | None
) -> None:
    weight_OI, x_TI, seen = layer
    gram_II = x_TI.T @ x_TI
    second_II = gram_II + (10 / 60 if shrinkage is None else shrinkage) * torch.diag(gram_II.diagonal())
    up_OR, down_RI, notes = SVDLLM(shrinkage).factors(weight_OI, seen, RANK)
    assert (up_OR.shape, down_RI.shape, notes) == ((7, RANK), (RANK, 10), [])
    torch.testing.assert_close(up_OR @ down_RI, best(weight_OI, second_II), rtol=1e-4, atol=1e-4)
    lower_II = torch.linalg.cholesky(second_II)
    gone = torch.linalg.svdvals(weight_OI.double() @ lower_II)[RANK:]
    assert loss(weight_OI - up_OR @ down_RI, second_II) == pytest.approx(float(gone.square().sum()), rel=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_asvd_is_the_nearest_product_of_scaled_inputs(layer: tuple[Tensor, Tensor, Seen], alpha: float) -> None:
    weight_OI, x_TI, seen = layer
    d = [(sum(abs(float(value)) for value in x_TI[:, j]) / 60) ** alpha for j in range(10)]
    up_OR, down_RI, _ = ASVD(alpha).factors(weight_OI, seen, RANK)
    expected = best(weight_OI, torch.diag(torch.tensor(d, dtype=torch.float64).square()))
    torch.testing.assert_close(up_OR @ down_RI, expected, rtol=1e-4, atol=1e-4)


def test_a_refit_is_the_best_first_factor(layer: tuple[Tensor, Tensor, Seen]) -> None:
    weight_OI, x_TI, seen = layer
    up_OR, down_RI, _ = ASVD().factors(weight_OI, seen, RANK)
    fitted_OR = LeastSquares(0.0).refit_factors(weight_OI, up_OR, down_RI, seen)
    states_TR = x_TI @ down_RI.T
    expected_OR = torch.linalg.lstsq(states_TR, x_TI @ weight_OI.double().T).solution.T
    torch.testing.assert_close(fitted_OR, expected_OR, rtol=1e-3, atol=1e-3)
    up_OR, down_RI, _ = SVDLLM(0.1).factors(weight_OI, seen, RANK)  # where the first is the best already
    torch.testing.assert_close(
        LeastSquares(0.1).refit_factors(weight_OI, up_OR, down_RI, seen), up_OR, rtol=1e-4, atol=1e-4
    )


def test_ranks_are_as_large_as_the_share_allows() -> None:
    assert rank_of(576, 1536, Fraction("0.5")) == 209
    assert 0.5 * 576 * 1536 <= fewer(576, 1536, 209) < 0.5 * 576 * 1536 + 576 + 1536
    assert rank_of(10, 10, Fraction("0.99")) == 1


def test_sensitivity_takes_most_where_it_hurts_least() -> None:
    blocks = [{"a": (4, 25), "b": (10, 10)}, {"c": (10, 20)}]
    errors = [{"a": [0.1 * k for k in range(1, 10)], "b": [k / 3 for k in range(1, 10)]}, {"c": [9.0] * 9}]
    found = Sensitivity().patterns(Ratio(Fraction("0.25")), blocks, errors)
    shares = {name: pattern.p for name, pattern in found.items() if isinstance(pattern, Ratio)}
    lost = 100 * shares["a"] + 100 * shares["b"] + 200 * shares["c"]
    assert lost == 100  # a quarter of 400, exactly
    assert shares == {"a": Fraction(8, 10), "b": Fraction(2, 10), "c": 0}  # errors up to 0.8


# --- whole runs ------------------------------------------------------------------------------------------------------

RUN = ("unit=rank", "sparsity=40%", "calib.seq_len=8")


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", ()),
        ("llama", ("metric=asvd", "allocation=sensitivity")),
        ("llama", ("metric=asvd", "repair=lstsq", "allocation=owl")),
        ("gpt2", ("propagate=dense",)),
        ("qwen3_moe", ("metric=asvd",)),
    ],
)
def test_a_run_writes_products_that_load_anywhere(
    family: str, options: tuple[str, ...], tmp_path: Path, prune_here: Any
) -> None:
    folder, out = add_tokenizer(make(tmp_path / "dense", family)), tmp_path / "run"
    report = prune_here(folder, out, *RUN, *options)
    manifest = json.loads((out / "checkpoint" / "pruning.json").read_text())
    got, want = weights(out / "checkpoint"), weights(folder)
    assert {name: tensor.shape for name, tensor in got.items()} == {name: tensor.shape for name, tensor in want.items()}
    for cut in manifest["cuts"]:
        (key,) = cut["tensors"]
        matrices = got[key].view(-1, *got[key].shape[-2:])
        ranks = [torch.linalg.matrix_rank(matrix, rtol=1e-5) for matrix in matrices]
        assert len(cut["kept"]) in [int(rank) for rank in ranks], cut["name"]
    left = sum(tensor.numel() for tensor in want.values()) - sum(cut["fewer"] for cut in manifest["cuts"])
    assert report.size is not None
    assert report.size.parameters["pruned"] == left
    total = sum(slot["shape"][0] * slot["shape"][1] for slot in report.slots)
    gone = sum(cut["fewer"] for cut in manifest["cuts"]) / total
    assert 0.39 < gone < 0.6  # ranks are whole numbers, and these weights small
    assert "as factors" in (out / "report.md").read_text()
    load(out / "checkpoint")(token_windows(1, 4))
    assert verify(out / "checkpoint") == len(manifest["cuts"])


def test_factors_are_smaller_and_compute_the_same(tmp_path: Path, prune_here: Any) -> None:
    folder = add_tokenizer(make(tmp_path / "dense", "qwen2"))  # with biases
    report = prune_here(folder, tmp_path / "run", *RUN, "unit.factors=true")
    plain, factors = tmp_path / "run" / "checkpoint", tmp_path / "run" / "factors"
    got = weights(factors)
    assert report.size is not None
    assert sum(tensor.numel() for tensor in got.values()) == report.size.parameters["pruned"]
    bias = weights(plain)["model.layers.0.self_attn.q_proj.bias"]
    assert torch.equal(got["model.layers.0.self_attn.q_proj.up.bias"], bias)
    ids = token_windows(2, 12)
    remote = AutoModelForCausalLM.from_pretrained(factors, dtype=torch.float32, trust_remote_code=True)
    streamed = StreamedModel(Checkpoint(factors), torch.device("cpu"), torch.float32)
    batches = list(streamed.batches(ids))
    streamed.run(batches)
    with torch.inference_mode(), streamed.head_loaded():
        theirs, ours = remote(ids).logits, streamed.logits(ids, batches[0].hidden_BLH)
        torch.testing.assert_close(theirs, load(plain)(ids).logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert "products as their factors" in (tmp_path / "run" / "report.md").read_text()
    with pytest.raises(AceError, match="is no linear layer of its own"):
        prune_here(make(tmp_path / "gpt2", "gpt2"), tmp_path / "no", *RUN, "unit.factors=true")


def test_sensitivities_are_those_of_products_tried_alone(llama: Path) -> None:
    model = StreamedModel(Checkpoint(llama), torch.device("cpu"), torch.float32)
    batches, metric = list(model.batches(token_windows(4, 10))), ASVD()
    found = sensitivities(model, batches, metric, SHARES, lambda: None)
    name, key = "model.layers.0.mlp.down_proj.weight", 4
    with model.loaded(model.blocks[0]), torch.no_grad():
        (slot,) = [slot for slot in model.blocks[0].slots if slot.name == name]
        seen, inputs = Seen(metric.needs()), []
        handle = slot.module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        y = model.forward(0, batches[0]).double()
        handle.remove()
        (x,) = inputs
        for statistic in seen:
            statistic.update(x.flatten(0, 1), x.flatten(0, 1), slot.weight_OI)
        up_OR, down_RI, _ = metric.factors(slot.weight_OI, seen, rank_of(*slot.shape, SHARES[key]))
        slot.put((up_OR @ down_RI).float())
        off = (model.forward(0, batches[0]).double() - y).square().sum(-1) / y.square().sum(-1)
    assert found[0][name][key] == pytest.approx(float(off.mean()), rel=1e-3)
    assert found[0][name] == sorted(found[0][name])


def test_killed_and_continued_gives_the_same_bytes(llama: Path, tmp_path: Path, prune_here: Any) -> None:
    prune_here(llama, tmp_path / "whole", *RUN)
    with stopped_before(".1.mlp.up_proj"):
        prune_here(llama, tmp_path / "killed", *RUN)
    prune_here(llama, tmp_path / "killed", *RUN)
    one, other = (tmp_path / each / "checkpoint" / "model.safetensors" for each in ("whole", "killed"))
    assert one.read_bytes() == other.read_bytes()
    flip_a_bit(other.parent, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(Violation, match="not the bytes"):
        verify(other.parent)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["sparsity=2:4"], "sparsity=2:4 means nothing for unit=rank"),
        (["sparsity=0"], "sparsity=0 means nothing for unit=rank"),
        (["keep=4"], "keep means nothing for unit=rank"),
        (["metric=wanda"], "metric=wanda does not go with unit=rank: it scores"),
        (["repair=obs"], "repair=obs does not go with unit=rank"),
        (["allocation=flap"], "allocation=flap ranks units"),
        (["unit=weight", "metric=wanda", "allocation=sensitivity"], "allocation=sensitivity tries products"),
        (["recover=blocks"], "a product would not stay one"),
        (["pack=true"], "unit=rank makes none"),
        (["unit=weight"], "metric=svd_llm does not go with unit=weight"),
        (["unit=channel", "metric=asvd"], "metric=asvd does not go with unit=channel"),
        (["metric.shrinkage=-1"], "metric.shrinkage is -1"),
    ],
)
def test_choices_that_make_no_sense_are_refused(configure: Any, options: list[str], words: str) -> None:
    with pytest.raises(AceError, match=words):
        configure("unit=rank", "metric=svd_llm", *options)
