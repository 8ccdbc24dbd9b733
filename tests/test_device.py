"""What is asked of a CUDA device, by what torch is called with: there need be none."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch

from ace_cli.core import registry
from ace_cli.core.device import brought_back, choose_device
from ace_cli.core.errors import AceError
from ace_cli.methods.metrics.base import Metric
from ace_cli.methods.patterns import NofM, Pattern, Ratio, Scope
from ace_cli.methods.repair.exchange import descend
from ace_cli.methods.row_pruning import masked
from ace_cli.methods.statistics import Gram, Seen
from ace_cli.run.checks import memory_budget


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Torch sees two GPUs; the devices that were made the current one."""
    current: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.parametrize(("name", "index"), [("cuda", 0), ("cuda:1", 1)])
def test_the_chosen_gpu_is_the_current_one(two_gpus: list[Any], name: str, index: int) -> None:
    """Or pinned memory and whatever says cuda alone would go to the first one."""
    assert choose_device(name) == torch.device(name)
    assert two_gpus == [index]


class Far(torch.Tensor):
    """On the CPU, but says otherwise."""

    is_cuda = True  # type: ignore[assignment]


def test_what_comes_back_from_a_gpu_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[bool] = []
    waited: list[torch.device] = []
    empty = torch.empty

    def allocate(*shape: Any, pin_memory: bool, **options: Any) -> torch.Tensor:
        pinned.append(pin_memory)
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.bfloat16)}
    back = brought_back({name: weight.as_subclass(Far) for name, weight in weights.items()})
    assert (pinned, len(waited)) == ([True, True], 1)
    assert all(torch.equal(back[name], weights[name]) and back[name].dtype == weights[name].dtype for name in weights)


def test_a_gpu_that_is_not_there_is_refused(two_gpus: list[Any]) -> None:
    with pytest.raises(AceError, match="2 CUDA devices"):
        choose_device("cuda:2")
    assert not two_gpus


def test_what_torch_keeps_for_itself_on_a_gpu_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later job of a sweep finds torch's cache full of the last one's blocks: that is not another program's."""
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (10_000, 80_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: asked.append(device) or 30_000)
    device = torch.device("cuda:1")
    assert memory_budget(None, device) == pytest.approx(0.9 * 40_000)
    assert asked == [device, device]
    assert memory_budget(2.0, device) == 2e9


# --- on the meta device: an operation on tensors of two devices is refused there, too, without a GPU ------------------

WIDE, ROWS, TOKENS = 32, 8, 12
#: Those that score single weights; sparsegpt's factors are looked at.
SCORES = [
    name
    for name, metric in registry.choices("metric").items()
    if name != "sparsegpt" and {metric.score, metric.scores_of_rows} != {Metric.score, Metric.scores_of_rows}
]


@pytest.fixture
def elsewhere() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight (O, I), inputs (T, I) and outputs (T, O) that are on a device, but hold nothing."""
    shapes = ((ROWS, WIDE), (TOKENS, WIDE), (TOKENS, ROWS))
    weight_OI, x_TI, y_TO = (torch.empty(shape, device="meta") for shape in shapes)
    return weight_OI, x_TI, y_TO


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_made_where_the_weights_are(name: str, elsewhere: Any) -> None:
    metric = registry.choices("metric")[name]()
    weight_OI, x_TI, y_TO = elsewhere
    seen = Seen(metric.needs())
    for statistic in seen:
        for _ in range(2):
            statistic.update(x_TI, y_TO, weight_OI)
    order_I = torch.arange(WIDE)  # on the CPU: where an order is made
    for state in (seen, seen.reordered(order_I)):
        assert metric.score(weight_OI, state).is_meta


@pytest.mark.parametrize(
    "pattern", [Ratio(Fraction(1, 2)), Ratio(Fraction(1, 2), Scope.layer), NofM(2, 4), NofM(8, 32)]
)
def test_masks_are_chosen_where_the_scores_are(pattern: Pattern, elsewhere: Any) -> None:
    keep_OI = pattern.keep(elsewhere[0])
    assert keep_OI.is_meta
    assert masked(elsewhere[0], keep_OI, torch.bfloat16).is_meta


@pytest.mark.parametrize("width", [0, 4])
def test_masks_are_exchanged_where_they_are(width: int, elsewhere: Any) -> None:
    matrix_II = torch.empty(WIDE, WIDE, device="meta")
    assert descend(elsewhere[0], elsewhere[0] > 0, matrix_II, width, 2).is_meta


def test_merged_statistics_stay_where_they_are(elsewhere: Any) -> None:
    one, other = Gram(), Gram()
    for gram in (one, other):
        gram.update(elsewhere[1], elsewhere[2], elsewhere[0])
    one.merge(other)
    assert one.total_II.is_meta
