"""Exchanges of pairs against a slow float64 loop over the same groups, and what they promise."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from ace_cli.methods.metrics.ace import ACE
from ace_cli.methods.patterns import NofM, Ratio, Scope
from ace_cli.methods.repair import exchange
from ace_cli.methods.repair.exchange import descend, exchanged
from ace_cli.methods.repair.least_squares import row_errors
from ace_cli.methods.statistics import Gram, Seen

PATTERNS = [Ratio(Fraction("0.5")), Ratio(Fraction("0.6"), Scope.layer), NofM(2, 4), NofM(4, 8), NofM(1, 4)]


@pytest.fixture(params=[True, False], ids=["compiled", "torch"], autouse=True)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether exchanges are made by compiled loops, or by torch's operations as on a GPU."""
    if not request.param:
        monkeypatch.setattr(exchange, "load", lambda name: None)
    assert (exchange.load("exchange_loops") is not None) == request.param
    return bool(request.param)


def layer(seed: int, n_out: int = 7, n_in: int = 40, n_tokens: int = 200) -> tuple[Tensor, Tensor]:
    """Weights (O, I) and correlated inputs (T, I)."""
    gen = torch.Generator().manual_seed(seed)
    mixed = torch.eye(n_in) + 0.4 * torch.randn(n_in, n_in, generator=gen)
    return torch.randn(n_out, n_in, generator=gen), torch.randn(n_tokens, n_in, generator=gen) @ mixed


def pruned_error(unit_OI: Tensor, keep_OI: Tensor, matrix_II: Tensor) -> Tensor:
    return row_errors(unit_OI.masked_fill(keep_OI, 0.0).double(), matrix_II.double())


def slow_descend(unit: Tensor, keep: Tensor, matrix: Tensor, width: int, sweeps: int) -> tuple[Tensor, int]:
    """Row by row, group by group: the pair whose exchange lowers v_P A v_P^T most, both errors summed anew."""
    keep, count = keep.clone(), 0
    for sweep in range(sweeps):
        order = torch.arange(unit.shape[1]) if width else exchange._dealt(unit.shape[1], sweep + 1)
        for group in order.split(width or 16):
            for row in range(len(unit)):
                now = float(pruned_error(unit[row : row + 1], keep[row : row + 1], matrix))
                best, pair = now * (1 - 1e-9), None
                for p in group[keep[row, group]]:
                    for q in group[~keep[row, group]]:
                        other = keep[row : row + 1].clone()
                        other[0, p], other[0, q] = False, True
                        error = float(pruned_error(unit[row : row + 1], other, matrix))
                        best, pair = (error, (p, q)) if error < best else (best, pair)
                if pair is not None:
                    keep[row, pair[0]], keep[row, pair[1]] = False, True
                    count += 1
    return keep, count


@pytest.mark.parametrize("pattern", [Ratio(Fraction("0.5")), NofM(2, 4), NofM(4, 8)], ids=str)
def test_every_group_makes_its_best_exchange(pattern: Ratio | NofM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_BLOCK", 16)  # several blocks, the last one ragged
    unit, x = layer(0)
    keep, matrix = pattern.keep(unit.abs()), x.T @ x / len(x)
    got = descend(unit, keep, matrix, pattern.group_width, 2)
    want, count = slow_descend(unit, keep, matrix, pattern.group_width, 2)
    assert torch.equal(got, want)
    assert count > 0


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_no_row_gets_worse_with_any_sweep_and_counts_stay(pattern: Ratio | NofM) -> None:
    unit, x = layer(1, n_in=160)
    keep, matrix = pattern.keep(unit.abs()), x.T @ x / len(x)
    errors = [pruned_error(unit, keep, matrix)]
    for sweeps in range(1, 5):
        kept = descend(unit, keep, matrix, pattern.group_width, sweeps)
        errors.append(pruned_error(unit, kept, matrix))
        assert torch.equal(kept.sum(1), keep.sum(1))
        if width := pattern.group_width:
            assert torch.equal(kept.reshape(-1, width).sum(1), keep.reshape(-1, width).sum(1))
    assert all(bool((after <= before * (1 + 1e-6)).all()) for before, after in itertools.pairwise(errors))
    assert bool((errors[1] < errors[0]).all())


@pytest.mark.parametrize("pattern", [Ratio(Fraction("0.5")), NofM(2, 4), NofM(16, 32)], ids=str)
def test_any_tiles_pieces_and_threads_give_the_same(
    pattern: Ratio | NofM, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit, x = layer(7, n_out=300, n_in=96)
    keep, matrix = pattern.keep(unit.abs()), x.T @ x / len(x)
    whole = descend(unit, keep, matrix, pattern.group_width, 3)
    apart = [descend(unit[some], keep[some], matrix, pattern.group_width, 3) for some in (slice(41), slice(41, None))]
    monkeypatch.setattr(exchange, "_ROWS", 37)
    monkeypatch.setattr(exchange, "HEAVY", 1000)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    pieces = descend(unit, keep, matrix, pattern.group_width, 3)
    torch.set_num_threads(threads)
    assert not torch.equal(whole, keep)
    assert torch.equal(torch.cat(apart), whole)
    assert torch.equal(pieces, whole)


def test_both_ways_make_the_same_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    unit, x = layer(8, n_out=200, n_in=130)
    for pattern in (Ratio(Fraction("0.5")), NofM(1, 2), NofM(13, 26)):
        keep, matrix = pattern.keep(unit.abs()), x.T @ x / len(x)
        first = descend(unit, keep, matrix, pattern.group_width, 12)
        with monkeypatch.context() as changed:
            changed.setattr(exchange, "load", lambda name: None)
            second = descend(unit, keep, matrix, pattern.group_width, 12)
        assert not torch.equal(first, keep)
        assert torch.equal(first, second)


def test_uncorrelated_inputs_leave_the_best_single_scores_alone() -> None:
    unit, _ = layer(2)
    for pattern in (Ratio(Fraction("0.5")), NofM(2, 4)):
        keep = pattern.keep(unit.abs())
        kept = descend(unit, keep, torch.eye(40) * 3, pattern.group_width, 3)
        assert torch.equal(kept, keep)


def test_an_exchange_with_a_weight_of_zero_is_kept_account_of() -> None:
    unit = torch.tensor([[0.0, 2.0, 1.0, 1.0]])
    keep = torch.tensor([[True, False, True, False]])
    kept = descend(unit, keep, torch.eye(4), 4, 1)
    assert kept.tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("keep", [torch.ones(7, 40, dtype=torch.bool), torch.zeros(7, 40, dtype=torch.bool)])
def test_nothing_to_exchange(keep: Tensor) -> None:
    unit, x = layer(3)
    for width in (0, 4):
        kept = descend(unit, keep, x.T @ x, width, 2)
        assert torch.equal(kept, keep)


@pytest.mark.parametrize("n_in", [1, 5, 16, 17, 33])
def test_any_number_of_inputs(n_in: int) -> None:
    unit, x = layer(6, n_in=n_in)
    keep, matrix = Ratio(Fraction("0.5")).keep(unit.abs()), x.T @ x
    assert torch.equal(descend(unit, keep, matrix, 0, 2), slow_descend(unit, keep, matrix, 0, 2)[0])


def test_dealt_orders_are_permutations_and_differ() -> None:
    first, second = exchange._dealt(1536, 1), exchange._dealt(1536, 2)
    assert torch.equal(first.sort().values, torch.arange(1536))
    groups = [{frozenset(group.tolist()) for group in order.split(16)} for order in (first, second)]
    assert not groups[0] & groups[1]


def test_shrinkage_that_the_tokens_ask_for_is_the_edge_of_their_noise() -> None:
    """Largest eigenvalue of the correlations of 2,048 tokens of 512 uncorrelated inputs."""
    gen = torch.Generator().manual_seed(0)
    gram = Gram()
    gram.update(torch.randn(2048, 512, generator=gen), torch.empty(0), torch.empty(0))
    shared = exchange.factors_of(gram)
    largest = float(torch.linalg.eigvalsh(shared.damped(0.0))[-1])
    assert 1 + shared.edge() == pytest.approx(largest, rel=0.03)
    weight = torch.randn(8, 512, generator=gen)
    keep = NofM(2, 4).keep(weight.abs())
    by_default = exchanged(weight, keep, gram, 4, 2, None)
    assert torch.equal(by_default, exchanged(weight, keep, gram, 4, 2, shared.edge()))


def refined(metric: ACE, weight: Tensor, x: Tensor, pattern: Ratio | NofM) -> tuple[Tensor, Tensor]:
    """ACE's mask by scores alone, and the mask in the end."""
    seen = Seen(metric.needs())
    for statistic in seen:
        statistic.update(x, x @ weight.T, weight)
    keep = pattern.keep(metric.score(weight, seen))
    return keep, metric.refine(weight, keep, seen, pattern)


def turn(weight: Tensor, keep: Tensor, x: Tensor) -> float:
    """sum_t ||what the pruned weights add to the output||^2 / ||x_t||^2, in float64."""
    lost = x.double() @ weight.double().masked_fill(keep, 0.0).T
    return float((lost.square().sum(1) / x.double().square().sum(1)).sum())


@pytest.mark.parametrize("pattern", [Ratio(Fraction("0.5")), NofM(2, 4)], ids=str)
def test_ace_lowers_the_angle_of_all_that_leaves(pattern: Ratio | NofM) -> None:
    weight, x = layer(4, n_in=64)
    x[0] *= 50  # a massive token counts as one
    keep, better = refined(ACE(), weight, x, pattern)
    assert turn(weight, better, x) < 0.97 * turn(weight, keep, x)
    loud, loudly = refined(ACE(), weight, x * torch.linspace(0.5, 8, len(x))[:, None], pattern)
    assert torch.equal(loud, keep)
    assert torch.equal(loudly, better)


def test_ace_without_sweeps_is_its_score() -> None:
    weight, x = layer(5)
    keep, same = refined(ACE(sweeps=0), weight, x, NofM(2, 4))
    assert torch.equal(keep, same)
    assert not any(isinstance(statistic, Gram) for statistic in ACE(sweeps=0).needs())


def test_faults_of_ace() -> None:
    assert ACE().faults() == []
    assert len(ACE(sweeps=-1, shrinkage=float("nan")).faults()) == 2
