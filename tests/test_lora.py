"""recover=lora and recover=qlora_groups: zeros stay, what was trained is what is written, and stock peft loads it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import add_tokenizer, make

from ace_cli.core.errors import AceError
from ace_cli.kernels.masked_linear import masked_linear
from ace_cli.methods.low_rank import correction
from ace_cli.model.adapted import with_adapter
from ace_cli.model.files import Checkpoint
from ace_cli.model.streamed import StreamedModel
from ace_cli.recovery.fit import Fit
from ace_cli.recovery.lora import guided_ranks
from ace_cli.recovery.qlora_groups import GroupedLayer, Groups, pooled
from ace_cli.report.facts import Report
from ace_cli.report.markdown import recovery_line

peft = pytest.importorskip("peft", reason="extra recovery is not installed")
Prune = Callable[..., Report]
LORA = (
    "metric=wanda", "recover=lora", "recover.batch=64", "recover.lr=1e-2", "recover.rank=4", "recover.alpha=8",
    "calib.n_samples=16", "recover.epochs=2",
)  # fmt: skip
MORE = (*LORA[:3], "recover.lr=3e-3", *LORA[4:6], "calib.n_samples=96", "recover.epochs=3")
CUT = ("unit=channel", "metric=cfsp", "repair=lstsq", "sparsity=30%", "unit.multiple=16")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoint" / "model.safetensors")


def digest(run: Path, name: str = "model.safetensors") -> str:
    return hashlib.sha256((run / "checkpoint" / name).read_bytes()).hexdigest()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 27)[None]).logits


# --- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_the_masked_layer_and_its_gradients_are_those_of_the_formula(bias: bool) -> None:
    torch.manual_seed(0)
    x, weight_OI, bias_O = torch.randn(2, 5, 6), torch.randn(4, 6), torch.randn(4) if bias else None
    weight_OI[torch.rand(4, 6) < 0.5] = 0
    down_RI, up_OR = torch.randn(3, 6), torch.randn(4, 3)
    fast = [each.clone().requires_grad_(True) for each in (x, down_RI, up_OR)]
    slow = [each.double().requires_grad_(True) for each in (x, down_RI, up_OR)]
    out = masked_linear(fast[0], weight_OI, bias_O, fast[1], fast[2], 0.5)
    sum_OI = weight_OI.double() + 0.5 * (weight_OI != 0) * (slow[2] @ slow[1])
    expected = slow[0] @ sum_OI.T + (bias_O.double() if bias_O is not None else 0)
    towards = torch.randn_like(out)
    out.backward(towards)
    expected.backward(towards.double())
    assert torch.allclose(out, expected.float(), atol=1e-5)
    for mine, theirs in zip(fast, slow, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert torch.allclose(mine.grad, theirs.grad.float(), atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (3, 8)])
def test_the_closed_form_is_the_best_product_of_its_rank(shape: tuple[int, int]) -> None:
    """Against methods.md's own way: SVD of E V D, then the inverse of V D."""
    torch.manual_seed(0)
    columns = shape[1]
    error_OI, x_TI = torch.randn(shape, dtype=torch.float64), torch.randn(40, columns, dtype=torch.float64)
    x_TI *= torch.linspace(0.1, 3, columns)
    gram_II = x_TI.T @ x_TI
    size_I, basis_II = torch.linalg.eigh(gram_II)
    root_I = size_I.sqrt()
    left, values, right = torch.linalg.svd(error_OI @ basis_II * root_I, full_matrices=False)
    best_OI = (left[:, :2] * values[:2]) @ right[:2] / root_I @ basis_II.T
    up_OR, down_RI = correction(error_OI, gram_II, 2)
    assert torch.allclose((up_OR @ down_RI).double(), best_OI, atol=1e-4)
    assert torch.allclose(up_OR.norm(dim=0), down_RI.norm(dim=1), rtol=1e-4)


def test_a_correction_of_more_ranks_than_rows_is_the_whole_error() -> None:
    torch.manual_seed(0)
    error_OI, x_TI = torch.randn(3, 8), torch.randn(20, 8)
    up_OR, down_RI = correction(error_OI, x_TI.T @ x_TI, 5)
    assert (up_OR.shape, down_RI.shape) == ((3, 5), (5, 8))
    assert torch.allclose(up_OR @ down_RI, error_OI, atol=1e-5)


def test_guided_ranks_follow_the_angles_and_keep_the_sum() -> None:
    ranks = guided_ranks(8, [0.30, 0.10, 0.12, 0.11, 0.25])
    assert sum(ranks) == 40
    assert max(ranks) == ranks[0] > ranks[4] > ranks[2] >= ranks[3] >= ranks[1] >= 1
    assert guided_ranks(1, [0.9, 0.1, 0.1]) == [1, 1, 1]


# --- the whole model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_the_model_gets_better_and_what_was_pruned_stays_zero(tmp_path: Path, prune_here: Prune, family: str) -> None:
    model = make(tmp_path / "m", family)
    prune_here(model, tmp_path / "pruned", "metric=wanda", "sparsity=2:4", "calib.n_samples=16")
    report = prune_here(model, tmp_path / "lora", *LORA, "sparsity=2:4")
    before, after = weights(tmp_path / "pruned"), weights(tmp_path / "lora")
    assert report.recovery is not None
    assert report.recovery["after"] < report.recovery["before"]
    slots = {slot["name"] for slot in report.slots}
    for name in before:
        if name in slots:
            assert torch.equal(before[name] == 0, after[name] == 0), name
            assert not torch.equal(before[name], after[name]), name
        else:
            assert torch.equal(before[name], after[name]), name  # norms, biases, embeddings, head


def test_what_was_measured_is_what_was_written(tmp_path: Path, prune_here: Prune, documents: Path) -> None:
    """The error after training is that of the merged folder, by a run that begins with it."""
    model = add_tokenizer(make(tmp_path / "m", "llama"))
    options = ("calib=text", f"calib.path={documents}", "calib.n_samples=16", "calib.seq_len=16")
    first = prune_here(model, tmp_path / "first", *LORA, *options, "recover.loss=lm")
    again = prune_here(
        tmp_path / "first" / "checkpoint", tmp_path / "again", *LORA, *options, "recover.loss=lm", "recover.epochs=1",
        "sparsity=0",
    )  # fmt: skip
    assert first.recovery is not None
    assert again.recovery is not None
    assert first.recovery["after"] < first.recovery["before"]
    assert again.recovery["before"] == pytest.approx(first.recovery["after"], rel=1e-3)


def test_cut_models_are_trained_too(tmp_path: Path, prune_here: Prune) -> None:
    model = make(tmp_path / "m", "llama")
    report = prune_here(model, tmp_path / "out", *MORE, *CUT, "recover.ranks=angular", "repair=none", "sparsity=60%")
    assert report.recovery is not None
    assert report.recovery["after"] < report.recovery["before"]
    assert report.size is not None


@pytest.mark.parametrize("init", ["none", "svd"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_beside_the_checkpoint_is_one_that_peft_loads(
    tmp_path: Path, prune_here: Prune, init: str, family: str
) -> None:
    from transformers import AutoModelForCausalLM

    model = add_tokenizer(make(tmp_path / "m", family))
    prune_here(model, tmp_path / "pruned", "metric=wanda", "sparsity=2:4", "calib.n_samples=16")
    options = (*LORA, "sparsity=2:4", "recover.merge=false", f"recover.init={init}", "recover.ranks=angular")
    report = prune_here(model, tmp_path / "out", *options, "eval=self", "eval.seq_len=16", "eval.max_windows=4")
    checkpoint = tmp_path / "out" / "checkpoint"
    assert digest(tmp_path / "out") == digest(tmp_path / "pruned")
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    without = logits(plain)
    adapted = peft.PeftModel.from_pretrained(plain, checkpoint / "adapter")
    assert not torch.allclose(logits(adapted), without)
    streamed = StreamedModel(with_adapter(checkpoint), torch.device("cpu"), torch.float32)
    batches = [*streamed.batches(torch.arange(3, 27)[None])]
    streamed.run(batches)
    with streamed.head_loaded():
        ours = streamed.logits(batches[0].ids_BL, batches[0].hidden_BLH)
    assert torch.allclose(ours, logits(adapted), atol=1e-4)
    manifest = json.loads((checkpoint / "pruning.json").read_text())
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= set(manifest["files"])
    assert (
        str(checkpoint)
        == json.loads((checkpoint / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    assert "adapter" in recovery_line(report)


def test_the_closed_form_alone_helps(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    options = ("recover.merge=false", "recover.init=svd", "recover.epochs=0", "recover.rank=8", "sparsity=2:4")
    report = prune_here(llama, tmp_path / "out", *LORA[:-1], *options)
    assert report.recovery is not None
    assert report.recovery["epochs"] == 0
    assert report.recovery["after"] < report.recovery["before"]
    assert (tmp_path / "out" / "checkpoint" / "adapter").is_dir()


def test_samples_are_written_with_the_adapter(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    options = ("recover.merge=false", "eval=self", "eval.seq_len=8", "eval.max_windows=2", "samples.prompts=[w5 w6]")
    report = prune_here(llama, tmp_path / "out", *LORA, *options, "samples.tokens=8", "sparsity=2:4")
    checkpoint = Checkpoint(tmp_path / "out" / "checkpoint")
    from ace_cli.evaluation.samples import Samples, write_on

    plain = write_on(checkpoint, Samples(["w5 w6"], 8), torch.device("cpu"), torch.float32)
    adapted = write_on(with_adapter(checkpoint.folder), Samples(["w5 w6"], 8), torch.device("cpu"), torch.float32)
    assert report.samples[0].pruned == adapted.greedy[0]
    assert adapted != plain


def test_the_same_command_gives_the_same_bytes_and_another_seed_others(
    llama: Path, tmp_path: Path, prune_here: Prune
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prune_here(llama, tmp_path / name, *LORA, f"recover.seed={seed}")
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


@pytest.mark.parametrize("merge", ["true", "false"])
def test_an_interrupted_training_goes_on_to_the_same_bytes(
    llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch, merge: str
) -> None:
    options = (*LORA, f"recover.merge={merge}")
    file = "model.safetensors" if merge == "true" else "adapter/adapter_model.safetensors"
    straight = prune_here(llama, tmp_path / "straight", *options)
    original, done = Fit._epoch, []

    def epoch(fit: Fit, step: Callable[[], None]) -> None:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append("once")
        original(fit, step)

    monkeypatch.setattr(Fit, "_epoch", epoch)
    with pytest.raises(KeyboardInterrupt):
        prune_here(llama, tmp_path / "broken", *options)
    monkeypatch.setattr(Fit, "_epoch", original)
    report = prune_here(llama, tmp_path / "broken", *options)
    assert digest(tmp_path / "broken", file) == digest(tmp_path / "straight", file)
    assert report.recovery == straight.recovery


def test_a_training_that_gains_nothing_changes_nothing(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    prune_here(llama, tmp_path / "pruned", "metric=wanda", "calib.n_samples=16")
    report = prune_here(llama, tmp_path / "lora", *LORA, "recover.lr=1e4", "recover.merge=false")
    assert report.recovery is not None
    assert report.recovery["epochs"] == 0
    assert digest(tmp_path / "pruned") == digest(tmp_path / "lora")
    assert not (tmp_path / "lora" / "checkpoint" / "adapter").exists()


def test_a_missing_peft_is_one_line(
    llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(AceError, match=r"needs the package peft") as found:
        prune_here(llama, tmp_path / "out", *LORA)
    assert 'pip install "ace-prune[recovery]"' in found.value.hint


def test_too_little_memory_for_the_whole_model_is_one_line(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    with pytest.raises(AceError, match=r"recover=lora needs .* GB of memory.*recover=blocks"):
        prune_here(llama, tmp_path / "out", *LORA, "memory_gb=1")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["recover=lora", "recover.rank=0"], "at least 1"), (["recover=lora", "recover.alpha=0"], "above 0"),
        (["recover=lora", "recover.epochs=0"], "at least 1"), (["recover=lora", "recover.init=svd"], "merge=false"),
        (["recover=lora", "recover.init=svd", "recover.merge=false", *CUT], "that were cut"),
        (["recover=qlora_groups"], "zeros too"), (["recover=qlora_groups", "recover.bits=9"], "2 to 8"),
        (["recover=qlora_groups", "recover.group=0"], "at least 1"),
    ],
)  # fmt: skip
def test_bad_options_are_one_line(configure: Callable[..., object], overrides: list[str], said: str) -> None:
    with pytest.raises(AceError, match=said):
        configure("model.path=x", "model=custom", *overrides)


# --- groups of few bits ----------------------------------------------------------------------------------------------


def slow_groups(row: list[float], bits: int, width: int) -> list[float]:
    values = []
    for first in range(0, len(row), width):
        group = row[first : first + width]
        scale = (max(group) - min(group)) / (2**bits - 1) or 1.0
        zero = -min(group) / scale
        values += [scale * (min(max(round(w / scale + zero), 0), 2**bits - 1) - zero) for w in group]
    return values


@pytest.mark.parametrize("columns", [12, 10])
def test_groups_are_those_of_the_formula(columns: int) -> None:
    torch.manual_seed(0)
    weight_OI = torch.randn(5, columns)
    weight_OI[0, :4] = 0.25
    found = Groups.of(weight_OI, 4, 4)
    expected = torch.tensor([slow_groups(row, 4, 4) for row in weight_OI.tolist()])
    assert torch.allclose(found.values(), expected, atol=1e-5)
    assert int(found.codes_OI.max()) == 15
    assert torch.allclose(pooled(torch.ones(3, columns), 4).sum(-1), torch.full((3,), float(columns)))


@pytest.mark.parametrize("columns", [12, 10])
def test_the_merge_into_zero_points_is_exact(columns: int) -> None:
    torch.manual_seed(0)
    weight_OI, x_TI = torch.randn(5, columns), torch.randn(7, columns)
    layer = GroupedLayer(Groups.of(weight_OI, 4, 4), 2, 0.5, torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.up_OR.normal_()
        beside_TO = x_TI @ layer.groups.values().T + layer.added(x_TI)
    merged = layer.merged()
    assert torch.equal(merged.codes_OI, layer.groups.codes_OI)
    assert torch.equal(merged.scale_OG, layer.groups.scale_OG)
    assert not torch.equal(merged.zero_OG, layer.groups.zero_OG)
    assert torch.allclose(x_TI @ merged.values().T, beside_TO, atol=1e-4)
    # in exact arithmetic: a (q - z') - a (q - z) = s (B A), the same for all weights of the group
    moved_OI = (merged.values() - layer.groups.values()).double()
    product_OG = 0.5 * (layer.up_OR @ layer.down_RG).detach().double()
    assert torch.allclose(moved_OI, product_OG.repeat_interleave(4, 1)[:, :columns], atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_cut_model_is_on_its_grids_and_better_than_rounded_alone(
    tmp_path: Path, prune_here: Prune, family: str
) -> None:
    model = make(tmp_path / "m", family)
    options = ("recover=qlora_groups", "recover.group=16", "recover.bits=2", *CUT)
    report = prune_here(model, tmp_path / "out", *(each for each in MORE if each != "recover=lora"), *options)
    assert report.recovery is not None
    assert report.recovery["after"] < report.recovery["before"]
    name = report.slots[0]["name"]
    weight = weights(tmp_path / "out")[name]
    rows = weight.T if family == "gpt2" else weight
    for row in rows[:4].tolist():
        for first in range(0, len(row), 16):
            assert len({round(w, 5) for w in row[first : first + 16]}) <= 4
    assert "2 bits" in recovery_line(report)


def test_a_sparse_model_is_not_moved(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    prune_here(llama, tmp_path / "sparse", "metric=magnitude")
    options = ("recover=qlora_groups", "sparsity=0", "calib.n_samples=4")
    with pytest.raises(AceError, match="would not stay so"):
        prune_here(tmp_path / "sparse" / "checkpoint", tmp_path / "out", "metric=magnitude", *options)
