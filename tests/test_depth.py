"""Whole blocks that go: names, config.json, the refit, and runs that are interrupted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import flip_a_bit
from tiny_models import add_tokenizer, load, make, token_windows, weights
from torch import Tensor

from ace_cli.core.errors import AceError
from ace_cli.core.timing import Clock
from ace_cli.methods.metrics.angular import AngularDistance
from ace_cli.methods.repair.lstsq import LeastSquares
from ace_cli.methods.statistics import Gram
from ace_cli.model.files import Checkpoint, CheckpointWriter
from ace_cli.model.pruned import Violation, verify
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.dense_states import DenseInputs
from ace_cli.pruning.depth import DepthCutting, least_important
from ace_cli.pruning.engine import prune
from ace_cli.pruning.recipe import Propagate, Recipe
from ace_cli.pruning.units.block import Choose, Depth

CPU = torch.device("cpu")
WINDOWS = token_windows(4, 20)
#: Blocks that differ by kind or place, and which of them go: family -> options, and the blocks.
FAMILIES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "llama": ({"num_hidden_layers": 4}, [1, 2]),
    "gpt2": ({"num_hidden_layers": None, "n_layer": 4}, [0]),
    "gemma2": ({"num_hidden_layers": 4}, [1]),
    "gemma3_text": ({}, [1]),
    "mpt": ({"n_layers": 3}, [2]),
    "deepseek_v3": ({"num_hidden_layers": 4, "first_k_dense_replace": 2}, [0, 2]),
    "qwen3_moe": ({"num_hidden_layers": 4, "mlp_only_layers": [1, 3]}, [0, 1]),
    "gpt_oss": ({"num_hidden_layers": 4}, [1, 3]),
    "llama4_text": ({"num_hidden_layers": 4, "moe_layers": [1, 3], "no_rope_layers": [1, 1, 0, 1]}, [0]),
}


def cutting_of(folder: Path, goes: list[int] = []) -> DepthCutting:  # noqa: B006 (only read)
    model = StreamedModel(Checkpoint(folder), CPU, torch.float32)
    cutting = DepthCutting(model, Depth(), "block")
    cutting.keep([index for index in range(len(model.blocks)) if index not in goes])
    return cutting


def logits(folder: Path) -> Tensor:
    with torch.inference_mode():
        found: Tensor = load(folder)(token_windows(2, 20, seed=1), use_cache=False).logits
    return found


def without(folder: Path, goes: list[int]) -> Tensor:
    """Logits of the dense model whose blocks ``goes`` were skipped, streamed."""
    model, ids = StreamedModel(Checkpoint(folder), CPU, torch.float32), token_windows(2, 20, seed=1)
    batches = list(model.batches(ids))
    with torch.inference_mode():
        for index in model.one_by_one():
            if index not in goes:
                model.advance(index, batches)
    with model.head_loaded():
        return model.logits(ids, batches[0].hidden_BLH)


def run(prune_here: Any, folder: Path, out: Path, *options: str) -> Any:
    return prune_here(folder, out, "unit=block", "calib.seq_len=8", *options)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_others_move_up_and_the_folder_loads_anywhere(
    family: str, tmp_path: Path, prune_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, goes = FAMILIES[family]
    folder, out = add_tokenizer(make(tmp_path / "dense", family, **options)), tmp_path / "run"
    monkeypatch.setattr("ace_cli.pruning.depth.least_important", lambda *_: goes)
    blocks = len(StreamedModel(Checkpoint(folder), CPU, torch.float32).blocks)
    run(prune_here, folder, out, f"keep={blocks - len(goes)}", "repair=none")
    assert torch.equal(logits(out / "checkpoint"), without(folder, goes))
    assert verify(out / "checkpoint") == 1
    config = json.loads((out / "checkpoint" / "config.json").read_text())
    if "layer_types" in config:
        assert len(config["layer_types"]) == blocks - len(goes)


def test_what_a_configuration_cannot_say_is_refused_by_name(tmp_path: Path) -> None:
    """Every second block has experts: of those that are left, the first two have none."""
    options = {"num_hidden_layers": 4, "decoder_sparse_step": 2}
    folder = add_tokenizer(make(tmp_path / "dense", "qwen3_moe", **options))
    cutting = cutting_of(folder, [1])
    assert cutting.changes() is None
    assert "block 2 as number 1 would have another mlp" in cutting.why_not


def test_the_last_weight_before_a_gap_is_the_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    x_TI, d_TO = (torch.randn(60, width, generator=generator) for width in (10, 4))
    weight_OI = torch.randn(4, 10, generator=generator)
    gram = Gram()
    gram.update(x_TI, x_TI, weight_OI)
    repaired = LeastSquares(0.1).follow(weight_OI, (d_TO.T @ x_TI).double(), float(d_TO.square().sum()), gram)
    gram_II = (x_TI.T @ x_TI).double()
    change_OI = (d_TO.T @ x_TI).double() @ torch.linalg.inv(gram_II + 0.1 * torch.diag(gram_II.diagonal()))
    assert torch.allclose(repaired.weight_OI.double(), weight_OI + change_OI, atol=1e-5)
    assert repaired.loss_before == pytest.approx(float(d_TO.square().sum()))
    assert repaired.loss_after == pytest.approx(float((d_TO.double() - x_TI.double() @ change_OI.T).square().sum()))


def test_blocks_are_scored_by_the_angle_and_again_without_those_that_went(tmp_path: Path) -> None:
    folder = make(tmp_path / "dense", "llama", num_hidden_layers=4)
    model = StreamedModel(Checkpoint(folder), CPU, torch.float32)
    batches = list(model.batches(WINDOWS))

    def angles(goes: list[int]) -> dict[int, float]:
        states, found = list(model.batches(WINDOWS)), {}
        for index in (index for index in range(4) if index not in goes):
            with model.loaded(model.blocks[index]), torch.no_grad():
                before = states[0].hidden_BLH
                model.advance(index, states)
            cosine = torch.cosine_similarity(before.double(), states[0].hidden_BLH.double(), dim=-1)
            found[index] = float(cosine.arccos().mean()) / torch.pi
        return found

    first = angles([])
    ranked = sorted(first, key=first.__getitem__)
    metric = AngularDistance()
    assert least_important(model, batches, metric, 2, Choose.at_once) == sorted(ranked[:2])
    second = angles(ranked[:1])
    expected = sorted([ranked[0], min(second, key=second.__getitem__)])
    assert least_important(model, batches, metric, 2, Choose.one_by_one) == expected


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make(tmp_path_factory.mktemp("deep"), "llama", num_hidden_layers=4))


def test_the_block_before_the_gap_learns_what_went(deep: Path, tmp_path: Path, prune_here: Any) -> None:
    plain = run(prune_here, deep, tmp_path / "plain", "sparsity=25%", "repair=none")
    report = run(prune_here, deep, tmp_path / "refitted", "sparsity=25%", "calib.n_samples=64")
    assert plain.size == report.size
    assert report.size.parameters["pruned"] < report.size.parameters["dense"]
    (slot,) = [slot for slot in report.slots if slot["pattern"].startswith("refitted")]
    assert slot["diagnosis"]["loss_after"] < 0.9 * slot["diagnosis"]["loss_before"]
    changed = {
        name for name, value in weights(tmp_path / "refitted" / "checkpoint").items()
        if not torch.equal(value, weights(tmp_path / "plain" / "checkpoint")[name])
    }  # fmt: skip
    assert len(changed) == 1
    assert changed.pop().endswith("mlp.down_proj.weight")


def slow_refits(folder: Path, goes: list[int], share: float) -> dict[str, Tensor]:
    """Of every block that stays: its last weight, fitted to the states that it should put out."""
    model = StreamedModel(Checkpoint(folder), CPU, torch.float32)
    (dense,), (batch,) = model.batches(WINDOWS), model.batches(WINDOWS)
    states, found = [], {}
    with torch.no_grad():
        for index in model.one_by_one():
            model.advance(index, [dense])
            states.append(dense.hidden_BLH)
        for index in (index for index in range(len(model.blocks)) if index not in goes):
            name = f"model.layers.{index}.mlp.down_proj.weight"
            end = next((kept for kept in range(index + 1, len(model.blocks)) if kept not in goes), len(model.blocks))
            with model.loaded(model.blocks[index]):
                slot = next(slot for slot in model.blocks[index].slots if slot.name == name)
                weight_OI, seen = slot.weight_OI.double(), list[Tensor]()
                slot.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # noqa: B023
                out_BLH = model.forward(index, batch)
            goal = dataclasses.replace(batch, hidden_BLH=out_BLH)
            for gone in range(index + 1, end):
                with model.loaded(model.blocks[gone]):
                    model.advance(gone, [goal])
            if end > index + 1 or index > goes[0]:
                x_TI = seen[0].flatten(0, 1).double()
                d_TO = (goal.hidden_BLH.lerp(states[end - 1], share) - out_BLH).flatten(0, 1).double()
                pull = (2 * x_TI.shape[1] / len(x_TI)) ** 0.5 * torch.diag(x_TI.square().sum(0).sqrt())
                nothing = torch.zeros(len(pull), len(weight_OI), dtype=torch.float64)
                rows, goals = torch.cat([x_TI, pull]), torch.cat([d_TO, nothing])
                weight_OI = weight_OI + torch.linalg.lstsq(rows, goals, driver="gelsd").solution.T
            found[name] = weight_OI.float()
            with model.loaded(model.blocks[index]):
                slot.put(found[name])
                model.advance(index, [batch])
    return found


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_blocks_behind_a_gap_catch_up_with_the_dense_states(share: float, deep: Path, tmp_path: Path) -> None:
    cutting = cutting_of(deep, [1])
    model, writer = cutting.watched, CheckpointWriter(cutting.model.checkpoint, tmp_path, cutting.entries())
    batches = list(model.batches(WINDOWS))
    recipe = Recipe(AngularDistance(), {}, LeastSquares(), Propagate.sublayer, cutting=cutting, catch_up=share)
    beside = DenseInputs(model, batches) if share else None
    facts = list(prune(model, batches, recipe, writer, Clock(), beside=beside))
    writer.finish()
    behind = "refitted to the dense states" if share else "as it was"
    assert [block.slots[0].pattern for block in facts] == ["refitted to the states 1 further", "gone", behind, behind]
    expected, found, old = slow_refits(deep, [1], share), Checkpoint(tmp_path, bare=True), weights(deep)
    for new, index in enumerate((0, 2, 3)):
        weight_OI = expected[f"model.layers.{index}.mlp.down_proj.weight"]
        fitted_OI = found.read(f"model.layers.{new}.mlp.down_proj.weight")
        torch.testing.assert_close(fitted_OI, weight_OI, rtol=1e-3, atol=1e-4)
        moved = not torch.allclose(weight_OI, old[f"model.layers.{index}.mlp.down_proj.weight"], atol=1e-3)
        assert moved == bool(share or new == 0)


def test_where_all_blocks_stay_none_catches_up(deep: Path, tmp_path: Path, prune_here: Any) -> None:
    report = run(prune_here, deep, tmp_path / "run", "keep=4", "catch_up=0.5")
    assert {slot["pattern"] for slot in report.slots} == {"as it was"}


LEARNS = ("calib.n_samples=64", "recover.batch=32", "recover.epochs=3", "recover.lr=3e-4")
BRIEFLY = ("calib.n_samples=32", "recover.batch=32", "recover.epochs=1", "recover.lr=3e-4")


def goes(monkeypatch: pytest.MonkeyPatch, *blocks: int) -> None:
    monkeypatch.setattr("ace_cli.pruning.depth.least_important", lambda *_: list(blocks))


@pytest.mark.parametrize("repair", ["none", "lstsq"])
def test_the_block_before_the_gap_is_trained_and_others_stay(
    repair: str, deep: Path, tmp_path: Path, prune_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes(monkeypatch, 1, 2)
    report = run(prune_here, deep, tmp_path / "run", "keep=2", f"repair={repair}", "recover=blocks", *LEARNS)
    first, *others = (block["recovery"] for block in report.blocks)
    assert first["after"] < first["before"]
    assert others == [None, None, None]
    before, after = weights(deep), weights(tmp_path / "run" / "checkpoint")
    assert not torch.equal(
        after["model.layers.0.self_attn.q_proj.weight"], before["model.layers.0.self_attn.q_proj.weight"]
    )
    kept = [name for name in before if ".layers.3." in name]
    assert all(torch.equal(after[name.replace(".3.", ".1.")], before[name]) for name in kept)
    assert verify(tmp_path / "run" / "checkpoint") == 1


def test_all_that_stay_learn_the_states_of_the_dense_model(
    deep: Path, tmp_path: Path, prune_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gap at the front has no block before it: what comes behind it learns."""
    goes(monkeypatch, 0, 2)
    options = ("keep=2", "recover=blocks", "recover.target=model", *LEARNS)
    report = run(prune_here, deep, tmp_path / "run", *options)
    found = [block["recovery"] for block in report.blocks]
    assert [each is None for each in found] == [True, False, True, False]
    assert all(each["after"] < each["before"] for each in found if each)


def test_the_dense_model_teaches_one_of_fewer_blocks(deep: Path, tmp_path: Path, prune_here: Any) -> None:
    report = run(prune_here, deep, tmp_path / "run", "sparsity=25%", "recover=distill", *LEARNS[:3], "recover.lr=1e-4")
    assert report.recovery["after"] < report.recovery["before"]
    assert verify(tmp_path / "run" / "checkpoint") == 1


@pytest.mark.parametrize(
    ("where", "options"),
    [
        (".3.", ("sparsity=50%", "unit.choose=one_by_one")),
        (".2.", ("keep=2", "recover=blocks", *BRIEFLY)),
        (".3.", ("keep=2", "recover=both", "recover.block_epochs=1", "recover.epochs=1", "recover.batch=32")),
        (".2.", ("keep=2", "recover=blocks", "recover.target=model", *BRIEFLY)),
        (".3.", ("keep=2", "recover=blocks", "recover.target=model", *BRIEFLY)),
        (".2.", ("keep=2", "catch_up=0.5")),
        (".3.", ("keep=2", "catch_up=0.5")),
    ],
)
def test_killed_and_continued_gives_the_same_bytes(
    where: str, options: tuple[str, ...], deep: Path, tmp_path: Path, prune_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside a gap, and behind it."""
    if "keep=2" in options:
        goes(monkeypatch, 1, 2)
    run(prune_here, deep, tmp_path / "whole", *options)
    sync = CheckpointWriter.sync

    def failing(self: CheckpointWriter, names: Any) -> None:
        if any(where in name for name in names):
            raise KeyboardInterrupt
        sync(self, names)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CheckpointWriter, "sync", failing)
        run(prune_here, deep, tmp_path / "killed", *options)
    report = run(prune_here, deep, tmp_path / "killed", *options)
    assert any("continued" in warning for warning in report.warnings)
    for name in ("model.safetensors", "config.json"):
        whole, killed = ((tmp_path / each / "checkpoint" / name).read_bytes() for each in ("whole", "killed"))
        assert whole == killed or name == "config.json"
    manifests = [json.loads((tmp_path / each / "checkpoint/pruning.json").read_text()) for each in ("whole", "killed")]
    assert manifests[0]["cuts"] == manifests[1]["cuts"]
    flip_a_bit(tmp_path / "killed" / "checkpoint", "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(Violation, match=r"layers.1.mlp.up_proj.weight: not the bytes"):
        verify(tmp_path / "killed" / "checkpoint")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["keep=9"], "keep=9: the model has 4 blocks. Give 1 to 3"),
        (["sparsity=5%"], "sparsity=0.05 takes none of the 4 blocks away"),
        (["sparsity=2:4"], "sparsity=2:4 means nothing for unit=block"),
        (["metric=wanda"], "metric=wanda does not go with unit=block: it scores no whole blocks"),
        (["repair=obs"], "repair=obs does not go with unit=block"),
        (["catch_up=0.5", "repair=none"], "catch_up tells a refit of unit=block what to aim at"),
        (["propagate=dense"], "propagate=dense means nothing for unit=block"),
        (["unit=channel", "metric=angular"], "metric=angular does not go with unit=channel"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: list[str], words: str, deep: Path, tmp_path: Path, prune_here: Any
) -> None:
    with pytest.raises(AceError, match=words):
        run(prune_here, deep, tmp_path / "run", "sparsity=25%", *options)
