"""Accumulators: any split of the tokens gives the same answer; equal wishes share one state."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ace_cli.core.workers import Workers
from ace_cli.methods.gradients import Backward, Gates, Gradient, Salience
from ace_cli.methods.statistics import (
    SHARED_TOKENS,
    CosineTerm,
    Gram,
    Lag,
    Mean,
    SecondMoment,
    Seen,
    ShareMoments,
    Size,
    SquareMoments,
    Statistic,
    TokenSquares,
    accumulated,
)
from ace_cli.pruning.diagnostics import Activations

TOKENS = 24
SPLITS = [[24], [1] * 24, [12, 12], [1, 23], [23, 1], [5, 7, 11, 1], [8, 8, 8]]
KINDS = [
    Mean(), SecondMoment(), Size(), SquareMoments(), ShareMoments(), TokenSquares(), Gram(), Gram(unit_tokens=True),
    Lag(), Activations(most=11),
    *(CosineTerm(kind) for kind in ("signed", "absolute", "second", "token", "exact")),
    Gradient(), Gradient(power=2), Salience(), Gates(),
]  # fmt: skip
#: All but those that count windows: of these a split between tokens is another set of windows.
OF_TOKENS = [kind for kind in KINDS if not isinstance(kind, Backward)]


def data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_TI, weight_OI = torch.randn(TOKENS, 6, generator=generator), torch.randn(4, 6, generator=generator)
    return x_TI, x_TI @ weight_OI.T + 0.3, weight_OI


def observed(kind: Statistic, split: list[int], x_TI: Tensor, y_TO: Tensor, weight_OI: Tensor) -> Statistic:
    statistic = Seen([kind])[kind]
    y_TO = x_TI.square() if kind.needs_dense else y_TO
    for x, y in zip(x_TI.split(split), y_TO.split(split), strict=True):
        statistic.update(x, y, weight_OI)
    return statistic


def results(statistic: Statistic) -> dict[str, Tensor]:
    """Every tensor that a metric can read."""
    if isinstance(statistic, TokenSquares | Activations):
        return {"inputs_TI": torch.cat(statistic._chunks_TI)}
    found = {name: torch.cat(value) if isinstance(value, list) else value for name, value in vars(statistic).items()}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("kind", OF_TOKENS, ids=repr)
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_any_split_gives_the_same(kind: Statistic, split: list[int]) -> None:
    once, parts = observed(kind, [TOKENS], *data()), observed(kind, split, *data())
    assert once.tokens == parts.tokens == getattr(kind, "most", TOKENS)
    assert results(once).keys() == results(parts).keys() != set()
    for name, value in results(once).items():
        torch.testing.assert_close(results(parts)[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", OF_TOKENS, ids=repr)
def test_any_split_gives_the_same_with_tokens_of_no_output(kind: Statistic) -> None:
    """Outputs of exactly zero and of almost zero: no split may decide whether they count."""
    x_TI, y_TO, weight_OI = data()
    x_TI, y_TO = x_TI.clone(), y_TO.clone()
    x_TI[3], y_TO[3] = 0, 0
    x_TI[4:6], y_TO[4:6] = x_TI[4:6] * 1e-6, y_TO[4:6] * 1e-6
    once = observed(kind, [TOKENS], x_TI, y_TO, weight_OI)
    for split in ([4, 2, 18], [1] * 24):
        parts = observed(kind, split, x_TI, y_TO, weight_OI)
        for name, value in results(once).items():
            torch.testing.assert_close(results(parts)[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if isinstance(kind, CosineTerm)], ids=repr)
def test_a_token_whose_output_cancelled_adds_nothing(kind: CosineTerm) -> None:
    x_TI, y_TO, weight_OI = data()
    y_TO[3], y_TO[7] = 0, 1e-9
    others = [t for t in range(TOKENS) if t not in (3, 7)]
    found = observed(kind, [TOKENS], x_TI, y_TO, weight_OI)
    without = observed(kind, [len(others)], x_TI[others], y_TO[others], weight_OI)
    assert isinstance(found, CosineTerm)
    assert isinstance(without, CosineTerm)
    assert found.total_OI is not None
    torch.testing.assert_close(found.total_OI, without.total_OI, rtol=1e-5, atol=1e-7)


def test_second_moment_and_square_moments() -> None:
    x_TI, y_TO, weight_OI = data()
    moment = observed(SecondMoment(), [10, 14], x_TI, y_TO, weight_OI)
    squares = observed(SquareMoments(), [10, 14], x_TI, y_TO, weight_OI)
    assert isinstance(moment, SecondMoment)
    assert isinstance(squares, SquareMoments)
    exact_TI = x_TI.double()
    torch.testing.assert_close(moment.total_I, exact_TI.square().sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(moment.mean_I, exact_TI.square().mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(squares.first_I, exact_TI.square().sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(squares.second_I, (exact_TI**4).sum(0), rtol=1e-6, atol=0)
    assert float(squares.largest) == pytest.approx(float(exact_TI.abs().max()) ** 2, rel=1e-6)
    assert int(squares.above_one) == sum(abs(value) >= 1 for row in x_TI.tolist() for value in row)


@pytest.mark.parametrize("inputs", [127, 300])
def test_a_gram_matrix_in_parts_is_symmetric_and_whole(inputs: int) -> None:
    x_TI = torch.randn(50, inputs, generator=torch.Generator().manual_seed(1))
    gram = observed(Gram(), [20, 30], x_TI, torch.empty(50, 1), torch.empty(1, inputs))
    assert isinstance(gram, Gram)
    torch.testing.assert_close(gram.total_II, gram.total_II.T, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gram.total_II, x_TI.T @ x_TI, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["gram", "lag", "second", "absolute", "exact"])
def test_workers_compute_parts_that_are_the_bits_of_the_whole(kind: str) -> None:
    tokens, outputs, inputs = SHARED_TOKENS, 1100, {"exact": 3, "lag": 1100}.get(kind, 300)
    generator = torch.Generator().manual_seed(1)
    x_TI, weight_OI = (
        torch.randn(tokens, inputs, generator=generator),
        torch.randn(outputs, inputs, generator=generator),
    )

    def total(rank: int, size: int) -> torch.Tensor:
        statistic = copy.copy({"gram": Gram(), "lag": Lag()}.get(kind) or CosineTerm(kind))
        statistic.share_with(Workers(rank, size))
        statistic.update(x_TI, x_TI.roll(1, 0) if kind == "lag" else x_TI @ weight_OI.T, weight_OI)
        if isinstance(statistic, CosineTerm):
            return statistic.total_OI
        return statistic.total_II.triu() if isinstance(statistic, Gram) else statistic.total_II

    whole, parts = total(0, 1), [total(rank, 3) for rank in range(3)]
    assert all(bool((part == 0).any()) for part in parts)
    assert all(torch.equal(part[part != 0], whole[part != 0]) for part in parts)
    covered = torch.stack([part != 0 for part in parts])
    assert bool((covered.any(0) == (whole != 0)).all())
    assert float(covered.float().mean()) < 0.7 * float((whole != 0).float().mean())


def test_few_tokens_are_not_shared() -> None:
    x_TI = torch.randn(20, 300)
    gram = Gram()
    gram.share_with(Workers(1, 2))
    gram.update(x_TI, x_TI, x_TI)
    gram.gather()
    torch.testing.assert_close(gram.total_II, x_TI.T @ x_TI, rtol=1e-5, atol=1e-4)


def test_gram() -> None:
    x_TI, y_TO, weight_OI = data()
    gram = observed(Gram(), [7, 17], x_TI, y_TO, weight_OI)
    assert isinstance(gram, Gram)
    torch.testing.assert_close(gram.total_II.double(), x_TI.double().T @ x_TI.double(), rtol=1e-5, atol=1e-5)


def test_long_sums_keep_small_tokens() -> None:
    """A massive token first, then many ordinary ones that float32 would lose."""
    massive, ordinary = torch.full((1, 1), 1e5), torch.ones(100, 1)
    statistic = Seen([SecondMoment()])[SecondMoment()]
    for x in (massive, *([ordinary] * 50)):
        statistic.update(x, x, x)
    assert float(statistic.total_I) == 1e10 + 5000


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_later_updates_do_not_change_the_caller_s_tensors(kind: Statistic) -> None:
    x_TI, y_TO, weight_OI = data()
    copies = x_TI.clone(), y_TO.clone(), weight_OI.clone()
    observed(kind, [12, 12], x_TI, y_TO, weight_OI)
    assert all(torch.equal(a, b) for a, b in zip((x_TI, y_TO, weight_OI), copies, strict=True))


def test_equal_wishes_are_one_statistic() -> None:
    assert len(list(Seen([SecondMoment(), SecondMoment(), CosineTerm("second"), CosineTerm("second")]))) == 2
    assert len(list(Seen([CosineTerm("second"), CosineTerm("token")]))) == 2


def test_states_of_two_slots_are_apart_until_shared() -> None:
    wanted = (SecondMoment(), CosineTerm("second"))
    first, second = Seen(wanted), Seen(wanted)
    x_TI, y_TO, weight_OI = data()
    first[SecondMoment()].update(x_TI, y_TO, weight_OI)
    assert second[SecondMoment()].tokens == 0
    second.share(first)
    assert second[SecondMoment()] is first[SecondMoment()]
    assert second[CosineTerm("second")] is not first[CosineTerm("second")]


def test_every_statistic_is_tested() -> None:
    def below(kind: type) -> set[type]:
        return {kind, *(each for child in kind.__subclasses__() for each in below(child))}

    of_the_package = {kind for kind in below(Statistic) if kind.__module__.startswith("ace_cli")}
    assert {type(kind) for kind in KINDS} == of_the_package - {Statistic, Backward}


@pytest.mark.parametrize("kind", OF_TOKENS, ids=repr)
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_workers_that_share_the_tokens_see_together_what_one_sees(kind: Statistic, split: list[int]) -> None:
    x_TI, y_TO, weight_OI = data()
    once, together = observed(kind, [TOKENS], x_TI, y_TO, weight_OI), Seen([kind])[kind]
    for x, y in zip(x_TI.split(split), y_TO.split(split), strict=True):
        worker = observed(kind, [len(x)], x, y, weight_OI)
        before = {name: value.clone() for name, value in results(worker).items()}
        together.merge(worker)
        together.merge(Seen([kind])[kind])  # one that saw nothing
        for name, value in before.items():
            assert torch.equal(results(worker)[name], value), "the worker's own numbers were changed"
    assert together.tokens == once.tokens
    for name, value in results(once).items():
        torch.testing.assert_close(results(together)[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if isinstance(kind, Backward)], ids=repr)
def test_workers_that_share_the_windows_see_together_what_one_sees(kind: Backward) -> None:
    x_TI, d_TO, weight_OI = data()
    once, together = observed(kind, [8, 8, 8], x_TI, d_TO, weight_OI), Seen([kind])[kind]
    for part in (slice(0, 8), slice(8, 24)):
        size = part.stop - part.start
        together.merge(observed(kind, [8] * (size // 8), x_TI[part], d_TO[part], weight_OI))
    for name, value in results(once).items():
        torch.testing.assert_close(results(together)[name], value)


def test_other_kinds_and_options_are_not_merged() -> None:
    for one, other in ((SecondMoment(), Gram()), (Gram(), Gram(unit_tokens=True))):
        with pytest.raises(TypeError, match="cannot be merged"):
            one.merge(other)


def test_what_was_factored_of_fewer_tokens_is_forgotten() -> None:
    gram, later = observed(Gram(), [TOKENS], *data()), observed(Gram(), [TOKENS], *data(1))
    for add in (lambda: gram.merge(later), lambda: gram.update(*data(2))):
        gram.factors = "of fewer tokens"
        add()
        assert gram.factors is None


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_declared_axes_have_the_lengths_of_their_letters(kind: Statistic) -> None:
    statistic = observed(kind, [TOKENS], *data())
    lengths = {"I": {6}, "O": {1, 4}, "B": {1}, "T": {TOKENS, getattr(kind, "most", TOKENS)}}
    axes = statistic._axes()
    assert axes
    for name, letters in axes.items():
        value = vars(statistic)[name]
        shape = torch.cat(value).shape if isinstance(value, list) else value.shape
        assert len(shape) == len(letters), name
        assert all(length in lengths[letter] for length, letter in zip(shape, letters, strict=True)), name


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_reordered_is_what_reordered_inputs_give(kind: Statistic) -> None:
    x_TI, y_TO, weight_OI = data()
    order_I = torch.tensor([3, 0, 5, 1, 4, 2])
    found = observed(kind, [10, 14], x_TI, y_TO, weight_OI).reordered(order_I)
    expected = observed(kind, [10, 14], x_TI[:, order_I], y_TO, weight_OI[:, order_I])
    for name, value in results(expected).items():
        torch.testing.assert_close(results(found)[name], value, rtol=1e-5, atol=1e-6)


def test_names_of_fields_mean_nothing() -> None:
    """What is summed under any name is reordered by its declaration; what is not declared is refused."""

    @dataclass(unsafe_hash=True)
    class Odd(Statistic):
        sizes_by_input: Tensor = accumulated("I")

        def update(self, x_TI: Tensor, y_TO: Tensor, weight_OI: Tensor) -> None:
            self.add(len(x_TI), sizes_by_input=x_TI.abs().sum(0))

    odd = Seen([Odd()])[Odd()]
    odd.update(*data())
    order_I = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(odd.reordered(order_I).sizes_by_input, odd.sizes_by_input[order_I])
    odd.more_I = odd.sizes_by_input  # type: ignore[attr-defined]
    for act in (lambda: odd.reordered(order_I), lambda: Seen([Odd()])[Odd()].merge(odd)):
        with pytest.raises(TypeError, match="more_I holds a tensor"):
            act()
