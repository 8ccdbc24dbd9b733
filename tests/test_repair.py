"""Every repair against slow float64 references, and the bounds every repair promises."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from grids import pairs
from torch import Tensor

from ace_cli.methods.patterns import NofM, Pattern, Ratio, Scope
from ace_cli.methods.repair import exchange, least_squares, sparsegpt
from ace_cli.methods.repair.admm import Admm, keep_share
from ace_cli.methods.repair.base import Repair, Repaired
from ace_cli.methods.repair.least_squares import Factors, layer_loss, refit, row_errors
from ace_cli.methods.repair.sparsegpt import Damping, SparseGPT
from ace_cli.methods.repair.swaps import Swaps
from ace_cli.methods.statistics import Gram, Seen


def ratio(p: str) -> Ratio:
    return Ratio(Fraction(p))


PATTERNS = [ratio("0.5"), Ratio(Fraction("0.6"), Scope.layer), NofM(2, 4), NofM(1, 4), NofM(4, 8)]
REPAIRS = [
    Admm(),
    Admm(shrinkage=0.1, iterations=20),
    Admm(iterations=20, mask_iterations=15),
    Swaps(),
    Swaps(shrinkage=0.1, sweeps=1),
    Swaps(refit_steps=30),
    SparseGPT(),
    SparseGPT(damping=0.3, damping_of=Damping.unit),
    SparseGPT(damping=None, damping_of=Damping.unit),
    SparseGPT(damping=None, damping_of=Damping.unit, adaptive=True, refit_steps=30),
    SparseGPT(refit_steps=30),
]


@pytest.fixture(params=[True, False], ids=["compiled", "torch"], autouse=True)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether rows are repaired by compiled loops, or by torch's operations as on a GPU."""
    if not request.param:
        for module in (exchange, sparsegpt):
            monkeypatch.setattr(module, "load", lambda name: None)
    assert (sparsegpt.load("sparsegpt_loops") is not None) == request.param
    return bool(request.param)


def run(
    repair: Repair, weight: Tensor, keep: Tensor, gram: Tensor, n: int, pattern: Pattern, factors: Factors | None = None
) -> Repaired:
    """The repair on a Gram matrix of ``n`` tokens."""
    seen = Seen(repair.needs())
    seen[Gram()].total_II, seen[Gram()].tokens, seen[Gram()].factors = gram, n, factors
    return repair.repair(weight, keep, seen, pattern)


def layer(seed: int = 0, n_out: int = 12, n_in: int = 32, n_tokens: int = 100) -> tuple[Tensor, Tensor]:
    """Weights (O, I) and correlated inputs (T, I) of very different sizes."""
    gen = torch.Generator().manual_seed(seed)
    mixed = torch.eye(n_in) + 0.3 * torch.randn(n_in, n_in, generator=gen)
    x_TI = torch.randn(n_tokens, n_in, generator=gen) @ mixed * torch.randn(n_in, generator=gen).exp()
    return torch.randn(n_out, n_in, generator=gen), x_TI


def wanda(weight_OI: Tensor, x_TI: Tensor) -> Tensor:
    return weight_OI.abs() * x_TI.norm(dim=0)


def best_fit(weight_OI: Tensor, keep_OI: Tensor, matrix_II: Tensor) -> Tensor:
    """Row by row: argmin (w - z) A (w - z)^T with z zero where pruned, from the normal equations A_SS z_S = (A w)_S,
    float64."""
    out = torch.zeros_like(weight_OI, dtype=torch.float64)
    a, w = matrix_II.double(), weight_OI.double()
    for i in range(w.shape[0]):
        s = keep_OI[i].nonzero()[:, 0]
        out[i, s] = torch.linalg.solve(a[s][:, s], (a @ w[i])[s])
    return out


def slow_sparsegpt(
    weight: Tensor, gram: Tensor, pattern: Ratio | NofM, damping: float, block: int, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of arXiv 2301.00774 in float64, with the inverse of the remaining Hessian made anew every column."""
    w, h = weight.double().clone(), gram.double().clone()
    n_out, n_in = w.shape
    for j in range(n_in):
        if h[j, j] == 0:
            h[j, j] = 1.0
            if keep is None:
                w[:, j] = 0.0
    h += damping * h.diagonal().mean() * torch.eye(n_in, dtype=torch.float64)
    mask = torch.ones(n_out, n_in, dtype=torch.bool) if keep is None else keep.clone()
    group = pattern.group_width or block
    pivots = [torch.linalg.inv(h[j:, j:])[0, 0] for j in range(n_in)]
    for j in range(n_in):
        if keep is None and j % group == 0:
            stop = min(j + group, n_in)
            score = torch.stack([w[:, c] ** 2 / pivots[c] for c in range(j, stop)], 1)
            mask[:, j:stop] = pattern.keep(score)
        inverse = torch.linalg.inv(h[j:, j:])
        for i in range(n_out):
            if not mask[i, j]:
                w[i, j:] -= w[i, j] / inverse[0, 0] * inverse[0].clone()
                w[i, j] = 0.0
    return w, mask


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "adaptive"])
def test_sparsegpt_is_the_published_algorithm(pattern: Ratio | NofM, fixed: bool) -> None:
    weight, x = layer(1)
    gram = (x.T @ x).double()
    gram[5], gram[:, 5] = 0.0, 0.0
    keep = pattern.keep(wanda(weight, x))
    slow, slow_keep = slow_sparsegpt(weight, gram, pattern, 0.01, 16, keep if fixed else None)
    fast = run(SparseGPT(block_columns=16, adaptive=not fixed), weight, keep, gram, 100, pattern)
    assert torch.equal(fast.keep_OI, slow_keep)
    torch.testing.assert_close(fast.weight_OI.double(), slow, rtol=1e-3, atol=1e-4)
    assert any("zero in all" in note for note in fast.notes)


@pytest.mark.parametrize("scope", Scope)
def test_sparsegpt_prunes_the_count_it_is_given(scope: Scope) -> None:
    weight, x = layer(16, n_in=50)
    pattern = Ratio(Fraction("0.63"), scope)
    keep = pattern.keep(weight.abs())
    done = run(SparseGPT(block_columns=7, adaptive=True), weight, keep, x.T @ x, 100, pattern)
    assert int(done.keep_OI.sum()) == int(keep.sum())
    assert scope is Scope.layer or torch.equal(done.keep_OI.sum(1), keep.sum(1))


def test_sparsegpt_block_size_does_not_change_a_fixed_mask_repair() -> None:
    weight, x = layer(2)
    keep = ratio("0.5").keep(wanda(weight, x))
    one, many = (run(SparseGPT(block_columns=b), weight, keep, x.T @ x, 100, ratio("0.5")).weight_OI for b in (7, 32))
    torch.testing.assert_close(one, many, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("compiled", "repair", "pattern", "n_tokens"),
    pairs([True, False], REPAIRS, PATTERNS, [20, 400]), indirect=["compiled"], ids=str,
)  # fmt: skip
def test_error_lies_between_the_optimum_and_the_unrepaired_mask(
    repair: Admm | Swaps | SparseGPT, pattern: Ratio | NofM, n_tokens: int
) -> None:
    weight, x = layer(3, n_tokens=n_tokens)
    gram, keep = x.T @ x, pattern.keep(wanda(weight, x))
    factors = Factors(gram, n_tokens)
    done = run(repair, weight, keep, gram, n_tokens, pattern, factors)
    assert bool((done.weight_OI[~done.keep_OI] == 0).all())
    assert not bool(done.weight_OI.signbit()[~done.keep_OI].any())
    assert int(done.keep_OI.sum()) == int(keep.sum())
    if pattern.group_width:
        groups = done.keep_OI.reshape(12, -1, pattern.group_width).sum(2)
        assert bool((groups == pattern.n).all())  # type: ignore[union-attr]
    scale = factors.scale_I
    if isinstance(repair, SparseGPT):
        damping = 32 / n_tokens if repair.damping is None else repair.damping
        extra = damping * (scale.square() if repair.damping_of is Damping.unit else gram.diagonal().mean())
    else:
        usual = 32 / n_tokens if isinstance(repair, Admm) else (1 + (32 / n_tokens) ** 0.5) ** 2 - 1
        extra = (usual if repair.shrinkage is None else repair.shrinkage) * scale.square()
    objective = gram.double() + torch.diag(torch.ones(32) * extra).double()
    least = row_errors(weight.double() - best_fit(weight, done.keep_OI, objective), objective)
    here = row_errors(weight.double() - done.weight_OI.double(), objective)
    masked = row_errors(weight.double().masked_fill(keep, 0.0), objective)
    assert bool((here >= least * (1 - 1e-4)).all())
    if (isinstance(repair, Admm) and repair.mask_iterations) or isinstance(repair, SparseGPT):
        assert here.sum() <= masked.sum()  # a greedy pass, or another mask: no promise for a single row
    else:
        assert bool((here <= masked * (1 + 1e-5)).all())
    assert done.loss_before == pytest.approx(layer_loss(weight.masked_fill(keep, 0.0), gram))
    assert done.loss_after == pytest.approx(layer_loss(weight - done.weight_OI, gram))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_refit_reaches_the_per_row_least_squares_optimum(pattern: Ratio | NofM) -> None:
    weight, x = layer(4)
    gram, keep = x.T @ x, pattern.keep(wanda(weight, x))
    done = run(Admm(shrinkage=0.1, polish=200, tolerance=1e-6), weight, keep, gram, 100, pattern)
    best = best_fit(weight, keep, gram.double() + 0.1 * torch.diag(gram.diagonal()).double())
    torch.testing.assert_close(done.weight_OI.double(), best, rtol=1e-3, atol=1e-3)


def test_refit_of_some_rows_at_a_time_is_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = layer(5, n_out=70)
    keep, factors = ratio("0.5").keep(wanda(weight, x)), Factors(x.T @ x, 100)
    unit, start = weight * factors.scale_I, (0.9 * weight * factors.scale_I).masked_fill(~keep, 0.0)

    def fitted(cached: int) -> Tensor:
        monkeypatch.setattr(least_squares, "_CACHED", cached)
        return least_squares.refit(unit, keep, factors.damped(0.1), 5, 0.01, start)

    torch.testing.assert_close(fitted(32 * 20), fitted(32 * 70), rtol=1e-4, atol=1e-4)


def test_refit_error_falls_with_every_step() -> None:
    weight, x = layer(5)
    factors = Factors(x.T @ x, 100)
    unit, damped = weight * factors.scale_I, factors.damped(0.01)
    keep = ratio("0.5").keep(unit.abs())
    errors = [row_errors(unit - refit(unit, keep, damped, n, 0.0), damped) for n in range(8)]
    for before, after in itertools.pairwise(errors):
        assert bool((after <= before * (1 + 1e-5)).all())


def test_admm_rounds_are_the_published_ones() -> None:
    weight, x = layer(6)
    gram, keep = (x.T @ x).double(), ratio("0.5").keep(wanda(weight, x))
    d = gram.diagonal().sqrt()
    a = gram / d[:, None] / d + 0.1 * torch.eye(32)
    v = u = None
    target, inverse = (weight * d) @ a, torch.linalg.inv(a + torch.eye(32))
    v, u = weight * d, torch.zeros(12, 32)
    for _ in range(20):
        z = (v + u) * keep
        u = u + v - z
        v = (target + (z - u)) @ inverse
    slow = (v + u) * keep / d
    fast = run(Admm(shrinkage=0.1, iterations=20, polish=0), weight, keep, gram, 100, ratio("0.5"))
    torch.testing.assert_close(fast.weight_OI.double(), slow, rtol=1e-3, atol=1e-4)
    polished = run(Admm(shrinkage=0.1, iterations=20), weight, keep, gram, 100, ratio("0.5"))
    assert polished.loss_after <= fast.loss_after * 1.01


@pytest.mark.parametrize("damping_of", list(Damping))
def test_refit_after_sparsegpt_reaches_the_optimum_of_its_mask(damping_of: Damping) -> None:
    weight, x = layer(15)
    gram, pattern = x.T @ x, NofM(2, 4)
    first = SparseGPT(damping=0.1, damping_of=damping_of, adaptive=True)
    plain = run(first, weight, pattern.keep(weight), gram, 100, pattern)
    first.refit_steps, first.tolerance = 400, 1e-6
    done = run(first, weight, pattern.keep(weight), gram, 100, pattern)
    assert torch.equal(done.keep_OI, plain.keep_OI)
    diagonal = gram.diagonal() if damping_of is Damping.unit else gram.diagonal().mean().expand(32)
    objective = gram.double() + 0.1 * torch.diag(diagonal).double()
    best = row_errors(weight.double() - best_fit(weight, done.keep_OI, objective), objective)
    here = row_errors(weight.double() - done.weight_OI.double(), objective)
    torch.testing.assert_close(here, best, rtol=1e-4, atol=0.0)
    assert here.sum() < row_errors(weight.double() - plain.weight_OI.double(), objective).sum()


def test_first_mask_of_admm_is_wandas_and_mask_rounds_lower_the_error() -> None:
    weight, x = layer(7)
    gram, pattern = x.T @ x, ratio("0.5")
    keep = pattern.keep(wanda(weight, x))
    once = run(Admm(iterations=1, mask_iterations=1), weight, pattern.keep(torch.rand(12, 32)), gram, 100, pattern)
    assert torch.equal(once.keep_OI, keep)
    fixed = run(Admm(shrinkage=0.01, iterations=20), weight, keep, gram, 100, pattern)
    free = run(Admm(shrinkage=0.01, iterations=20, mask_iterations=15), weight, keep, gram, 100, pattern)
    assert free.loss_after < fixed.loss_after


def test_keep_share_prunes_the_lowest_first() -> None:
    score = torch.tensor([[4.0, 1.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    assert keep_share(score, ratio("0.5"), 0.5).tolist() == [[True, False, True, True], [False, True, True, True]]
    assert torch.equal(keep_share(score, ratio("0.5"), 1.0), ratio("0.5").keep(score))


@pytest.mark.parametrize("repair", [Admm(), Admm(iterations=20, mask_iterations=15), Swaps()], ids=str)
def test_the_scale_of_the_inputs_changes_nothing(repair: Admm | Swaps) -> None:
    weight, x = layer(10)
    pattern = ratio("0.5")
    keep = pattern.keep(wanda(weight, x))
    plain, large = (run(repair, weight, keep, (c * x).T @ (c * x), 100, pattern) for c in (1.0, 64.0))
    assert torch.equal(plain.keep_OI, large.keep_OI)
    torch.testing.assert_close(plain.weight_OI, large.weight_OI)


def test_more_shrinkage_stays_closer_to_the_original_weights() -> None:
    weight, x = layer(11, n_tokens=20)
    gram, keep = x.T @ x, ratio("0.5").keep(wanda(weight, x))
    moved = []
    for shrinkage in (0.01, 0.1, 1.0, 1e6):
        done = run(Admm(shrinkage=shrinkage, polish=300, tolerance=0.0), weight, keep, gram, 20, ratio("0.5"))
        moved.append(float(((done.weight_OI - weight) * gram.diagonal().sqrt()).masked_fill(~keep, 0.0).norm()))
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 1e-3 * moved[0]


def test_damping_is_raised_in_a_ladder_and_noted() -> None:
    matrix = torch.tensor([[1.0, 1.05], [1.05, 1.0]])
    factors = Factors(matrix, 3)
    factors.inverse_root(0.01, unit=False)
    assert factors.notes == ["damping raised 10 times, from 0.01 to 0.1: the Gram matrix was singular"]
    with pytest.raises(ArithmeticError, match="no Cholesky factor"):
        Factors(torch.full((2, 2), float("nan")), 3).inverse_root(0.01, unit=False)


@pytest.mark.parametrize("repair", REPAIRS, ids=str)
def test_a_gram_matrix_with_nan_is_an_error(repair: Admm | Swaps | SparseGPT) -> None:
    weight, x = layer(17)
    gram = x.T @ x
    gram[2, 3] = gram[3, 2] = float("nan")
    with pytest.raises(ArithmeticError, match="NaN or Inf"):
        run(repair, weight, ratio("0.5").keep(weight.abs()), gram, 100, ratio("0.5"))


def test_factors_of_many_inputs_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = layer(n_in=37)
    gram = (x.T @ x).double()
    monkeypatch.setattr(least_squares, "_SOLVED", 4)
    monkeypatch.setattr(least_squares, "_PART", 5)
    root = Factors(gram, len(x)).inverse_root(0.01, unit=False).double()
    ridge = 0.01 * gram.diagonal().mean() * torch.eye(37, dtype=torch.float64)
    assert torch.equal(root, root.triu())
    assert bool((root.diagonal() > 0).all())
    torch.testing.assert_close(root.T @ root, torch.linalg.inv(gram + ridge), rtol=1e-4, atol=1e-6)
    whole = float((weight.double() @ gram * weight).sum())
    assert layer_loss(weight, gram) == pytest.approx(whole, rel=1e-5)


def test_factors_are_made_once() -> None:
    _, x = layer(12)
    factors = Factors(x.T @ x, 100)
    assert factors.inverse(0.5) is factors.inverse(0.5)
    assert factors.damped(0.3) is factors.damped(0.3)
    assert factors.damped(0.3) is not factors.damped(0.1)


@pytest.mark.parametrize("repair", REPAIRS, ids=str)
@pytest.mark.parametrize("kept", [True, False])
def test_all_kept_or_all_pruned(repair: Admm | Swaps | SparseGPT, kept: bool) -> None:
    weight, x = layer(13)
    pattern = ratio("0" if kept else "1")
    keep = torch.full_like(weight, kept, dtype=torch.bool)
    done = run(repair, weight, keep, x.T @ x, 100, pattern)
    torch.testing.assert_close(done.weight_OI, weight * keep)


@pytest.mark.parametrize("repair", REPAIRS, ids=str)
def test_dead_inputs_stay_finite(repair: Admm | Swaps | SparseGPT) -> None:
    weight, x = layer(14)
    x[:, 3] = 0.0
    done = run(repair, weight, ratio("0.5").keep(wanda(weight, x)), x.T @ x, 100, ratio("0.5"))
    assert bool(done.weight_OI.isfinite().all())
    assert any("zero in all 100 tokens" in note for note in done.notes)


@pytest.mark.parametrize(
    ("repair", "n"),
    [
        (SparseGPT(damping=-1.0, block_columns=0, refit_steps=-1, tolerance=1.0), 4),
        (Admm(shrinkage=-1.0, rho=0.0, mask_iterations=3, polish=0, tolerance=1.0), 5),
        (Swaps(shrinkage=float("nan"), sweeps=0, refit_steps=-1, tolerance=2.0), 4),
        (SparseGPT(), 0),
        (Admm(), 0),
        (Swaps(), 0),
    ],
)
def test_faults_are_all_named(repair: Admm | Swaps | SparseGPT, n: int) -> None:
    assert len(repair.faults()) == n


@pytest.mark.parametrize("dead", [slice(None), slice(0, 12), slice(3, 5)], ids=["all", "most", "some"])
@pytest.mark.parametrize("pattern", [Ratio(Fraction(1, 2)), Ratio(Fraction(1, 2), Scope.layer), NofM(2, 4)], ids=repr)
@pytest.mark.parametrize("refit_steps", [0, 5])
def test_sparsegpt_keeps_the_count_where_inputs_are_dead(dead: slice, pattern: Pattern, refit_steps: int) -> None:
    """Of a dead input's weights as many stay, as they were, as the pattern asks for; which is said."""
    generator = torch.Generator().manual_seed(5)
    weight_OI, x_TI = torch.randn(8, 16, generator=generator), torch.randn(40, 16, generator=generator)
    x_TI[:, dead] = 0
    seen = Seen([Gram()])
    seen[Gram()].update(x_TI, x_TI, weight_OI)
    repair = SparseGPT(adaptive=True, refit_steps=refit_steps)
    found = repair.repair(weight_OI, torch.ones_like(weight_OI, dtype=torch.bool), seen, pattern)
    kept_OI = found.weight_OI != 0
    assert torch.equal(kept_OI, found.keep_OI)
    assert int(kept_OI.sum()) == weight_OI.numel() - pattern.pruned(*weight_OI.shape)
    dead_OI = torch.zeros_like(kept_OI)
    dead_OI[:, dead] = True
    torch.testing.assert_close(found.weight_OI[kept_OI & dead_OI], weight_OI[kept_OI & dead_OI])
    count = int(dead_OI[0].sum())
    assert any(f"{count} of 16 inputs were zero" in note for note in found.notes)
    if count == 16:
        assert torch.equal(kept_OI, pattern.keep(weight_OI.abs()))
        assert any("but their size" in note for note in found.notes)


def test_swaps_are_a_number_of_the_slot_and_no_warning(llama: Path, tmp_path: Path, prune_here: Any) -> None:
    report = prune_here(llama, tmp_path / "out", "metric=wanda", "repair=swaps")
    assert all(slot["diagnosis"]["swapped"] >= 0 for slot in report.slots)
    assert any(slot["diagnosis"]["swapped"] for slot in report.slots)
    assert not [warning for warning in report.warnings if "swapped" in warning]


def test_notes_that_differ_in_their_numbers_alone_are_one_warning() -> None:
    from ace_cli.pruning.facts import SlotFacts
    from ace_cli.run.assemble import _notes

    notes = {"a": ["damping raised to 0.1"], "b": ["damping raised to 1e-03", "2 dead inputs"], "c": []}
    slots = [SlotFacts(name, (1, 1), "0.5", 1, {}, noted, 0.0) for name, noted in notes.items()]
    assert _notes(slots) == ["a: damping raised to 0.1 (so, or nearly so, 1 other weights)", "b: 2 dead inputs"]


@pytest.mark.parametrize("size", [3, 40, 100])
def test_a_lower_triangular_matrix_is_inverted_in_place(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_squares, "_SOLVED", 8)
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lower = torch.linalg.cholesky(matrix @ matrix.T + torch.eye(size, dtype=torch.float64))
    inverse = lower.clone()
    least_squares._invert_lower(inverse)
    torch.testing.assert_close(inverse @ lower, torch.eye(size, dtype=torch.float64))
    assert torch.equal(inverse, inverse.tril())
