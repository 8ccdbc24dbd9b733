"""Allocations against slow float64 references written from the papers' formulas, and the exactness of their mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import edit, load, make, token_windows
from torch import Tensor

from ace_cli.core.errors import AceError
from ace_cli.core.registry import choices
from ace_cli.core.timing import Clock
from ace_cli.methods.allocation.alpha import Alpha, tail_exponent
from ace_cli.methods.allocation.atp import Atp
from ace_cli.methods.allocation.base import MOST, Allocation, apportioned, bounded
from ace_cli.methods.allocation.dlp import Dlp
from ace_cli.methods.allocation.owl import Owl
from ace_cli.methods.allocation.uniform import Uniform
from ace_cli.methods.metrics.wanda import Wanda
from ace_cli.methods.patterns import NofM, Pattern, Ratio, Scope, parse_sparsity
from ace_cli.methods.repair.none import NoRepair
from ace_cli.methods.statistics import SecondMoment, Seen
from ace_cli.model.files import Checkpoint, CheckpointWriter
from ace_cli.model.pruned import Pruned, count_zeros
from ace_cli.model.slots import View
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.engine import prune
from ace_cli.pruning.recipe import Propagate, Recipe
from ace_cli.pruning.survey import survey

Shapes = Sequence[Mapping[str, tuple[int, int]]]
RULES = [Owl(), Alpha(), Dlp(), Atp()]
PARAMETERS = {"row": Scope.row, "layer": Scope.layer}


def blocks_of(count: int, **slots: tuple[int, int]) -> list[dict[str, tuple[int, int]]]:
    return [{f"{index}.{name}": shape for name, shape in slots.items()} for index in range(count)]


LLAMA = blocks_of(12, q=(576, 576), k=(192, 576), v=(192, 576), o=(576, 576), up=(1536, 576), down=(576, 1536))
UNEVEN = [*blocks_of(3, a=(64, 96), b=(10, 37)), *[{f"x{i}.a": (33, 50 + i)} for i in range(4)], {}]


def random_measures(count: int, seed: int = 0) -> list[float]:
    return [float(value) for value in np.random.default_rng(seed).normal(3, 1, count)]


def shares(patterns: Mapping[str, Pattern], blocks: Shapes) -> list[float]:
    """The sparsity of each block that has slots."""
    return [
        sum(patterns[name].pruned(*shape) for name, shape in block.items()) / sum(r * c for r, c in block.values())
        for block in blocks
        if block
    ]


def pruned(patterns: Mapping[str, Pattern], blocks: Shapes) -> int:
    return sum(patterns[name].pruned(*shape) for block in blocks for name, shape in block.items())


def everywhere(pattern: Pattern, blocks: Shapes) -> int:
    return sum(pattern.pruned(*shape) for block in blocks for shape in block.values())


def saw(x_TI: Tensor) -> Seen:
    seen = Seen([SecondMoment()])
    seen[SecondMoment()].update(x_TI, x_TI, x_TI)
    return seen


@pytest.fixture
def slots() -> tuple[list[Tensor], list[Tensor]]:
    """Weights and inputs of three slots of a block, with a few large columns."""
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(rows, columns, generator=generator) for rows, columns in [(7, 11), (5, 11), (9, 6)]]
    inputs = [torch.randn(20, weight.shape[1], generator=generator) for weight in weights]
    inputs[0][:, 2] *= 30
    inputs[2][:, 5] *= 9
    return weights, inputs


# --- measures against their formulas ---------------------------------------------------------------------------------


def scores_of(weights: list[Tensor], inputs: list[Tensor]) -> list[float]:
    """Every |W_ij| sqrt(mean_t x_tj^2) of the block, in float64 and with loops."""
    scores = []
    for w, x in zip(weights, inputs, strict=True):
        rows = x.double().tolist()
        norms = [math.sqrt(sum(row[j] ** 2 for row in rows) / len(rows)) for j in range(len(rows[0]))]
        scores += [abs(value) * norms[j] for line in w.double().tolist() for j, value in enumerate(line)]
    return scores


@pytest.mark.parametrize("mo", [1.0, 3.0, 5.0])
def test_owl_measures_the_percentage_of_outliers(slots: tuple[list[Tensor], list[Tensor]], mo: float) -> None:
    scores = scores_of(*slots)
    mean = sum(scores) / len(scores)
    expected = 100 * sum(score > mo * mean for score in scores) / len(scores)
    assert expected > 0
    assert Owl(mo=mo).measure(slots[0], [saw(x) for x in slots[1]]) == pytest.approx(expected)


def test_dlp_measures_the_median(slots: tuple[list[Tensor], list[Tensor]]) -> None:
    scores = sorted(scores_of(*slots))
    expected = scores[(len(scores) - 1) // 2]
    assert Dlp().measure(slots[0], [saw(x) for x in slots[1]]) == pytest.approx(expected, rel=1e-6)


def slow_exponent(weight: Tensor) -> float:
    """The fit of ``tail_exponent``, with loops over numpy's singular values."""
    lam = sorted(float(s) ** 2 for s in np.linalg.svd(weight.double().numpy(), compute_uv=False))
    logs = [math.log10(value) for value in lam]
    counts, edges = np.histogram(logs, bins=100)
    x = 10 ** edges[int(counts.argmax())]
    fits = []
    for i in range(len(lam) - 1):
        if not 0.95 * x <= lam[i] <= 1.5 * x:
            continue
        tail, n = lam[i:], len(lam) - i
        alpha = 1 + n / (sum(math.log(value) for value in tail) - n * math.log(lam[i]))
        distance = max(abs(1 - (value / lam[i]) ** (1 - alpha) - r / n) for r, value in enumerate(tail))
        fits.append((distance, alpha))
    return min(fits)[1]


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (64, 64), (12, 40)])
@pytest.mark.parametrize("seed", range(3))
def test_the_tail_exponent_equals_the_slow_fit(shape: tuple[int, int], seed: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    assert tail_exponent(weight) == pytest.approx(slow_exponent(weight), rel=1e-6)
    heavy = weight * torch.arange(1, shape[1] + 1) ** -1.0
    assert tail_exponent(heavy) == pytest.approx(slow_exponent(heavy), rel=1e-6)


def test_the_tail_exponent_finds_the_power_law_it_was_given() -> None:
    """Eigenvalues at the quantiles of a Pareto law of density exponent 3; light tails have larger exponents."""
    quantiles = 1 - (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    assert tail_exponent(torch.diag(quantiles ** (-1 / 2)).sqrt()) == pytest.approx(3, rel=0.02)
    heavier, lighter = (tail_exponent(torch.diag(quantiles ** (-1 / (a - 1))).sqrt()) for a in (2.0, 4.0))
    assert heavier is not None and lighter is not None
    assert heavier < 3 < lighter


def test_rank_deficient_and_dead_weights_are_measured_by_what_is_left() -> None:
    left = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    weight = left @ torch.randn(8, 50, generator=torch.Generator().manual_seed(1))
    alpha = tail_exponent(weight)
    assert alpha is not None and 1 < alpha < 50
    assert tail_exponent(torch.zeros(4, 6)) is None
    assert tail_exponent(torch.ones(1, 6)) is None
    assert Alpha().measure([weight, torch.zeros(4, 6)], []) == alpha
    assert math.isnan(Alpha().measure([torch.zeros(4, 6)], []))


def test_the_exponent_has_no_scale() -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    assert tail_exponent(weight * 1e-4) == pytest.approx(tail_exponent(weight), rel=1e-5)


# --- sparsities against their formulas -------------------------------------------------------------------------------


def test_the_rules_are_their_formulas() -> None:
    sizes, p = [100, 100, 300, 50], 0.7
    measures = [2.0, 1.0, 4.0, 1.5]
    unit = [(value - 1) / 3 for value in measures]

    def mean(values: Sequence[float]) -> float:
        return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)

    owl = [1 - (d * 2 * 0.08 - mean([2 * 0.08 * d for d in unit]) + 1 - p) for d in unit]
    assert Owl(lam=0.08).sparsities(p, sizes, measures) == pytest.approx(owl)
    relative = [1 - value / sum(measures) for value in measures]
    r = [(value - min(relative)) / (max(relative) - min(relative)) for value in relative]
    dlp = [1 - (value * 2 * 0.15 - mean([2 * 0.15 * v for v in r]) + 1 - p) for value in r]
    assert Dlp(alpha=0.15).sparsities(p, sizes, measures) == pytest.approx(dlp)
    mapped = [a * (1.3 - 0.7) + 0.7 for a in unit]
    scaler = sum(sizes) * p / sum(size * value for size, value in zip(sizes, mapped, strict=True))
    assert Alpha(eps=0.3).sparsities(p, sizes, measures) == pytest.approx([scaler * value for value in mapped])
    beta, first = 0.3 / 3, 0.7 - 0.3 / 2
    assert Atp(rise=0.3).sparsities(p, [7] * 4, []) == pytest.approx([first + i * beta for i in range(4)])


@pytest.mark.parametrize(
    ("rule", "sign"), [(Owl(), -1), (Dlp(), 1), (Alpha(), 1)], ids=lambda value: type(value).__name__
)
def test_the_direction_is_monotone(rule: Allocation, sign: int) -> None:
    """More outliers: less sparsity. A larger median, or a lighter tail: more."""
    measures = random_measures(12)
    found = shares(rule.patterns(Ratio(Fraction(7, 10)), LLAMA, measures), LLAMA)
    for i in range(12):
        for j in range(12):
            if measures[i] < measures[j]:
                assert sign * (found[j] - found[i]) >= -1e-3  # rounding of rows
    assert max(found) - min(found) > 0.1


def test_atp_prunes_later_blocks_more() -> None:
    found = shares(Atp(0.3).patterns(Ratio(Fraction(6, 10)), LLAMA, [0.0] * 12), LLAMA)
    steps = np.diff(found)
    assert steps == pytest.approx([0.3 / 11] * 11, abs=2e-3)


# --- the mean --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [*RULES, Uniform()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("scope", Scope)
@pytest.mark.parametrize("sparsity", ["0.29", "0.5", "0.6", "0.7", "0.97", "2/3"])
@pytest.mark.parametrize("blocks", [LLAMA, UNEVEN], ids=["llama", "uneven"])
def test_as_many_weights_are_pruned_as_uniformly(rule: Allocation, scope: Scope, sparsity: str, blocks: Shapes) -> None:
    pattern = Ratio(Fraction(sparsity), scope)
    patterns = rule.patterns(pattern, blocks, random_measures(len(blocks)))
    missing = everywhere(pattern, blocks) - pruned(patterns, blocks)
    room = [
        rows if scope is Scope.row else 1
        for block in blocks
        for name, (rows, columns) in block.items()
        if patterns[name].pruned(rows, columns) + rows <= rows * columns * MOST
    ]
    assert 0 <= missing < min(room)
    assert list(patterns) == [name for block in blocks for name in block]
    for block in blocks:
        for name, (rows, columns) in block.items():
            assert patterns[name].pruned(rows, columns) <= rows * columns * MOST
            assert isinstance(patterns[name], Ratio) and patterns[name].scope is scope  # type: ignore[attr-defined]


@pytest.mark.parametrize("sparsity", ["0.05", "0.5", "0.7", "0.95"])
def test_slots_of_a_block_lose_the_same_share(sparsity: str) -> None:
    pattern = Ratio(Fraction(sparsity))
    rule = Owl()
    measures = random_measures(12)
    patterns = rule.patterns(pattern, LLAMA, measures)
    ruled = bounded(rule.sparsities(float(pattern.p), [1] * 12, measures), [1] * 12, float(pattern.p), 0.0, MOST)
    for block, share in zip(LLAMA, ruled, strict=True):
        for name, (_, columns) in block.items():
            assert float(patterns[name].p) == pytest.approx(share, abs=2 / columns)  # type: ignore[attr-defined]


@pytest.mark.parametrize("rule", [Owl(), Dlp(), Alpha()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("sparsity", ["0.6", "4:8"])
def test_blocks_that_do_not_differ_are_pruned_alike(rule: Allocation, sparsity: str) -> None:
    pattern = parse_sparsity(sparsity, Scope.row)
    patterns = rule.patterns(pattern, LLAMA, [1.25] * 12)
    uniform = Uniform().patterns(pattern, LLAMA, [])
    counts = {name: shape for block in LLAMA for name, shape in block.items()}
    assert all(patterns[name].pruned(*shape) == uniform[name].pruned(*shape) for name, shape in counts.items())


def test_the_same_measures_give_the_same_patterns() -> None:
    for rule in RULES:
        twice = [rule.patterns(Ratio(Fraction(13, 20)), UNEVEN, random_measures(8)) for _ in range(2)]
        assert twice[0] == twice[1]


def test_bounds_clip_and_keep_the_mean() -> None:
    sizes = [1, 2, 3, 4]
    wishes = [0.5, 0.95, 1.2, 1.05]
    p = sum(w * s for w, s in zip(wishes, sizes, strict=True)) / 10
    wishes = [w - p + 0.9 for w in wishes]
    clipped = bounded(wishes, sizes, 0.9, 0.0, 0.99)
    assert max(clipped) == 0.99
    assert sum(c * s for c, s in zip(clipped, sizes, strict=True)) / 10 == pytest.approx(0.9, abs=1e-12)
    assert clipped[1] - clipped[0] == pytest.approx(min(wishes[1] - wishes[0], 0.99 - clipped[0]))
    assert bounded([0.4, 0.6], [1, 1], 0.5, 0.0, 0.99) == [0.4, 0.6]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("short", [0, 1, 5])
def test_apportioning_leaves_less_than_a_unit_and_misses_no_wish_by_much(seed: int, short: int) -> None:
    random = np.random.default_rng(seed)
    units = [int(unit) for unit in random.integers(1, 50, 9)]
    wishes = [float(wish) for wish in random.uniform(0, 40, 9)]
    total = int(sum(unit * wish for unit, wish in zip(units, wishes, strict=True))) - short * sum(units) // 5
    counts = apportioned(wishes, units, total, 0, [1000] * 9)
    left = total - sum(unit * count for unit, count in zip(units, counts, strict=True))
    assert 0 <= left < min(units)
    # pieces that fit nowhere else go to small units
    assert all(
        abs(count - wish) < 2 + max(units) / unit for count, wish, unit in zip(counts, wishes, units, strict=True)
    )


def test_of_equal_units_the_largest_remainders_get_one_more() -> None:
    assert apportioned([1.9, 2.2, 0.4, 3.5], [7] * 4, 7 * 8, 0, [9] * 4) == [2, 2, 0, 4]
    assert apportioned([1.9, 2.2, 0.4, 3.5], [7] * 4, 7 * 5, 0, [9] * 4) == [1, 1, 0, 3]
    assert apportioned([1.9, 2.2, 0.4, 3.5], [7] * 4, 7 * 8, 1, [9] * 4) == [2, 2, 1, 3]


# --- mixed N:M -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "sparsity"),
    [(Owl(), "4:8"), (Owl(lam=0.2), "2:4"), (Dlp(), "2:4"), (Alpha(), "2:4"), (Atp(0.3), "2:4"), (Atp(), "4:8"),
     (Atp(0.5), "5:8"), (Dlp(0.3), "3:8"), (Atp(0.9), "2:4")],
    ids=lambda value: str(value),
)  # fmt: skip
def test_mixed_groups_have_exactly_the_mean(rule: Allocation, sparsity: str) -> None:
    pattern = parse_sparsity(sparsity, Scope.row)
    assert isinstance(pattern, NofM) and rule.refusal(pattern) is None
    measures = random_measures(12)
    patterns = rule.patterns(pattern, LLAMA, measures)
    assert pruned(patterns, LLAMA) == everywhere(pattern, LLAMA)
    found: list[Any] = [{patterns[name] for name in block} for block in LLAMA]
    assert all(len(kinds) == 1 for kinds in found)
    kept = [next(iter(kinds)).n for kinds in found]
    assert {next(iter(kinds)).m for kinds in found} == {pattern.m}
    assert len(set(kept)) > 1, "nothing was moved"
    assert min(kept) >= 1 and max(kept) <= pattern.m - 1
    ruled = rule.sparsities(1 - pattern.n / pattern.m, [1] * 12, measures)
    order = sorted(range(12), key=lambda index: ruled[index])
    assert [kept[index] for index in order] == sorted(kept, reverse=True)


def test_mixed_groups_of_uneven_blocks_miss_the_mean_by_less_than_a_block() -> None:
    blocks: Shapes = [{f"{i}": (8, 16 * (1 + i % 3))} for i in range(9)]
    patterns = Atp(0.6).patterns(NofM(4, 8), blocks, [0.0] * 9)
    missing = everywhere(NofM(4, 8), blocks) - pruned(patterns, blocks)
    assert 0 <= missing < 8 * 48 / 8


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "sparsity", "text"),
    [
        (Owl(), "0", "nothing to allocate"),
        (Dlp(), "0.995", "no block may lose more than 0.99"),
        (Owl(), "1:2", "so none may keep more if the mean is to stay 1:2"),
        (Dlp(), "1:4", "no block can keep fewer than 1 of 4"),
        (Alpha(), "3:4", "no block can keep more than 3 of 4"),
        (Owl(), "2:4", "differ by at most 0.64 of every 4 weights, so each would stay 2:4"),
        (Alpha(eps=0.1), "2:4", "each would stay 2:4"),
        (Atp(0.3), "0.1", "allocation.rise=0.3 leads out of [0, 0.99] around sparsity=0.1: at most 0.2"),
        (Atp(), "0.9", "at most 0.18"),
        (Atp(), "2:4", "each would stay 2:4"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_reason(rule: Allocation, sparsity: str, text: str) -> None:
    reason = rule.refusal(parse_sparsity(sparsity, Scope.row))
    assert reason is not None and text in reason


@pytest.mark.parametrize("sparsity", ["0", "0.5", "0.999", "1:2", "2:4", "3:4"])
def test_uniform_refuses_nothing(sparsity: str) -> None:
    pattern = parse_sparsity(sparsity, Scope.row)
    assert Uniform().refusal(pattern) is None
    assert set(Uniform().patterns(pattern, LLAMA, []).values()) == {pattern}


@pytest.mark.parametrize("span", [0.3, 0.5, 0.99])
@pytest.mark.parametrize("seed", range(5))
def test_a_refused_spread_would_indeed_move_no_block(span: float, seed: int) -> None:
    patterns = Dlp(alpha=span / 8).patterns(NofM(2, 4), LLAMA, random_measures(12, seed))
    assert Dlp(alpha=span / 8).refusal(NofM(2, 4)) is not None
    assert set(patterns.values()) == {NofM(2, 4)}


@pytest.mark.parametrize(
    ("rule", "field"),
    [(Owl(mo=0), "mo"), (Owl(lam=-1), "lam"), (Owl(lam=0.5), "lam"), (Dlp(alpha=0.5), "alpha"), (Alpha(eps=1), "eps"),
     (Atp(rise=-0.1), "rise"), (Atp(rise=1), "rise"), (Owl(mo=math.nan), "mo"), (Atp(rise=math.nan), "rise")],
)  # fmt: skip
def test_knobs_out_of_range_are_faults(rule: Allocation, field: str) -> None:
    (fault,) = rule.faults()
    assert f"allocation.{field}=" in fault


@pytest.mark.parametrize("cls", choices("allocation").values(), ids=choices("allocation"))
def test_defaults_are_in_range(cls: type[Allocation]) -> None:
    assert cls().faults() == []
    assert cls().refusal(Ratio(Fraction(1, 2))) is None
    assert cls().refusal(NofM(4, 8)) is None


# --- the survey ------------------------------------------------------------------------------------------------------

WINDOWS = token_windows(6, 16)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("four"), "llama", num_hidden_layers=4)


def open_tiny(folder: Path) -> tuple[StreamedModel, Shapes]:
    model = StreamedModel(Checkpoint(folder), torch.device("cpu"), torch.float32)
    return model, [{slot.name: slot.shape for slot in block.slots} for block in model.blocks]


def slow_survey(folder: Path, rule: Allocation) -> list[float]:
    """The whole model in memory, one window at a time."""
    model = load(folder)
    measures = []
    for index in range(len(model.model.layers)):
        linears = [m for _, m in model.model.layers[index].named_modules() if isinstance(m, torch.nn.Linear)]
        inputs: dict[Any, list[Tensor]] = {linear: [] for linear in linears}
        handles = [
            linear.register_forward_hook(lambda module, args, out, inputs=inputs: inputs[module].append(args[0][0]))
            for linear in linears
        ]
        with torch.inference_mode():
            for window in WINDOWS:
                model(window[None], use_cache=False)
        for handle in handles:
            handle.remove()
        weights = [linear.weight.detach() for linear in linears]
        measures.append(rule.measure(weights, [saw(torch.cat(inputs[linear])) for linear in linears]))
    return measures


@pytest.mark.parametrize("rule", [Owl(mo=2), Dlp(), Alpha()], ids=lambda rule: type(rule).__name__)
def test_the_survey_sees_the_dense_model_and_changes_nothing(tiny: Path, rule: Allocation) -> None:
    model, _ = open_tiny(tiny)
    batches = [batch for part in torch.split(WINDOWS, 4) for batch in model.batches(part)] if rule.needs() else []
    before = [batch.hidden_BLH for batch in batches]
    copies = [hidden_BLH.clone() for hidden_BLH in before]
    finished: list[int] = []
    measures = survey(model, batches, rule, finished.append)
    assert measures == pytest.approx(slow_survey(tiny, rule), rel=1e-4)
    assert len(set(measures)) > 1
    assert finished == [0, 1, 2, 3]
    assert all(batch.hidden_BLH is hidden_BLH for batch, hidden_BLH in zip(batches, before, strict=True))
    assert all(now.equal(copy) for now, copy in zip(before, copies, strict=True))
    assert survey(model, batches, rule) == measures
    assert all(slot.weight_OI.is_meta for block in model.blocks for slot in block.slots)


def test_without_statistics_no_block_is_run(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = open_tiny(tiny)
    monkeypatch.setattr(StreamedModel, "forward", lambda *_: pytest.fail("a block was run"))
    batches = list(model.batches(WINDOWS))
    assert len(survey(model, batches, Alpha())) == 4
    assert len(survey(model, [], Alpha())) == 4


@pytest.mark.parametrize("sparsity", ["0.6", "4:8"])
@pytest.mark.parametrize("rule", [Owl(mo=2), Alpha(), Dlp(), Atp()], ids=lambda rule: type(rule).__name__)
def test_a_surveyed_model_is_pruned_as_allocated(tiny: Path, tmp_path: Path, rule: Allocation, sparsity: str) -> None:
    model, blocks = open_tiny(tiny)
    pattern = parse_sparsity(sparsity, Scope.row)
    batches = list(model.batches(WINDOWS))
    measures = survey(model, batches, rule) if rule.surveys else [0.0] * len(blocks)
    patterns = rule.patterns(pattern, blocks, measures)
    writer = CheckpointWriter(model.checkpoint, tmp_path)
    recipe = Recipe(Wanda(), patterns, NoRepair(), Propagate.sublayer)
    assert len(list(prune(model, batches, recipe, writer, Clock()))) == 4
    writer.finish()
    written = {name: Pruned(name, View(), pattern_) for name, pattern_ in patterns.items()}
    zeros = count_zeros(Checkpoint(tmp_path, bare=True), written)
    smallest = min(rows for block in blocks for rows, _ in block.values())
    assert 0 <= everywhere(pattern, blocks) - sum(zeros.values()) < smallest
    assert sum(zeros.values()) == pruned(patterns, blocks)
    assert max(shares(patterns, blocks)) - min(shares(patterns, blocks)) > 0.05


def test_the_survey_names_what_it_cannot_measure(tiny: Path, tmp_path: Path) -> None:
    damaged = make(tmp_path / "damaged", "llama")
    edit(damaged, "model.layers.1.mlp.up_proj.weight", lambda weight: weight.index_fill_(0, torch.tensor(3), math.nan))
    model, _ = open_tiny(damaged)
    with pytest.raises(AceError, match=r"NaN or Inf in model\.layers\.1\.mlp\.up_proj\.weight"):
        survey(model, [], Alpha())
    model, _ = open_tiny(tiny)
    with pytest.raises(AceError, match="No calibration token reached"):
        survey(model, [], Owl())

    @dataclass
    class Lost(Allocation):
        def measure(self, weights: Sequence[Tensor], seen: Sequence[Seen]) -> float:
            return math.nan

    with pytest.raises(AceError, match=r"finds no number for model\.layers\.0"):
        survey(model, [], Lost())
