"""Units: what is cut out is gone from every tensor and from config.json, and nothing else changes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import flip_a_bit, stopped_before
from tiny_models import DENSE, load, make, token_windows, weights
from torch import Tensor

from ace_cli.core import registry
from ace_cli.core.errors import AceError
from ace_cli.core.timing import Clock
from ace_cli.methods.allocation.angular import Angular, Full
from ace_cli.methods.allocation.flap import Flap
from ace_cli.methods.metrics.base import Metric
from ace_cli.methods.metrics.cfsp import CFSP, Form
from ace_cli.methods.metrics.flap import FLAP
from ace_cli.methods.metrics.magnitude import Magnitude
from ace_cli.methods.metrics.wanda import Wanda
from ace_cli.methods.repair.base import Repair
from ace_cli.methods.repair.least_squares import factors_of
from ace_cli.methods.repair.lstsq import LeastSquares
from ace_cli.methods.repair.none import NoRepair
from ace_cli.methods.repair.obs import Obs
from ace_cli.methods.statistics import Gram, Mean, SecondMoment, Seen
from ace_cli.methods.units import Units, equal_width, kept_width, uneven_widths
from ace_cli.model.files import Checkpoint, CheckpointWriter
from ace_cli.model.pruned import Violation, verify, write_metadata
from ace_cli.model.streamed import StreamedModel
from ace_cli.model.uneven import FILE
from ace_cli.pruning.engine import prune
from ace_cli.pruning.facts import BlockFacts
from ace_cli.pruning.recipe import Propagate, Recipe
from ace_cli.pruning.unit_cutting import UnitCutting
from ace_cli.pruning.units.base import Unit
from ace_cli.pruning.units.channel import Channel
from ace_cli.pruning.units.head import Head, Heads
from ace_cli.report.card import loading
from ace_cli.report.collect import find
from ace_cli.report.html import render as page
from ace_cli.run.cut import smaller

CPU = torch.device("cpu")
WINDOWS = token_windows(4, 20)
#: Their classes write the width as 4 times the hidden size, with no key for it.
FIXED = {"bloom", "mpt"}
#: Their channels are so many that a product is made in parts, which a narrower one is not.
WIDE = {"falcon", "bloom", "gptj", "mpt"}
FEW = ["llama", "phi3", "opt", "gpt2", "qwen3", "gemma2"]


def cut_into(
    folder: Path, out: Path, stay: Callable[[int], int], metric: Metric | None = None, repair: Repair | None = None,
    unit: Unit | None = None,
) -> tuple[UnitCutting, dict[str, Tensor], list[BlockFacts]]:  # fmt: skip
    """Cut a model; ``stay``: index of a block -> how many units it keeps. What was cut, and which units were kept."""
    model = StreamedModel(Checkpoint(folder), CPU, torch.float32)
    cutting = UnitCutting(model, unit or Channel(), "unit")
    cutting.stay = {each.name: stay(index) for index, block in enumerate(cutting.couplings) for each in block}
    out.mkdir()
    writer = CheckpointWriter(model.checkpoint, out, cutting.cut().entries(model.checkpoint))
    recipe = Recipe(metric or CFSP(), {}, repair or NoRepair(), Propagate.sublayer, cutting=cutting)
    blocks = list(prune(cutting.watched, list(model.batches(WINDOWS)), recipe, writer, Clock()))
    writer.finish()
    manifest = cutting.manifest(blocks, writer.entries)
    write_metadata(model.checkpoint, out, {}, [], "card", cut=smaller(cutting, writer.entries, manifest))
    return cutting, cutting.kept_units(blocks), blocks


def logits(folder: Path, changed: dict[str, Tensor] | None = None) -> Tensor:
    """Of transformers' own model, with other values for some tensors of the files."""
    model = load(folder)
    if changed:
        state = model.state_dict()
        model.load_state_dict({name: changed.get(name, value) for name, value in state.items()})
    with torch.inference_mode():
        found: Tensor = model(token_windows(2, 20, seed=1), use_cache=False).logits
    return found


def streamed_logits(folder: Path) -> Tensor:
    model, ids = StreamedModel(Checkpoint(folder), CPU, torch.float32), token_windows(2, 20, seed=1)
    batches = list(model.batches(ids))
    model.run(batches)
    with model.head_loaded():
        return model.logits(ids, batches[0].hidden_BLH)


def zeroed(folder: Path, cutting: UnitCutting, kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that read units, with zeros for those that went, by their names in the files."""
    found = weights(folder)
    for each in (each for block in cutting.couplings for each in block):
        gone_I = each.columns_RWC.flatten(0, 1)[~kept[each.name]].flatten()
        found[each.name] = found[each.name].index_fill(each.axes[0].axis, gone_I, 0.0)
    return found


# --- families --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DENSE)
def test_channels_of_every_family_go_and_the_folder_loads_anywhere(family: str, tmp_path: Path) -> None:
    folder, out = make(tmp_path / "dense", family), tmp_path / "out"
    before = StreamedModel(Checkpoint(folder), CPU, torch.float32)
    cutting, kept, _ = cut_into(folder, out, lambda index: 64)
    assert [len(block) for block in cutting.couplings] == [1] * len(before.blocks)
    assert (out / FILE).exists() is (family in FIXED)
    ours = streamed_logits(out)
    if family not in FIXED:
        assert torch.equal(logits(out), ours)
    changed = zeroed(folder, cutting, kept)
    got, want = weights(out), weights(folder)
    same = {name for name in want if name not in cutting.cut().keys}
    assert all(torch.equal(got[name], want[name]) for name in same)
    assert same | cutting.cut().keys == set(want)
    assert sum(t.numel() for t in got.values()) < sum(t.numel() for t in want.values())
    (tmp_path / "zeroed").mkdir()
    writer = CheckpointWriter(before.checkpoint, tmp_path / "zeroed")
    for name in {each.name for block in cutting.couplings for each in block}:
        writer.write(name, changed[name])
    writer.finish()
    write_metadata(before.checkpoint, tmp_path / "zeroed", {}, [], "card")
    expected = logits(tmp_path / "zeroed")  # a sum with zeros in it is the same sum, if it is made in one go
    assert torch.equal(ours, expected) if family not in WIDE else torch.allclose(ours, expected, atol=1e-4)
    assert verify(out) == len(before.blocks)


@pytest.mark.parametrize("family", FEW)
def test_widths_of_their_own_load_with_the_modelling_file(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, out = make(tmp_path / "dense", family), tmp_path / "out"
    cut_into(folder, out, lambda index: 40 + 24 * index)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=True)
    with torch.inference_mode():
        theirs = model(token_windows(2, 20, seed=1), use_cache=False).logits
    assert torch.equal(theirs, streamed_logits(out))
    model.generate(token_windows(1, 4), max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("propagate", Propagate)
def test_what_later_blocks_see_is_what_is_written(propagate: Propagate, llama: Path, tmp_path: Path) -> None:
    """With a refit: the hidden states after the stream are those of the written model."""
    model = StreamedModel(Checkpoint(llama), CPU, torch.float32)
    cutting = UnitCutting(model, Channel(), "channel")
    cutting.stay = dict.fromkeys(cutting.stay, 64)
    writer = CheckpointWriter(model.checkpoint, tmp_path, cutting.cut().entries(model.checkpoint))
    batches = list(model.batches(WINDOWS))
    recipe = Recipe(CFSP(), {}, LeastSquares(), propagate, cutting=cutting)
    list(prune(cutting.watched, batches, recipe, writer, Clock()))
    writer.finish()
    write_metadata(model.checkpoint, tmp_path, {}, [], "card", cut=smaller(cutting, writer.entries, []))
    if propagate is not Propagate.dense:
        again = StreamedModel(Checkpoint(tmp_path), CPU, torch.float32)
        expected = list(again.batches(WINDOWS))
        for index, block in enumerate(again.blocks[:-1]):
            with again.loaded(block), torch.inference_mode():
                again.advance(index, expected)
        assert torch.equal(batches[0].hidden_BLH, expected[0].hidden_BLH)


# --- config.json -----------------------------------------------------------------------------------------------------


def test_the_key_is_found_where_another_holds_the_same_number(tmp_path: Path) -> None:
    """intermediate_size equals hidden_size, and the vocabulary has as many tokens."""
    folder = make(tmp_path / "dense", "llama", intermediate_size=64, vocab_size=64)
    cutting = UnitCutting(StreamedModel(Checkpoint(folder), CPU, torch.float32), Channel(), "channel")
    cutting.stay = dict.fromkeys(cutting.stay, 32)
    assert cutting.changes() == {("intermediate_size",): 32}


def test_a_key_that_holds_nothing_is_filled_in(tmp_path: Path) -> None:
    folder = make(tmp_path / "dense", "gpt2", n_inner=None)
    cutting = UnitCutting(StreamedModel(Checkpoint(folder), CPU, torch.float32), Channel(), "channel")
    cutting.stay = dict.fromkeys(cutting.stay, 64)
    assert cutting.changes() == {("n_inner",): 64}


# --- scores and refits, as their formulas say it slowly --------------------------------------------------------------


def a_weight(outputs: int = 6, inputs: int = 12, tokens: int = 40, seed: int = 0) -> tuple[Tensor, Tensor, Seen]:
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    x_TI = torch.randn(tokens, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator) + 0.5
    seen = Seen((SecondMoment(), Mean(), Gram()))
    for statistic in seen:
        statistic.update(x_TI[:15], x_TI[:15], weight_OI)
        statistic.update(x_TI[15:], x_TI[15:], weight_OI)
    return weight_OI, x_TI.double(), seen


def pairs(inputs: int = 12) -> Units:
    """Two regions, units of two inputs."""
    return Units(torch.arange(inputs).view(2, 2, -1).transpose(1, 2).contiguous())


def singles(inputs: int = 12, producers: list[Tensor] | None = None) -> Units:
    return Units(torch.arange(inputs).view(1, -1, 1), lambda: producers or [])


@pytest.mark.parametrize("units", [singles(), pairs()], ids=["channels", "pairs"])
def test_scores_of_units_are_their_formulas(units: Units) -> None:
    weight_OI, x_TI, seen = a_weight()
    columns = units.columns_RWC.flatten(0, 1).tolist()
    variance_I = x_TI.var(0, correction=0)
    wanda = [
        sum(float(weight_OI[o, i]) ** 2 * float((x_TI[:, i] ** 2).mean()) for i in c for o in range(6)) for c in columns
    ]
    flap = [sum(float(variance_I[i]) * float(weight_OI[o, i]) ** 2 for i in c for o in range(6)) for c in columns]
    norm = [sum(float((x_TI[:, i] ** 2).mean()) for i in c) ** 0.5 for c in columns]
    for metric, expected in ((Wanda(), wanda), (FLAP(), flap), (CFSP(), norm)):
        score_U = metric.score_units(weight_OI, seen, units)
        assert score_U.tolist() == pytest.approx(expected, rel=1e-4), type(metric)


@pytest.mark.parametrize("name", [name for name, cls in registry.choices("metric").items() if cls.units])
def test_every_metric_scores_units(name: str) -> None:
    metric = registry.choices("metric")[name]()
    weight_OI, x_TI, _ = a_weight()
    seen = Seen(metric.needs())
    for statistic in seen:
        statistic.update(x_TI.float(), x_TI.float() @ weight_OI.T, weight_OI)
    before_OI = weight_OI.clone()
    score_U = metric.score_units(weight_OI, seen, pairs())
    assert score_U.shape == (6,)
    assert bool((score_U.isfinite() & (score_U >= 0)).all())
    assert len(score_U.unique()) == 6
    assert torch.equal(weight_OI, before_OI)


def test_equation_8_compares_channels_for_each_hidden_dimension() -> None:
    weight_OI, x_TI, seen = a_weight()
    up_IH = torch.randn(12, 6, generator=torch.Generator().manual_seed(3))
    n = x_TI.square().mean(0).sqrt().tolist()
    expected = []
    for i in range(12):
        down = [
            abs(float(weight_OI[j, i])) * n[i] / sum(abs(float(weight_OI[j, k])) * n[k] for k in range(12))
            for j in range(6)
        ]
        up = [abs(float(up_IH[i, j])) / sum(abs(float(up_IH[k, j])) for k in range(12)) for j in range(6)]
        expected.append(sum(down) + 2 * sum(up))
    found = CFSP(Form.eq8).score_units(weight_OI, seen, singles(producers=[up_IH, up_IH]))
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_every_region_keeps_the_same_number_and_ties_go_in_order() -> None:
    keep_U = pairs().best(torch.tensor([5.0, 1, 1, 9, 9, 9]), 2)
    assert keep_U.tolist() == [True, False, True, False, True, True]
    assert pairs().inputs(keep_U, 12).nonzero().flatten().tolist() == [0, 2, 3, 5, 7, 8, 10, 11]


@pytest.mark.parametrize("shrinkage", [0.05, None])
@pytest.mark.parametrize("units", [singles(), pairs()], ids=["channels", "pairs"])
def test_least_squares_is_the_minimum(units: Units, shrinkage: float | None) -> None:
    weight_OI, x_TI, seen = a_weight()
    keep_U = torch.arange(units.count) % 3 != 0
    repaired = LeastSquares(shrinkage).repair_units(weight_OI, keep_U, seen, units)
    keep_I = units.inputs(keep_U, 12)
    pull = 2 * 12 / 40 if shrinkage is None else shrinkage
    gram_II = x_TI.T @ x_TI
    matrix_II = gram_II + pull * torch.diag(gram_II.diagonal())
    new_OI = torch.zeros(6, 12, dtype=torch.float64)
    inside_PP = matrix_II[keep_I][:, keep_I]
    new_OI[:, keep_I] = weight_OI.double() @ matrix_II[:, keep_I] @ torch.linalg.inv(inside_PP)
    assert torch.allclose(repaired.weight_OI.double(), new_OI, atol=1e-4)
    assert torch.equal(repaired.keep_OI, keep_I.expand(6, 12))
    assert repaired.loss_after is not None
    assert repaired.loss_before is not None
    assert repaired.loss_after < repaired.loss_before


@pytest.mark.parametrize("units", [singles(), pairs()], ids=["channels", "pairs"])
def test_surgery_takes_the_unit_that_costs_least_each_time(units: Units) -> None:
    weight_OI, _, seen = a_weight()
    keep_U = units.best(torch.arange(units.count, dtype=torch.float64), units.columns_RWC.shape[1] // 2)
    repaired = Obs(shrinkage=0.1, batch=1).repair_units(weight_OI, keep_U, seen, units)
    factors = factors_of(seen[Gram()])
    matrix_II, unit_OI = factors.damped(0.0).double() + 0.1 * torch.eye(12), weight_OI.double() * factors.scale_I
    columns, here = units.columns_RWC.flatten(0, 1).tolist(), set(range(units.count))
    width = units.columns_RWC.shape[1]

    def cost(gone: set[int]) -> float:
        """Of the best refit without these units."""
        keep = [i for u, c in enumerate(columns) if u not in gone for i in c]
        out = [i for u, c in enumerate(columns) if u in gone for i in c]
        across = matrix_II[out][:, keep] @ torch.linalg.inv(matrix_II[keep][:, keep]) @ matrix_II[keep][:, out]
        schur = matrix_II[out][:, out] - across
        return float((unit_OI[:, out] @ schur * unit_OI[:, out]).sum())

    gone: set[int] = set()
    while len(gone) < int((~keep_U).sum()):
        full = [u for u in here - gone if sum(u // width == g // width for g in gone) < width - width // 2]
        gone.add(min(full, key=lambda u: cost(gone | {u})))
    expected_I = units.inputs(torch.tensor([u not in gone for u in range(units.count)]), 12)
    assert torch.equal(repaired.keep_OI[0], expected_I)


# --- how many --------------------------------------------------------------------------------------------------------


def test_widths_are_rounded_and_refused_in_one_line() -> None:
    assert equal_width("channel", 1536, Fraction("0.2"), 64) == 1216
    assert equal_width("channel", 1536, Fraction("0.5"), 64) == 768
    assert equal_width("channel", 100, Fraction("0.5"), 1) == 50
    assert kept_width("channel", 1536, 1216, 64) == 1216
    for arguments, words in (
        ((96, Fraction("0.5"), 128), "unit.multiple=128 is more than the 96 channels"),
        ((96, Fraction("0.9"), 64), "sparsity=0.9 leaves none of the 96 channels"),
        ((128, Fraction("0.1"), 64), "sparsity=0.1 takes none of the 128 channels away"),
    ):
        with pytest.raises(AceError, match=words):
            equal_width("channel", *arguments)
    for keep, words in (
        (97, "a block has 96"),
        (0, "a block has 96"),
        (40, "no multiple of unit.multiple=64.* Use 64 or"),
    ):
        with pytest.raises(AceError, match=words):
            kept_width("channel", 96, keep, 64)


def test_uneven_widths_keep_the_total() -> None:
    found = uneven_widths([1536] * 4, [1216] * 4, [0.0, 0.1, 0.3, 0.43], 64)
    assert sum(found) == 4 * 1216
    assert all(width % 64 == 0 and 64 <= width <= 1536 for width in found)
    assert found == sorted(found, reverse=True)


def test_angular_shares_are_the_papers() -> None:
    measures, p = [0.30, 0.10, 0.12, 0.20], 0.5
    middle = sum(measures) / 4
    s = [1 / (1 + 2.718281828459045 ** (-13.1072 * (m - middle))) for m in measures]
    expected = [1 - (1 - p) * each / (sum(s) / 4) for each in s]
    assert Angular().sparsities(p, [1] * 4, measures) == pytest.approx(expected)
    drawn = Angular(full=Full.draw).sparsities(0.1, [1] * 4, measures)
    assert max(1 - each for each in drawn) == pytest.approx(0.9 + 0.1 / 1.05)
    assert sum(drawn) / 4 == pytest.approx(0.1)


def test_angular_blocks_that_would_keep_more_than_all_keep_all() -> None:
    measures, p = [0.30, 0.10, 0.12, 0.20], 0.2
    raw = Angular(full=Full.keep).sparsities(p, [1] * 4, measures)
    assert raw[0] < 0 < raw[3] and sum(raw) / 4 == pytest.approx(p)
    shares = Angular(full=Full.keep).shares(p, [1] * 4, measures, 0.99)
    assert shares[0] == shares[3] == 0 and sum(shares) / 4 == pytest.approx(p)
    assert shares[1] - shares[2] == pytest.approx(raw[1] - raw[2])


def test_angular_measures_the_angle() -> None:
    before = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [3.0, 3.0]]])
    after = torch.tensor([[[0.0, 2.0], [-1.0, 0.0], [1.0, 1.0]]])
    assert Angular().measure_states([before], [after]) == pytest.approx((0.5 + 1 + 0) / 3, abs=1e-6)


def test_flap_ranks_all_blocks_together() -> None:
    rule = Flap()
    measures = [rule.measure_units(torch.tensor(scores)) for scores in ([0.0, 1, 2, 3], [0.0, 0, 0, 9])]
    shares = rule.shares(0.5, [4, 4], measures, 0.99)
    assert sum(shares) == pytest.approx(1.0)
    assert shares[0] == pytest.approx(0.25)  # -1.16; then three times -0.5, and -0.39


# --- whole runs ------------------------------------------------------------------------------------------------------


RUN = ("unit=channel", "unit.multiple=8", "sparsity=40%", "calib.seq_len=8")
UNEVEN = (*RUN, "unit.uneven=true", "allocation=angular")


def digest(folder: Path) -> dict[str, bytes]:
    return {
        file.name: file.read_bytes() for file in sorted((folder / "checkpoint").iterdir()) if file.name != "README.md"
    }


@pytest.mark.parametrize("options", [RUN, UNEVEN, (*RUN, "unit.uneven=true", "allocation=flap", "metric=flap")])
def test_a_run_tells_what_got_smaller(options: tuple[str, ...], llama: Path, tmp_path: Path, prune_here: Any) -> None:
    report = prune_here(llama, tmp_path / "run", *options)
    folder = tmp_path / "run" / "checkpoint"
    before, after = (sum(t.numel() for t in weights(each).values()) for each in (llama, folder))
    assert report.own_code == (folder / FILE).is_file()
    assert report.own_code or options is not UNEVEN
    assert report.size is not None
    assert report.size.parameters == {"dense": before, "pruned": after}
    assert report.sparsity.achieved == pytest.approx(1 - after / before)
    assert sum(report.size.stay.values()) == 2 * 56  # 57.6 of 96, in eights
    manifest = json.loads((folder / "pruning.json").read_text())
    assert [len(cut["kept"]) for cut in manifest["cuts"]] == list(report.size.stay.values())
    assert "parameters fewer" in (tmp_path / "run" / "report.md").read_text()
    shown, words = page(dataclasses.asdict(report)), "trust_remote_code=True"
    assert (words in shown) == (words in loading("x", report.own_code)) == report.own_code
    assert "of the parameters are gone (channels, 0.4)" in shown
    assert "Zeros are stored" not in shown
    (row,) = find([tmp_path / "run"])
    assert (row.choices["unit"], row.numbers["fewer"], row.numbers["zeros"]) == (
        "channel", pytest.approx(report.sparsity.achieved), None,
    )  # fmt: skip
    assert verify(folder) == 2


TRAINED = (*RUN, "calib.seq_len=16", "calib.n_samples=16", "recover=blocks", "recover.epochs=2")


def test_blocks_learn_again_what_units_did(llama: Path, tmp_path: Path, prune_here: Any) -> None:
    plain = prune_here(llama, tmp_path / "plain", *TRAINED[:-2])
    report = prune_here(llama, tmp_path / "trained", *TRAINED)
    before, after = ([block["output"]["error"] for block in each.blocks] for each in (plain, report))
    assert after[0] < before[0]
    assert report.size == plain.size
    folder = tmp_path / "trained" / "checkpoint"
    assert verify(folder) == 2
    assert torch.equal(logits(folder), streamed_logits(folder))


HEADS = ("unit=head", "sparsity=50%")
TAUGHT = (
    "calib.n_samples=48",
    "calib.seq_len=16",
    "recover=distill",
    "recover.batch=64",
    "recover.lr=3e-4",
    "recover.epochs=3",
    "repair=none",
)


@pytest.mark.parametrize("options", [RUN, UNEVEN, HEADS], ids=["even", "uneven", "heads"])
def test_the_dense_model_teaches_a_smaller_one(
    options: tuple[str, ...], llama: Path, tmp_path: Path, prune_here: Any
) -> None:
    plain = prune_here(llama, tmp_path / "plain", *options, *TAUGHT[:2])
    report = prune_here(llama, tmp_path / "taught", *options, *TAUGHT)
    assert report.recovery is not None
    assert report.recovery["after"] < report.recovery["before"]
    assert report.size == plain.size
    checked = [verify(tmp_path / name / "checkpoint") for name in ("taught", "plain")]  # by the hashes of each
    assert checked[0] == checked[1]


def test_a_stopped_teaching_of_a_smaller_one_goes_on(
    llama: Path, tmp_path: Path, prune_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = prune_here(llama, tmp_path / "whole", *RUN, *TAUGHT)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for moment in ("ace_cli.run.recover_checkpoint._move", "ace_cli.run.prune_checkpoint.forget_training"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(moment, stop)
            prune_here(llama, tmp_path / moment, *RUN, *TAUGHT)
        report = prune_here(llama, tmp_path / moment, *RUN, *TAUGHT)
        assert digest(tmp_path / moment) == digest(tmp_path / "whole")
        assert report.recovery == straight.recovery
        assert verify(tmp_path / moment / "checkpoint") == 2


@pytest.mark.parametrize("options", [RUN, UNEVEN, TRAINED, HEADS], ids=["even", "uneven", "trained", "heads"])
def test_killed_and_continued_gives_the_same_bytes(
    options: tuple[str, ...], llama: Path, tmp_path: Path, prune_here: Any
) -> None:
    prune_here(llama, tmp_path / "whole", *options)
    with stopped_before(".1.self_attn.o_proj" if options[0] == "unit=head" else ".1.mlp.up_proj"):
        prune_here(llama, tmp_path / "killed", *options)
    report = prune_here(llama, tmp_path / "killed", *options)
    assert any("continued" in warning for warning in report.warnings)
    whole, killed = (digest(tmp_path / each)["model.safetensors"] for each in ("whole", "killed"))
    assert whole == killed  # the blocks before and those after: so each of two runs makes the same ones


@pytest.mark.parametrize("options", [UNEVEN, HEADS], ids=["uneven", "heads"])
def test_a_run_stopped_behind_its_last_block_still_tells_what_got_smaller(
    options: tuple[str, ...], llama: Path, tmp_path: Path, prune_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Widths that an allocation found are then in no plan, but in what was written."""
    whole = prune_here(llama, tmp_path / "whole", *options)
    with monkeypatch.context() as patched:
        patched.setattr("ace_cli.run.pipeline.make_report", killed)
        with pytest.raises(KeyboardInterrupt):
            prune_here(llama, tmp_path / "killed", *options)
    report = prune_here(llama, tmp_path / "killed", *options)
    assert any("continued" in warning for warning in report.warnings)
    assert (report.size, report.sparsity) == (whole.size, whole.sparsity)


def killed(*_: Any) -> None:
    raise KeyboardInterrupt


def test_damage_is_found(llama: Path, tmp_path: Path, prune_here: Any) -> None:
    prune_here(llama, tmp_path / "run", *RUN)
    flip_a_bit(tmp_path / "run" / "checkpoint", "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(Violation, match=r"layers.1.mlp.up_proj.weight: not the bytes"):
        verify(tmp_path / "run" / "checkpoint")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["sparsity=2:4"], "sparsity=2:4 means nothing for unit=channel"),
        (["sparsity=0"], "sparsity=0 takes no channels away"),
        (["allocation=angular"], "add unit.uneven=true"),
        (["repair=swaps"], "repair=swaps does not go with unit=channel"),
        (["repair=sparsegpt", "repair.adaptive=true"], "repair=sparsegpt does not go with unit=channel"),
        (["unit.multiple=0"], "unit.multiple=0: must be 1 or more"),
        (["exclude='*.down_proj.*'"], "exclude means nothing for unit=channel"),
        (["unit=weight", "metric=flap"], "metric=flap does not go with unit=weight"),
        (["unit=weight", "metric=wanda", "repair=none", "keep=64"], "keep means nothing for unit=weight"),
        (["unit=weight", "metric=wanda", "repair=none", "allocation=flap"], "allocation=flap is for units"),
    ],
)
def test_choices_that_make_no_sense_are_refused(configure: Any, options: list[str], words: str) -> None:
    with pytest.raises(AceError, match=words.replace("*", r"\*")):
        configure("unit=channel", *options)


def test_units_bring_a_metric_and_a_repair_that_can_be_overruled(configure: Any) -> None:
    assert isinstance(configure("unit=channel").metric, CFSP)
    assert isinstance(configure("unit=channel").repair, LeastSquares)
    assert isinstance(configure("unit=channel", "metric=magnitude").metric, Magnitude)


def test_a_model_without_the_key_says_what_to_do(tmp_path: Path, prune_here: Any) -> None:
    folder = make(tmp_path / "dense", "bloom")
    with pytest.raises(AceError, match=r"has no key in its configuration .* Add unit.uneven=true"):
        prune_here(folder, tmp_path / "run", *RUN)


# --- heads -----------------------------------------------------------------------------------------------------------


#: What their classes can say: queries alone are cut where several share a key-value head.
HEADS = [("llama", "group"), ("llama", "query"), ("qwen2", "group"), ("qwen3", "query"), ("phi3", "group"),
         ("phi3", "query"), ("mistral", "group"), ("gemma", "query"), ("starcoder2", "group"),
         ("gemma3_text", "query"), ("glm", "group"), ("mixtral", "query"), ("glm4_moe", "group")]  # fmt: skip


@pytest.mark.parametrize(("family", "of"), HEADS)
def test_heads_go_and_the_folder_loads_anywhere(family: str, of: str, tmp_path: Path) -> None:
    folder, out = make(tmp_path / "dense", family), tmp_path / "out"
    cutting, kept, _ = cut_into(folder, out, lambda index: 1, Wanda(), unit=Head(Heads(of)))
    assert not (out / FILE).exists()
    ours = streamed_logits(out)
    assert torch.equal(logits(out), ours)
    changed = zeroed(folder, cutting, kept)
    (tmp_path / "zeroed").mkdir()
    checkpoint = Checkpoint(folder)
    writer = CheckpointWriter(checkpoint, tmp_path / "zeroed")
    for name in {each.name for block in cutting.couplings for each in block}:
        writer.write(name, changed[name])
    writer.finish()
    write_metadata(checkpoint, tmp_path / "zeroed", {}, [], "card")
    assert torch.allclose(ours, logits(tmp_path / "zeroed"), atol=1e-4)
    assert verify(out) == len(cutting.couplings)


def test_where_nothing_is_shared_a_head_goes_with_its_keys_and_values(tmp_path: Path) -> None:
    folder, out = make(tmp_path / "dense", "llama", num_key_value_heads=4), tmp_path / "out"
    cut_into(folder, out, lambda index: 2, Wanda(), unit=Head())
    config = json.loads((out / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 2, 16)
    assert torch.equal(logits(out), streamed_logits(out))


@pytest.mark.parametrize("family", ["bloom", "olmo2"])
def test_heads_that_are_not_alike_stay(family: str, tmp_path: Path) -> None:
    """Their biases of positions, or norms over all heads together, tell heads apart."""
    folder = make(tmp_path / "dense", family)
    with pytest.raises(AceError, match="no heads were found"):
        UnitCutting(StreamedModel(Checkpoint(folder), CPU, torch.float32), Head(), "head")
