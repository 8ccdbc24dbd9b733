"""Every metric against slow float64 loops written from its formula (references.py)."""

from __future__ import annotations

from itertools import product

import pytest
import references
import torch
from torch import Tensor

from ace_cli.core import registry
from ace_cli.methods.metrics.ace import ACE, Combine
from ace_cli.methods.metrics.base import Metric
from ace_cli.methods.metrics.cosp import CosP, Mode
from ace_cli.methods.metrics.magnitude import Magnitude
from ace_cli.methods.metrics.ria import RIA
from ace_cli.methods.metrics.varp import Form, Norm, RIAVarP, VarP
from ace_cli.methods.metrics.wanda import Wanda
from ace_cli.methods.statistics import Seen

T, I, O = 13, 8, 5  # noqa: E741


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, Tensor, Tensor]:
    """Weights (O, I), inputs (T, I) with two outlier features and outputs with bias (T, O), float64."""
    generator = torch.Generator().manual_seed(3)
    weight_OI = torch.randn(O, I, generator=generator, dtype=torch.float64).float().double()
    x_TI = torch.randn(T, I, generator=generator, dtype=torch.float64) * 0.6
    x_TI[:, 2] *= 6
    x_TI[0] *= 9
    x_TI = x_TI.float().double()
    bias_O = torch.randn(O, generator=generator, dtype=torch.float64)
    return weight_OI, x_TI, x_TI @ weight_OI.T + bias_O


def score(metric: Metric, layer: tuple[Tensor, Tensor, Tensor], parts: int = 3) -> Tensor:
    """The metric's score from float32 inputs that arrive in several batches."""
    weight_OI, x_TI, y_TO = (tensor.float() for tensor in layer)
    seen = Seen(metric.needs())
    for statistic in seen:
        for x, y in zip(x_TI.tensor_split(parts), y_TO.tensor_split(parts), strict=True):
            statistic.update(x, y, weight_OI)
    before = weight_OI.clone()
    score_OI = metric.score(weight_OI, seen)
    assert torch.equal(weight_OI, before), "the weight was changed"
    assert score_OI.dtype == torch.float32
    assert score_OI.shape == (O, I)
    return score_OI


def assert_ranks_as(score_OI: Tensor, expected: list[list[float]], tolerance: float = 2e-5) -> None:
    """Equal up to one positive factor: sqrt(T) and its like rank nothing."""
    want_OI = torch.tensor(expected, dtype=torch.float64)
    got_OI = score_OI.double() * (want_OI.sum() / score_OI.double().sum())
    torch.testing.assert_close(got_OI, want_OI, rtol=tolerance, atol=0)


def test_magnitude(layer: tuple[Tensor, Tensor, Tensor]) -> None:
    assert_ranks_as(score(Magnitude(), layer), references.magnitude(layer[0].tolist()))


def test_wanda(layer: tuple[Tensor, Tensor, Tensor]) -> None:
    assert_ranks_as(score(Wanda(), layer), references.wanda(layer[0].tolist(), layer[1].tolist()))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_ria(layer: tuple[Tensor, Tensor, Tensor], alpha: float) -> None:
    expected = references.ria(layer[0].tolist(), layer[1].tolist(), alpha)
    assert_ranks_as(score(RIA(alpha=alpha), layer), expected)


def test_ria_of_zero_rows_and_columns_is_finite(layer: tuple[Tensor, Tensor, Tensor]) -> None:
    weight_OI = layer[0].clone()
    weight_OI[1] = 0
    weight_OI[:, 4] = 0
    damaged = (weight_OI, layer[1], layer[2])
    score_OI = score(RIA(), damaged)
    assert_ranks_as(score_OI[:1], references.ria(weight_OI.tolist(), layer[1].tolist(), 0.5)[:1])
    assert bool(score_OI.isfinite().all())
    assert not bool(score_OI[1].any())


@pytest.mark.parametrize(("norm", "form", "wpow"), list(product(Norm, Form, [1, 2])))
def test_varp(layer: tuple[Tensor, Tensor, Tensor], norm: Norm, form: Form, wpow: int) -> None:
    expected = references.varp(layer[0].tolist(), layer[1].tolist(), norm.value, form.value, wpow)
    score_OI = score(VarP(norm=norm, form=form, wpow=wpow), layer)
    torch.testing.assert_close(score_OI.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-5, atol=0)


def test_varp_of_equation_5_is_equations_1_to_3(layer: tuple[Tensor, Tensor, Tensor]) -> None:
    """S = |W| (E[x^4] + E[x^2] + 1), written directly."""
    weight_OI, x_TI, _ = layer
    expected_OI = weight_OI.abs() * ((x_TI**4).mean(0) + (x_TI**2).mean(0) + 1)
    torch.testing.assert_close(
        score(VarP(norm=Norm.raw, form=Form.poly), layer).double(), expected_OI, rtol=2e-5, atol=0
    )


def test_varp_survives_massive_activations(layer: tuple[Tensor, Tensor, Tensor]) -> None:
    """|x| = 3000 gives x^4 = 8e13 beside ordinary features."""
    weight_OI, x_TI, y_TO = layer
    massive_TI = x_TI.clone()
    massive_TI[0, 5] = 3000
    expected = references.varp(weight_OI.tolist(), massive_TI.tolist(), "raw", "poly")
    got_OI = score(VarP(norm=Norm.raw, form=Form.poly), (weight_OI, massive_TI, y_TO))
    torch.testing.assert_close(got_OI.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-5, atol=0)


@pytest.mark.parametrize(("norm", "form"), list(product(Norm, Form)))
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_ria_varp(layer: tuple[Tensor, Tensor, Tensor], norm: Norm, form: Form, alpha: float) -> None:
    expected = references.ria_varp(layer[0].tolist(), layer[1].tolist(), norm.value, form.value, alpha)
    assert_ranks_as(score(RIAVarP(norm=norm, form=form, alpha=alpha), layer), expected)


def test_spread_is_that_of_the_factor_that_multiplies(layer: tuple[Tensor, Tensor, Tensor]) -> None:
    x_TI = layer[1].float()
    seen = Seen((*RIAVarP().needs(), *RIA().needs()))
    for statistic in seen:
        statistic.update(x_TI, x_TI, x_TI)
    for metric in (RIAVarP, RIA):
        half, whole = (float(metric(alpha=alpha).diagnose(seen)["spread"]) for alpha in (0.5, 1.0))
        assert half == pytest.approx(whole**0.5)
        assert half > 1.5


@pytest.mark.parametrize("alpha", [-0.1, 5.0, float("nan")])
def test_a_power_out_of_range_is_named(alpha: float) -> None:
    assert "metric.alpha" in RIAVarP(alpha=alpha).faults()[0]


@pytest.mark.parametrize("mode", Mode)
def test_cosp(layer: tuple[Tensor, Tensor, Tensor], mode: Mode) -> None:
    expected = references.cosp(*(tensor.tolist() for tensor in layer), mode.value)
    assert_ranks_as(score(CosP(mode=mode), layer), expected, tolerance=1e-3 if mode is Mode.paper else 5e-5)


@pytest.mark.parametrize(("mode", "combine"), list(product(Mode, Combine)))
@pytest.mark.parametrize(
    ("norm", "form", "relative"),
    [(Norm.raw, Form.poly, False), (Norm.rms, Form.series, True), (Norm.share, Form.norms, True)],
)
def test_ace(
    layer: tuple[Tensor, Tensor, Tensor], mode: Mode, combine: Combine, norm: Norm, form: Form, relative: bool
) -> None:
    lists = (tensor.tolist() for tensor in layer)
    expected = references.ace(*lists, mode.value, combine.value, norm.value, form.value, relative)
    metric = ACE(mode=mode, norm=norm, form=form, combine=combine, relative=relative)
    assert_ranks_as(score(metric, layer), expected, tolerance=1e-3 if mode is Mode.paper else 5e-5)


def test_signed_cosine_terms_add_up_to_one(layer: tuple[Tensor, Tensor, Tensor]) -> None:
    """sum_ij W_ij E[a_i x_j / A] = 1 for a layer without bias."""
    weight_OI, x_TI, _ = (tensor.float() for tensor in layer)
    metric = CosP(mode=Mode.paper)
    seen = Seen(metric.needs())
    for statistic in seen:
        statistic.update(x_TI, x_TI @ weight_OI.T, weight_OI)
    term = next(statistic for statistic in seen if statistic.needs_output)
    total = (weight_OI * term.total_OI / term.tokens).sum()
    assert float(total) == pytest.approx(1, abs=1e-5)


def test_second_order_is_the_limit_of_the_exact_loss(layer: tuple[Tensor, Tensor, Tensor]) -> None:
    """For small weights 2 (1 - cos) = M2: the two scores differ by sqrt(2) and the third order."""
    weight_OI, x_TI, y_TO = layer
    small = (weight_OI * 1e-4, x_TI, y_TO)
    ratio_OI = score(CosP(mode=Mode.exact2), small) / score(CosP(mode=Mode.exact), small)
    torch.testing.assert_close(ratio_OI, torch.full_like(ratio_OI, 2**0.5), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", [name for name, cls in registry.choices("metric").items() if cls.weights])
def test_contract_of_every_registered_metric(layer: tuple[Tensor, Tensor, Tensor], name: str) -> None:
    """Finds new metrics by itself: finite, non-negative, deterministic, no zero weight above another."""
    metric = registry.choices("metric")[name]()
    assert metric.faults() == []
    weight_OI = layer[0].clone()
    weight_OI[2, 3] = 0
    layer = (weight_OI, layer[1], layer[2])
    score_OI = score(metric, layer)
    assert bool(score_OI.isfinite().all())
    assert bool((score_OI >= 0).all())
    assert torch.equal(score_OI, score(metric, layer))
    assert float(score_OI[2, 3]) == float(score_OI.min())
    assert all(
        isinstance(statistic, type(wanted))
        for statistic, wanted in zip(Seen(metric.needs()), metric.needs(), strict=False)
    )


@pytest.mark.parametrize(
    ("metric", "field"),
    [(RIA(alpha=-1), "alpha"), (RIA(alpha=99), "alpha"), (VarP(wpow=3), "wpow"), (VarP(wpow=0), "wpow")],
)
def test_knobs_out_of_range_are_faults(metric: Metric, field: str) -> None:
    (fault,) = metric.faults()
    assert f"metric.{field}=" in fault
