"""Rounding to a grid, alone and in one sweep with pruning, against a slow float64 reference."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import add_tokenizer, edit, load, make, token_windows, weights
from torch import Tensor

from ace_cli.core import registry
from ace_cli.core.errors import AceError
from ace_cli.methods.grids import SHARES, Grid
from ace_cli.methods.patterns import NofM, Pattern, Ratio
from ace_cli.methods.quantize.base import Integer, Quantised, Quantize, Rounding
from ace_cli.methods.repair import sparsegpt
from ace_cli.methods.repair.admm import Admm
from ace_cli.methods.repair.base import Repair, Repaired
from ace_cli.methods.repair.least_squares import Factors
from ace_cli.methods.repair.none import NoRepair
from ace_cli.methods.repair.sparsegpt import Damping, SparseGPT
from ace_cli.methods.statistics import Gram, Seen
from ace_cli.model.pruned import Violation, verify
from ace_cli.model.quantised import dequantise_folder
from ace_cli.model.source import ModelConfig, open_model
from ace_cli.report.facts import Report
from ace_cli.run import journal

HALF = Ratio(Fraction(1, 2))
GRIDS = [name for name in registry.choices("quantize") if name != "none"]


def named(name: str, **options: Any) -> Quantize:
    return registry.choices("quantize")[name](**options)  # type: ignore[no-any-return]


def layer(seed: int = 0, n_out: int = 12, n_in: int = 64, n_tokens: int = 200) -> tuple[Tensor, Tensor]:
    """Weights (O, I) and the Gram matrix of correlated inputs of different sizes."""
    gen = torch.Generator().manual_seed(seed)
    mixed = torch.eye(n_in) + 0.3 * torch.randn(n_in, n_in, generator=gen)
    x_TI = torch.randn(n_tokens, n_in, generator=gen) @ mixed * torch.randn(n_in, generator=gen).exp()
    return torch.randn(n_out, n_in, generator=gen), (x_TI.T @ x_TI).double()


def seen_of(gram: Tensor) -> Seen:
    seen = Seen((Gram(),))
    seen[Gram()].total_II, seen[Gram()].tokens = gram, 200
    return seen


def run(repair: Repair, weight: Tensor, keep: Tensor, gram: Tensor, pattern: Pattern = HALF) -> Repaired:
    return repair.repair(weight, keep, seen_of(gram), pattern)


def slow_scale(weights: list[float], costs: list[float], grid: Grid) -> float:
    """The scale of SHARES, to eight bits, that loses least."""
    top, best, least = max(map(abs, weights)), 1.0, float("inf")
    for share in SHARES:
        scale = float(torch.tensor(top * share / grid.highest).bfloat16())
        lost = sum(c * (slow_point(w, scale, grid) - w) ** 2 for w, c in zip(weights, costs, strict=True))
        if top and lost < least:
            best, least = scale, lost
    return best


def slow_point(weight: float, scale: float, grid: Grid) -> float:
    return min(max(round(weight / scale), grid.lowest), grid.highest) * scale


def slow_sweep(
    weight: Tensor, gram: Tensor, pattern: Pattern, damping: float, grid: Grid, keep: Tensor, adaptive: bool
) -> tuple[Tensor, Tensor]:
    """SparseGPT, section 3.5, float64: q = point(w) * keep, the inverse of what is left made anew for each column."""
    w, mask, group = weight.double().clone(), keep.clone(), grid.width(weight.shape[1])
    h = gram.double() + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    pivots = [float(torch.linalg.inv(h[j:, j:])[0, 0]) for j in range(len(h))]
    costs, scales = [1 / pivot for pivot in pivots], [1.0] * len(w)
    for j in range(len(h)):
        if adaptive and j % pattern.group_width == 0:
            ahead = slice(j, j + pattern.group_width)
            mask[:, ahead] = pattern.keep(w[:, ahead].square() / torch.tensor(pivots[ahead]))
        inverse = torch.linalg.inv(h[j:, j:])
        for i, row in enumerate(w):
            if j % group == 0:
                here = slice(j, j + group)
                known = keep if grid.group is None else mask  # a row's scale is there before anything is chosen
                scales[i] = slow_scale((row[here] * known[i, here]).tolist(), costs[here], grid)
            point = slow_point(float(row[j]), scales[i], grid) if mask[i, j] else 0.0
            row[j:] -= (row[j] - point) / inverse[0, 0] * inverse[0].clone()
            row[j] = point
    return w, mask


@pytest.fixture(params=[True, False], ids=["compiled", "torch"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(sparsegpt, "load", lambda name: None)
    return bool(request.param)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("group", "bits", "unit"), [(16, 4, False), (None, 3, True), (32, 2, True)])
@pytest.mark.parametrize("pattern", [HALF, NofM(2, 4), Ratio(Fraction(0))], ids=str)
def test_the_joint_sweep_is_the_published_one(pattern: Pattern, group: int | None, bits: int, unit: bool) -> None:
    weight, gram = layer(1)
    if unit:  # damped by each input's own size: the same as inputs of equal sizes
        gram = Factors(gram, 200).damped(0.0).double()
    grid, adaptive, keep = Grid(bits, group), bool(pattern.group_width), pattern.keep(weight.abs())
    slow, mask = slow_sweep(weight, gram, pattern, 0.05, grid, keep, adaptive)
    sweep = SparseGPT(damping=0.05, damping_of=Damping.mean, block_columns=20, adaptive=adaptive)
    if unit:  # the damping is that of the rounding
        done = run(Quantised(replace(sweep, damping=9.0), grid, Rounding.joint, 0.05), weight, keep, gram, pattern)
    else:
        done = sweep.repair(weight, keep, seen_of(gram), pattern, grid)
    assert torch.equal(done.keep_OI, mask)
    torch.testing.assert_close(done.weight_OI.double(), slow, rtol=1e-5, atol=1e-6)
    assert not bool(done.weight_OI[~mask].any()) and not bool(done.weight_OI.signbit()[done.weight_OI == 0].any())


@pytest.mark.parametrize("name", GRIDS)
def test_every_weight_ends_on_the_grid_and_zeros_stay(name: str) -> None:
    weight, gram = layer(2)
    keep = HALF.keep(weight.abs())
    lost = {}
    for rounding in Rounding:
        for inner in (NoRepair(), Admm(), SparseGPT(refit_steps=5)):
            choice = named(name, rounding=rounding, group=32)
            done = run(choice.around(inner), weight, keep, gram)
            points = done.weight_OI.unflatten(1, (-1, 32))
            assert all(len(group.unique()) <= 2**choice.bits for row in points for group in row)
            assert not bool(done.weight_OI[~keep].any())
            lost[rounding, type(inner)] = run_loss(weight - done.weight_OI, gram)
    for inner in (NoRepair, Admm, SparseGPT):
        assert lost[Rounding.joint, inner] <= lost[Rounding.nearest, inner] * 1.001
    # with three points a group, what passes errors on is no longer sure to help
    assert named(name).bits == 2 or lost[Rounding.joint, NoRepair] < lost[Rounding.after, NoRepair]


def run_loss(change: Tensor, gram: Tensor) -> float:
    return float(((change.double() @ gram) * change.double()).sum())


def test_a_repair_is_told_apart_from_its_rounding() -> None:
    assert named("none").around(NoRepair()) == NoRepair()
    around = named("int4", rounding=Rounding.nearest).around(NoRepair())
    assert around.acts and not around.needs() and around.keeps_mask()
    assert named("int4").around(NoRepair()).needs() == (Gram(),)
    assert not named("int4").around(SparseGPT(adaptive=True)).keeps_mask()
    assert named("int4").around(NoRepair(), half=True).grid.smallest == 2.0**-16  # type: ignore[attr-defined]


def test_rows_without_weights_and_tiny_ones_stay_finite() -> None:
    weight = torch.zeros(3, 16)
    weight[1], weight[2, 3] = 1e-25, 1e-44
    grid = Grid(4, 16)
    points = grid.rounded(weight, grid.scales(weight))
    assert bool(points.isfinite().all())
    torch.testing.assert_close(points[1], weight[1], rtol=0.01, atol=0.0)


@pytest.mark.parametrize(
    ("options", "words"), [({"group": 12}, "quantize.group is 12"), ({"damping": -1.0}, "damping")]
)
def test_knobs_out_of_range_are_named(options: dict[str, Any], words: str) -> None:
    assert any(words in fault for fault in named("int4", **options).faults())
    assert isinstance(named("int4"), Integer) and not named("int4").faults()


# --- runs ---------------------------------------------------------------------------------------------------------

WITHOUT = pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed")
Prune = Callable[..., Report]


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, None), (3, 16), (2, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_grid_is_found_again_in_its_values(bits: int, group: int | None, dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(bits)
    weight = torch.randn(40, 96, generator=gen) * torch.randn(40, 1, generator=gen).exp()
    weight[torch.rand(40, 96, generator=gen) < 0.6] = 0.0
    grid = Grid(bits, group, 2.0**-16)
    stored = grid.rounded(weight, grid.scales(weight)).to(dtype)
    scales = grid.scales_of(stored)
    codes = grid.codes(stored, scales)
    assert codes.min() >= grid.lowest and codes.max() <= grid.highest
    assert torch.equal(grid.values(codes, scales, dtype), stored)
    stored[3, :16] = torch.linspace(0.5, 0.9, 16)  # more steps than codes of few bits have
    if bits < 5:
        with pytest.raises(ValueError, match="row 3"):
            grid.scales_of(stored)


@WITHOUT
@pytest.mark.parametrize(
    ("dtype", "quantize", "options"),
    [
        (torch.float32, "int4", ["sparsity=2:4", "metric=sparsegpt"]),
        (torch.bfloat16, "int8", ["sparsity=0.5", "metric=wanda", "quantize.group=null"]),
        (torch.float16, "int3", ["sparsity=0", "metric=magnitude", "quantize.rounding=nearest"]),
    ],
    ids=str,
)
def test_transformers_loads_the_codes_and_computes_the_same(
    tmp_path: Path, prune_here: Prune, dtype: torch.dtype, quantize: str, options: list[str]
) -> None:
    model = add_tokenizer(make(tmp_path / "model", "llama", dtype))
    out = tmp_path / "out"
    report = prune_here(model, out, f"quantize={quantize}", "quantize.group=32", *options)
    plain, codes = out / "checkpoint", out / "quantised"
    assert verify(plain) == verify(codes) == 14
    ids = token_windows(2, 9)
    with torch.inference_mode():
        one, other = (load(folder, dtype)(ids).logits for folder in (plain, codes))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    facts = report.stages["quantised"]
    assert facts["quantised_bytes"] == sum(file.stat().st_size for file in codes.glob("*.safetensors"))
    assert facts["quantised_bytes"] < facts["dense_bytes"]
    assert report.method["quantize"] == quantize
    dequantise_folder(codes, tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (plain / "config.json").read_bytes()
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor.view(torch.uint8), weights(tmp_path / "again")[name].view(torch.uint8))
    assert open_model(ModelConfig(path=str(codes))).config() == open_model(ModelConfig(path=str(plain))).config()


@WITHOUT
def test_what_was_damaged_is_found(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    prune_here(llama, tmp_path / "out", "quantize=int4", "quantize.group=32", "metric=wanda")
    name = "model.layers.1.mlp.up_proj.weight"
    plain, codes = tmp_path / "out" / "checkpoint", tmp_path / "out" / "quantised"

    def moved(weight: Tensor) -> Tensor:
        weight.view(-1)[int(weight.view(-1).nonzero()[0])] *= 1.01
        return weight

    edit(plain, name, moved)
    with pytest.raises(Violation, match="no grid of 4 bits"):
        verify(plain)
    edit(codes, f"{name}_packed", lambda packed: packed.fill_(0x11111111))  # seven below zero, everywhere
    with pytest.raises(Violation, match=r"breaks 0\.5"):
        verify(codes)
    edit(codes, f"{name}_scale", lambda scale: scale[:, :-1].clone())
    with pytest.raises(AceError, match="parts do not fit"):
        verify(codes)


@WITHOUT
def test_a_run_that_was_stopped_ends_in_the_same_bytes(
    llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["quantize=int4", "quantize.group=16", "metric=wanda", "sparsity=2:4"]
    prune_here(llama, tmp_path / "whole", *options)
    original = journal.Work.record

    def stopped(*given: Any) -> None:
        original(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(journal.Work, "record", stopped)
        prune_here(llama, tmp_path / "again", *options)
    prune_here(llama, tmp_path / "again", *options)
    for folder in ("checkpoint", "quantised"):
        one, other = (weights(tmp_path / run / folder) for run in ("whole", "again"))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["quantize=int4", "unit=channel"], "quantize=int4 does not go with unit=channel"),
        (["quantize=int4", "recover=blocks"], "off the grid of quantize=int4"),
        (["quantize=int9"], "there is no such quantize"),
        (["quantize=int4", "quantize.group=40", "metric=wanda"], "quantize.group=40 does not divide the 64 inputs"),
    ],
)
def test_what_does_not_go_is_one_line(
    here: Callable[..., Any], llama: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    done = here("model=custom", f"model.path={llama}", "calib=self", "eval=none", "device=cpu", *options)
    assert done.returncode == 2
    assert words in done.stderr and done.stderr.count("\n") == 1


def test_weights_that_are_no_linear_layer_and_a_missing_library_are_refused(
    llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AceError, match="is no linear layer of its own"):
        prune_here(make(tmp_path / "gpt2", "gpt2"), tmp_path / "out", "quantize=int4", "metric=wanda")
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(AceError, match=r"quantise\]"):
        prune_here(llama, tmp_path / "out", "quantize=int4", "quantize.group=32", "metric=wanda")
    assert not (tmp_path / "out").exists()
