"""Weights that make up for what was lost before them: the formula, the two models side by side, whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from faults import stopped_before
from running import composed
from tiny_models import add_tokenizer, load, make, token_windows
from torch import Tensor

from ace_cli.core.errors import AceError
from ace_cli.core.timing import Clock
from ace_cli.methods.catch_up import caught_up, needs
from ace_cli.methods.metrics.wanda import Wanda
from ace_cli.methods.patterns import NofM, Scope, parse_sparsity
from ace_cli.methods.repair.none import NoRepair
from ace_cli.methods.statistics import Gram, Lag, Seen
from ace_cli.model import streamed
from ace_cli.model.files import Checkpoint, CheckpointWriter
from ace_cli.model.pruned import verify
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.dense_states import DenseInputs
from ace_cli.pruning.engine import prune
from ace_cli.pruning.recipe import Propagate, Recipe
from ace_cli.run.plan import Demand, make_plan

CPU = torch.device("cpu")
WINDOWS = token_windows(6, 16)
SHARE = 0.5
INSIDE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def target(weight_OI: Tensor, x_TI: Tensor, d_TI: Tensor, share: float) -> Tensor:
    """The least squares of sum_t ||W' x_t - W d_t||^2 + I / T * ||(W' - W) s||^2, float64, and ``share`` of the way."""
    w_OI, x_TI, d_TI = weight_OI.double(), x_TI.double(), d_TI.double()
    pull = (x_TI.shape[1] / len(x_TI)) ** 0.5 * torch.diag(
        torch.maximum(x_TI.square().sum(0), d_TI.square().sum(0)).sqrt()
    )
    rows, goals = (
        torch.cat([x_TI, pull]),
        torch.cat([(d_TI - x_TI) @ w_OI.T, torch.zeros(len(pull), len(w_OI)).double()]),
    )
    change_OI = torch.linalg.lstsq(rows, goals, driver="gelsd").solution.T  # of W' - W; none for a dead input
    return w_OI + share * change_OI


def looked_at(x_TI: Tensor, d_TI: Tensor, weight_OI: Tensor) -> Seen:
    seen = Seen(needs(SHARE))
    for part in (slice(0, 7), slice(7, None)):
        seen[Gram()].update(x_TI[part], x_TI[part], weight_OI)
        seen[Lag()].update(x_TI[part], d_TI[part], weight_OI)
    return seen


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("tokens", [5, 40])
def test_it_is_part_of_the_way_to_the_least_squares(share: float, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(tokens, 6, generator=generator) * torch.tensor([1.0, 30, 1, 0.01, 2, 1])
    x_TI[:, 4] = 0  # a dead input
    d_TI = x_TI + torch.randn(tokens, 6, generator=generator)
    weight_OI = torch.randn(3, 6, generator=generator)
    found_OI = caught_up(weight_OI, share, looked_at(x_TI, d_TI, weight_OI))
    torch.testing.assert_close(found_OI.double(), target(weight_OI, x_TI, d_TI, share), rtol=1e-4, atol=1e-5)
    assert not torch.equal(found_OI, weight_OI)


@pytest.mark.parametrize("left", [0.1, 0.01, 0.001])
def test_an_input_of_which_little_is_left_is_not_moved_without_bound(left: float) -> None:
    """Of three tokens in 200, all that the input says: what lies behind it needs 1 / left of the weight."""
    generator = torch.Generator().manual_seed(0)
    d_TI = torch.randn(200, 6, generator=generator)
    d_TI[3:, 0] = 0
    x_TI, weight_OI = d_TI.clone(), torch.randn(3, 6, generator=generator)
    x_TI[:, 0] *= left
    found_OI = caught_up(weight_OI, 1.0, looked_at(x_TI, d_TI, weight_OI))
    assert float(found_OI[:, 0].norm() / weight_OI[:, 0].norm()) < 5


def test_it_moves_nothing_where_nothing_was_lost() -> None:
    x_TI, weight_OI = torch.randn(40, 6), torch.randn(3, 6)
    assert caught_up(weight_OI, 1.0, looked_at(x_TI, x_TI.clone(), weight_OI)) is weight_OI


# --- two models side by side ------------------------------------------------------------------------------------------


def inputs_of(model: Any, names: list[str]) -> dict[str, Tensor]:
    """Of every window, all its tokens one after the other: name -> (T, I)."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: found[name].append(args[0].flatten(0, -2))
        )
        for name in names
    ]
    with torch.inference_mode():
        for window in WINDOWS:
            model(window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def slow_loop(folder: Path, propagate: Propagate) -> dict[str, Tensor]:
    """Wanda at 50 % of weights that were moved first, each in a model whose earlier weights are pruned."""
    dense, model = load(folder), load(folder)
    inside = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
              "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    pruned = {}
    for index in range(len(model.model.layers)):
        names = [f"model.layers.{index}.{name}" for name in inside]
        goals, block = inputs_of(dense, names), inputs_of(model, names)
        for name in names:
            linear = model.get_submodule(name)
            x_TI = block[name] if propagate is Propagate.block else inputs_of(model, [name])[name]
            moved_OI = target(linear.weight, x_TI, goals[name], SHARE)
            score_OI = moved_OI.abs() * x_TI.double().square().sum(0).sqrt()
            lowest = score_OI.argsort(dim=1, stable=True)[:, : score_OI.shape[1] // 2]
            pruned[f"{name}.weight"] = moved_OI.scatter(1, lowest, 0.0).float().detach()
            linear.weight.data = pruned[f"{name}.weight"]
    return pruned


@pytest.mark.parametrize("tokens", [32, 2048])
@pytest.mark.parametrize("propagate", [Propagate.sublayer, Propagate.block])
def test_it_equals_the_slow_loop(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, propagate: Propagate, tokens: int
) -> None:
    """In one batch, and in three."""
    monkeypatch.setattr(streamed, "BATCH_TOKENS", tokens)
    model = StreamedModel(Checkpoint(llama), CPU, torch.float32)
    patterns = {slot.name: parse_sparsity("0.5", Scope.row) for block in model.blocks for slot in block.slots}
    writer, batches = CheckpointWriter(model.checkpoint, tmp_path), list(model.batches(WINDOWS))
    recipe = Recipe(Wanda(), patterns, NoRepair(), propagate, catch_up=SHARE)
    facts = list(prune(model, batches, recipe, writer, Clock(), beside=DenseInputs(model, batches)))
    writer.finish()
    expected, found = slow_loop(llama, propagate), Checkpoint(tmp_path, bare=True)
    moved = {slot.name: slot.diagnosis["moved"] for block in facts for slot in block.slots}
    assert moved.keys() == expected.keys()
    assert [name.split(".")[4] for name, size in moved.items() if not size] == (
        ["q_proj", "k_proj", "v_proj"] if propagate is Propagate.sublayer else list(INSIDE)
    )
    for name, weight_OI in expected.items():
        differ = (found.read(name) - weight_OI).abs() > 2e-3 * weight_OI.abs().max()
        assert int(differ.sum()) <= 4, name


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", ("metric=sparsegpt", "repair=sparsegpt", "sparsity=2:4", "permute=ria")),
        ("gpt2", ("metric=ace", "repair=admm", "propagate=block")),
        ("phi3", ("metric=wanda", "recover=blocks", "recover.target=model")),
        ("opt", ("metric=wanda", "quantize=int4", "quantize.group=16")),
        ("gemma2", ("metric=magnitude", "repair=swaps")),
    ],
)  # fmt: skip
def test_it_goes_with_everything_that_looks_at_single_weights(
    family: str, options: tuple[str, ...], tmp_path: Path, prune_here: Any
) -> None:
    model = add_tokenizer(make(tmp_path / "model", family))
    report = prune_here(model, tmp_path / "run", "catch_up=0.5", *options)
    assert verify(tmp_path / "run" / "checkpoint") >= 2
    assert any(slot["diagnosis"]["moved"] > 0 for slot in report.slots)
    assert report.method["catch_up"] == 0.5


@pytest.mark.parametrize("tokens", [32, 2048])
def test_killed_and_continued_gives_the_same_bytes(
    tokens: int, tmp_path: Path, prune_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "BATCH_TOKENS", tokens)
    model = add_tokenizer(make(tmp_path / "model", "llama", num_hidden_layers=3))
    options = ("metric=wanda", "repair=sparsegpt", "catch_up=0.5", "calib.seq_len=8")
    prune_here(model, tmp_path / "whole", *options)
    with stopped_before(".2.mlp.up_proj"):
        prune_here(model, tmp_path / "killed", *options)
    prune_here(model, tmp_path / "killed", *options)
    prune_here(model, tmp_path / "without", *options, "catch_up=0")
    whole, killed, without = (
        (tmp_path / each / "checkpoint" / "model.safetensors").read_bytes() for each in ("whole", "killed", "without")
    )
    assert whole == killed
    assert whole != without


def test_a_run_stopped_behind_its_last_block_takes_no_text_through_the_dense_model(
    tmp_path: Path, prune_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add_tokenizer(make(tmp_path / "model", "llama"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ace_cli.run.prune_checkpoint.Rereading.zeros", interrupted)
        prune_here(model, tmp_path / "run", "metric=wanda", "catch_up=0.5")
    monkeypatch.setattr(StreamedModel, "forward", lambda *_: pytest.fail("a block runs"))
    prune_here(model, tmp_path / "run", "metric=wanda", "catch_up=0.5")
    assert verify(tmp_path / "run" / "checkpoint") == 14


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_the_plan_counts_the_dense_model(llama: Path) -> None:
    model = StreamedModel(Checkpoint(llama), CPU, torch.float32)
    patterns = {slot.name: NofM(2, 4) for block in model.blocks for slot in block.slots}
    alone, beside = (make_plan(model, patterns, Demand(64, 16, catch_up=each)) for each in (False, True))
    block = sum(model.checkpoint.tensors[key].nbytes for key in model.blocks[0].files)
    assert beside.fixed_bytes - alone.fixed_bytes >= block
    assert beside.token_bytes == 2 * alone.token_bytes
    assert beside.host_bytes - alone.host_bytes >= block + 64 * alone.token_bytes
    assert (alone.forwards, beside.forwards) == (1, 2)
    many = [Demand(10**6, 16, propagate=order, catch_up=True).forwards(2048) for order in Propagate]
    assert many == [5.0, 3.0, 2.0]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("catch_up=1.5", r"catch_up=1\.5: must be 0 up to 1"),
        ("catch_up=-0.1", r"catch_up=-0\.1: must be 0 up to 1"),
        ("propagate=dense", "propagate=dense looks at none of it"),
        ("unit=channel", "catch_up does not go with unit=channel"),
        ("unit=hidden", "catch_up does not go with unit=hidden"),
        ("unit=expert", r"catch_up does not go with unit=expert: [^;]*$"),
    ],
)
def test_what_cannot_be_is_one_line(override: str, said: str) -> None:
    with pytest.raises(AceError, match=said):
        composed("model=custom", "model.path=x", "catch_up=0.5", override)


def test_experts_are_refused_before_work_and_what_is_beside_them_is_not(tmp_path: Path, prune_here: Any) -> None:
    model = add_tokenizer(make(tmp_path / "model", "qwen2_moe"))
    with pytest.raises(AceError, match=r"experts see other tokens .* exclude=\"\*\.experts\.\*\""):
        prune_here(model, tmp_path / "run", "catch_up=0.5")
    report = prune_here(model, tmp_path / "run", "catch_up=0.5", "metric=wanda", "exclude=*.experts.*")
    moved = {slot["name"]: slot["diagnosis"]["moved"] for slot in report.slots}
    assert moved["model.layers.1.mlp.shared_expert.down_proj.weight"] > 0
