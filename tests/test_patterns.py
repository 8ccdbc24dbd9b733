"""Patterns against "sort ascending and stably, prune the first k", written out with Python's own stable sort."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import pytest
import torch

from ace_cli.core.errors import AceError
from ace_cli.kernels import selection
from ace_cli.kernels import threads as pieces
from ace_cli.methods import patterns
from ace_cli.methods.patterns import NofM, Ratio, Scope, parse_sparsity

RATIOS = ["0", "0.25", "0.29", "1/3", "0.5", "0.7", "0.99"]
GROUPS = [(1, 4), (2, 4), (3, 4), (4, 8), (3, 7), (7, 8), (16, 32), (1, 16)]


def random_scores(rows: int, columns: int) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows * columns))


#: What scores look like -> how to make them, (rows, columns).
SCORES = {
    "distinct": random_scores,
    "few values": lambda rows, columns: (random_scores(rows, columns) * 3).round(),
    "all equal": lambda rows, columns: torch.full((rows, columns), 0.7),
    "all zero": torch.zeros,
    "mostly zero": lambda rows, columns: random_scores(rows, columns) * (random_scores(rows, columns) > 0.8),
    "infinite": lambda rows, columns: torch.where(random_scores(rows, columns) > 0.6, torch.inf, 1.0),
    "ascending": lambda rows, columns: torch.arange(rows * columns).float().view(rows, columns),
    "descending": lambda rows, columns: -torch.arange(rows * columns).float().view(rows, columns),
}


def keep_by_sorting(scores: list[float], k: int) -> list[bool]:
    order = sorted(range(len(scores)), key=lambda index: scores[index])  # Python's sort is stable
    pruned = set(order[:k])
    return [index not in pruned for index in range(len(scores))]


def reference_ratio(score_OI: torch.Tensor, p: Fraction) -> torch.Tensor:
    return torch.tensor([keep_by_sorting(row, floor(len(row) * p)) for row in score_OI.tolist()])


def reference_groups(score_OI: torch.Tensor, n: int, m: int) -> torch.Tensor:
    groups = [keep_by_sorting(group, m - n) for group in score_OI.reshape(-1, m).tolist()]
    return torch.tensor(groups).view(score_OI.shape)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_ratio_by_row(kind: str, ratio: str) -> None:
    score_OI, pattern = SCORES[kind](7, 100), Ratio(Fraction(ratio))
    keep_OI = pattern.keep(score_OI)
    assert keep_OI.dtype == torch.bool
    assert torch.equal(keep_OI, reference_ratio(score_OI, pattern.p))
    assert int((~keep_OI).sum()) == pattern.pruned(7, 100)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_ratio_by_layer(kind: str, ratio: str) -> None:
    score_OI, pattern = SCORES[kind](9, 11), Ratio(Fraction(ratio), Scope.layer)
    keep_OI = pattern.keep(score_OI)
    assert torch.equal(keep_OI, reference_ratio(score_OI.reshape(1, -1), pattern.p).view(9, 11))
    assert int((~keep_OI).sum()) == pattern.pruned(9, 11)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(("n", "m"), GROUPS)
def test_n_of_m(kind: str, n: int, m: int) -> None:
    score_OI = SCORES[kind](5, 6 * m)
    keep_OI = NofM(n, m).keep(score_OI)
    assert torch.equal(keep_OI, reference_groups(score_OI, n, m))
    assert bool((keep_OI.reshape(-1, m).sum(1) == n).all())
    assert int((~keep_OI).sum()) == NofM(n, m).pruned(5, 6 * m)


@pytest.mark.parametrize("kind", ["distinct", "few values"])
@pytest.mark.parametrize("chunk", [1, 24, 25, 49, 10_000])
def test_row_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, kind: str, chunk: int) -> None:
    """24 columns: chunks of less than a row, one row, two rows and a bit, more than all."""
    for size in ("PIECE", "LARGEST_PIECE", "_LEAST_SHARED"):
        monkeypatch.setattr(pieces, size, chunk)
    score_OI = SCORES[kind](11, 24)
    assert torch.equal(Ratio(Fraction(1, 2)).keep(score_OI), reference_ratio(score_OI, Fraction(1, 2)))
    assert torch.equal(NofM(2, 4).keep(score_OI), reference_groups(score_OI, 2, 4))
    assert torch.equal(NofM(5, 12).keep(score_OI), reference_groups(score_OI, 5, 12))


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    score_OI = random_scores(101, 24)
    alone = [pattern.keep(score_OI) for pattern in (Ratio(Fraction(1, 3)), NofM(2, 4))]
    monkeypatch.setattr(pieces, "LARGEST_PIECE", 48)
    monkeypatch.setattr(pieces, "_LEAST_SHARED", 48)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together = [pattern.keep(score_OI) for pattern in (Ratio(Fraction(1, 3)), NofM(2, 4))]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("kind", SCORES)
def test_devices_choose_as_the_cpu_does(kind: str) -> None:
    """The same functions on torch tensors: what runs where the scores are not in a CPU's memory."""
    score_RN = SCORES[kind](7, 96)
    for k in (1, 29, 95):
        keep_RN = selection._without_smallest(score_RN, k)
        assert torch.equal(keep_RN, reference_ratio(score_RN, Fraction(k, 96)))
    for n, m in ((2, 4), (3, 8), (5, 12)):
        assert torch.equal(selection._beating_all_but(score_RN, n, m), reference_groups(score_RN, n, m))


def test_more_scores_than_one_chunk() -> None:
    """The real chunk size, with a last chunk of a single row and ties across its border."""
    columns = 1 << 14
    rows = pieces.LARGEST_PIECE // columns + 1
    score_OI = (random_scores(rows, columns) * 1000).round()
    keep_OI = Ratio(Fraction(1, 2)).keep(score_OI)
    order_OI = score_OI.sort(dim=1, stable=True).indices[:, : columns // 2]
    expected_OI = torch.ones_like(keep_OI).scatter_(1, order_OI, False)
    assert torch.equal(keep_OI, expected_OI)
    groups_GM = score_OI.reshape(-1, 4)
    order_GM = groups_GM.sort(dim=1, stable=True).indices[:, :2]
    expected_GM = torch.ones_like(groups_GM, dtype=torch.bool).scatter_(1, order_GM, False)
    assert torch.equal(NofM(2, 4).keep(score_OI), expected_GM.view_as(score_OI))


def test_scores_are_not_changed_and_need_not_be_contiguous() -> None:
    score_IO = random_scores(24, 10)
    before = score_IO.clone()
    for pattern in (Ratio(Fraction(1, 2)), Ratio(Fraction(1, 2), Scope.layer), NofM(2, 4), NofM(5, 12)):
        assert torch.equal(pattern.keep(score_IO.T), pattern.keep(score_IO.T.contiguous()))
    assert torch.equal(score_IO, before)


def test_exact_counts_where_floats_fail() -> None:
    """int(100 * 0.29) is 28 in floats."""
    pattern = parse_sparsity("0.29", Scope.row)
    assert pattern.pruned(3, 100) == 87
    assert int((~pattern.keep(random_scores(3, 100))).sum()) == 87


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5", Ratio(Fraction(1, 2))),
        (0.5, Ratio(Fraction(1, 2))),
        ("50%", Ratio(Fraction(1, 2))),
        ("12.5%", Ratio(Fraction(1, 8))),
        (0, Ratio(Fraction(0))),
        (" 0.29 ", Ratio(Fraction(29, 100))),
        ("2:4", NofM(2, 4)),
        ("1:4", NofM(1, 4)),
        ("16:32", NofM(16, 32)),
    ],
)
def test_parse_good(text: object, expected: object) -> None:
    assert parse_sparsity(text, Scope.row) == expected


def test_parse_keeps_the_scope() -> None:
    assert parse_sparsity("0.5", Scope.layer) == Ratio(Fraction(1, 2), Scope.layer)


@pytest.mark.parametrize(
    "text",
    ["1", "1.0", "100%", "-0.1", "1.5", "4:2", "0:4", "4:4", "0:0", "two", "", "nan", "inf", "1/0", "2:", None, True],
)
def test_parse_bad_names_the_value(text: object) -> None:
    with pytest.raises(AceError, match="sparsity=") as caught:
        parse_sparsity(text, Scope.row)
    assert "2:4" in str(caught.value)


@pytest.mark.parametrize(("arrives", "meant"), [(124, "2:4"), (248, "4:8"), (64, "1:4"), (992, "16:32"), (187, "3:7")])
def test_parse_explains_base_60(arrives: int, meant: str) -> None:
    with pytest.raises(AceError) as caught:
        parse_sparsity(arrives, Scope.row)
    assert f'"{meant}"' in str(caught.value)
    assert "YAML" in str(caught.value)


def test_misfit_names_the_columns() -> None:
    assert NofM(2, 4).misfit(8, 12) is None
    assert "10 inputs" in (NofM(2, 4).misfit(8, 10) or "")
    assert Ratio(Fraction(1, 2)).misfit(3, 7) is None


@pytest.mark.parametrize(
    "pattern", [Ratio(Fraction(1, 2)), Ratio(Fraction(1, 2), Scope.layer), NofM(2, 4), NofM(1, 4), NofM(3, 8)], ids=repr
)
def test_violation_sees_one_weight_too_many(pattern: patterns.Pattern) -> None:
    weight_OI = random_scores(6, 16) + 0.1
    weight_OI[~pattern.keep(weight_OI)] = 0
    assert pattern.check(weight_OI)[1] is None
    row, column = [int(i) for i in (weight_OI == 0).nonzero()[-1]]
    weight_OI[row, column] = 0.5
    problem = pattern.check(weight_OI)[1]
    assert problem is not None
    assert "non-zeros" in problem
    if pattern != Ratio(Fraction(1, 2), Scope.layer):
        assert f"row {row}" in problem


def test_violation_allows_more_zeros_than_asked_for() -> None:
    for pattern in (Ratio(Fraction(1, 2)), NofM(2, 4)):
        assert pattern.check(torch.zeros(4, 8))[1] is None


def test_violation_names_the_group() -> None:
    weight_OI = torch.zeros(3, 12)
    weight_OI[1, 4:7] = 1
    assert NofM(2, 4).check(weight_OI)[1] == "row 1, inputs 4 to 7 have 3 non-zeros, 2 allowed"


@pytest.mark.parametrize(("n", "m"), [(16, 32), (128, 256), (256, 512)])
def test_violation_counts_in_groups_of_any_size(n: int, m: int) -> None:
    assert NofM(n, m).check(torch.ones(2, m))[1] == f"row 0, inputs 0 to {m - 1} have {m} non-zeros, {n} allowed"
