"""Statistics of gradients, and the metrics that read them, against what autograd and slow loops say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from faults import stopped_before
from tiny_models import load, make, token_windows
from torch import Tensor

from ace_cli.core.errors import AceError
from ace_cli.methods.allocation.global_ranking import GlobalRanking
from ace_cli.methods.gradients import Backward, Gates, Gradient, Salience, Source
from ace_cli.methods.metrics.llm_pruner import Form, LLMPruner
from ace_cli.methods.metrics.pruner_zero import PrunerZero
from ace_cli.methods.metrics.saap import SAAP, Fuse, Select
from ace_cli.methods.metrics.sobp import SoBP
from ace_cli.methods.statistics import Seen
from ace_cli.methods.units import Units
from ace_cli.model.files import Checkpoint
from ace_cli.model.pruned import verify
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.gradients import gradients_of, model_bytes, model_gradients
from ace_cli.run import checks

CPU = torch.device("cpu")
IDS = token_windows(3, 8)
WANTED = (Gradient(), Gradient(power=2), Salience(), Gates())


def of_model(wanted: tuple[Backward, ...]) -> tuple[Backward, ...]:
    return tuple(type(each)(**{**vars(each), "source": Source.model}) for each in wanted)


def windows_of(seen: Seen, wanted: tuple[Backward, ...], gradients: list[Tensor], weight_OI: Tensor) -> None:
    """``seen`` holds what the ``gradients`` of the windows add up to."""
    first, second, salience, gates = wanted
    s = [weight_OI * g - (weight_OI * g).square() / 2 for g in gradients]
    expected = {
        first: {"total_OI": sum(gradients)},
        second: {"total_OI": sum(g.square() for g in gradients)},
        salience: {
            "rows_BO": torch.stack([each.sum(1).abs() for each in s]),
            "columns_BI": torch.stack([each.sum(0).abs() for each in s]),
            "row_parts_BO": torch.stack([each.abs().sum(1) for each in s]),
            "column_parts_BI": torch.stack([each.abs().sum(0) for each in s]),
        },
        gates: {"gates_BI": torch.stack([(weight_OI * g).sum(0) for g in gradients])},
    }
    for statistic, values in expected.items():
        for name, value in values.items():
            found = vars(seen[statistic])[name]
            found = torch.cat(found) if isinstance(found, list) else found
            torch.testing.assert_close(found.double(), value, rtol=2e-3, atol=1e-6 * float(value.abs().max()))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
def test_of_a_block_they_are_those_of_its_drawn_error(family: str, tmp_path: Path) -> None:
    model = StreamedModel(Checkpoint(make(tmp_path / "dense", family)), CPU, torch.float32)
    batches = list(model.batches(IDS))
    with model.loaded(model.blocks[0]), torch.no_grad():
        seen = gradients_of(model, 0, batches, WANTED, {})
        slots = model.blocks[0].layers
        assert set(seen) == {slot.name for slot in slots}
        out_BLH = model.forward(0, batches[0])
        signs = torch.randint(2, out_BLH.shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        parameters = {slot.name: getattr(slot.module, slot.leaf) for slot in slots}
        gradients: dict[str, list[Tensor]] = {name: [] for name in parameters}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for window in range(len(IDS)):
            with torch.enable_grad():
                made_BLH = model.forward(0, batches[0])
                y, s = out_BLH[window], signs[window]
                error = made_BLH[window] - y + s * y.norm(dim=-1, keepdim=True)
                loss = (error.square().sum(-1) / y.square().sum(-1) / 2).sum()
                found = torch.autograd.grad(loss, list(parameters.values()))
            for slot, gradient in zip(slots, found, strict=True):
                gradients[slot.name].append(slot.in_module(gradient).double())
        for slot in slots:
            windows_of(seen[slot.name], WANTED, gradients[slot.name], slot.weight_OI.detach().double())


def test_of_the_model_they_are_those_of_its_loss(llama: Path) -> None:
    model = StreamedModel(Checkpoint(llama), CPU, torch.float32)
    wanted = of_model(WANTED)
    seen = model_gradients(model, IDS, wanted)
    assert model_bytes(model, WANTED, 8) == 0
    assert model_bytes(model, wanted, 8) > 4 * sum(p.numel() for p in model.skeleton.parameters())
    whole = load(llama)
    gradients: dict[str, list[Tensor]] = {name: [] for name in seen}
    for ids_1L in IDS[:, None]:
        whole.zero_grad()
        whole(ids_1L, labels=ids_1L).loss.backward()
        for name in seen:
            gradients[name].append(whole.get_parameter(name).grad.double().clone())
    assert len(seen) == 14
    for name, each in seen.items():
        windows_of(each, wanted, gradients[name], whole.get_parameter(name).detach().double())


# --- metrics ---------------------------------------------------------------------------------------------------------


def windows(outputs: int, inputs: int, count: int = 4, seed: int = 0) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """A weight, and of each window the inputs and the gradient of the outputs."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    pairs = [
        (torch.randn(5, inputs, generator=generator), torch.randn(5, outputs, generator=generator) * (1 + window))
        for window in range(count)
    ]
    return weight_OI, pairs


def shown(wanted: Any, weight_OI: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Seen:
    seen = Seen(wanted)
    for statistic in seen:
        for x_LI, d_LO in pairs:
            statistic.update(x_LI, d_LO, weight_OI)
    return seen


def slow_gradients(pairs: list[tuple[Tensor, Tensor]]) -> list[list[list[float]]]:
    """g_ij of every window, in loops."""
    return [
        [[sum(float(d[t, i]) * float(x[t, j]) for t in range(5)) for j in range(x.shape[1])] for i in range(d.shape[1])]
        for x, d in pairs
    ]


def test_pruner_zero_is_its_tree() -> None:
    weight_OI, pairs = windows(3, 6)
    g = slow_gradients(pairs)
    G = [[sum((100 * each[i][j]) ** 2 for each in g) ** 0.5 for j in range(6)] for i in range(3)]
    low, high = min(map(min, G)), max(map(max, G))
    expected = [[abs(float(weight_OI[i, j])) ** 2 * (G[i][j] - low) / (high - low) for j in range(6)] for i in range(3)]
    metric = PrunerZero()
    found_OI = metric.score(weight_OI, shown(metric.needs(), weight_OI, pairs))
    torch.testing.assert_close(found_OI.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-6)


def test_pruner_zero_of_equal_gradients_counts_squares() -> None:
    weight_OI, metric = torch.tensor([[1.0, -2.0]]), PrunerZero()
    seen = shown(metric.needs(), weight_OI, [(torch.ones(2, 2), torch.ones(2, 1))])
    assert metric.score(weight_OI, seen).tolist() == [[1.0, 4.0]]


UNITS = 4


def coupled(wanted: Any) -> tuple[Tensor, Tensor, Seen, Units, list[Any], list[Any]]:
    """A weight that reads four channels and one that makes them, its rows in another order."""
    (down_OI, into), (up_IH, out) = windows(3, UNITS), windows(UNITS, 5, seed=1)
    rows_I = torch.tensor([2, 0, 3, 1])
    seen, made = shown(wanted, down_OI, into), shown(wanted, up_IH, out)
    units = Units(torch.arange(UNITS).view(1, -1, 1), lambda: [up_IH[rows_I]], lambda: [(made, rows_I)])
    down, up = slow_gradients(into), slow_gradients(out)
    return down_OI, up_IH[rows_I], seen, units, down, [[each[row] for row in rows_I.tolist()] for each in up]


def vectors(unit: int, down_OI: Tensor, up_IH: Tensor, g_down: Any, g_up: Any) -> list[list[tuple[float, Any]]]:
    """The weights of a unit's vectors, each with its gradients."""
    column = [(float(down_OI[i, unit]), [g[i][unit] for g in g_down]) for i in range(3)]
    row = [(float(up_IH[unit, j]), [g[unit][j] for g in g_up]) for j in range(5)]
    return [column, row]


@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("form", Form)
def test_llm_pruner_is_its_expansion(form: Form, vector: bool) -> None:
    metric = LLMPruner(form=form, vector=vector, source=Source.model)
    down_OI, up_IH, seen, units, g_down, g_up = coupled(metric.needs())
    expected = []
    for unit in range(UNITS):
        total = 0.0
        for members in vectors(unit, down_OI, up_IH, g_down, g_up):
            s = []
            for w, g in members:
                mean, square = sum(g) / 4, sum(each**2 for each in g) / 4
                s.append(
                    {"first": w * mean, "second": w * w * square, "mix": w * mean - w * w * square / 2}[form.value]
                )
            total += abs(sum(s)) if vector else sum(map(abs, s))
        expected.append(total)
    assert metric.score_units(down_OI, seen, units).tolist() == pytest.approx(expected, rel=1e-4)
    fault = LLMPruner(form=form).faults()
    assert bool(fault) is (form is not Form.second)


@pytest.mark.parametrize("select", Select)
@pytest.mark.parametrize("fuse", Fuse)
def test_saap_is_its_readings(fuse: Fuse, select: Select) -> None:
    metric = SAAP(fuse=fuse, select=select)
    down_OI, up_IH, seen, units, g_down, g_up = coupled(metric.needs())
    whole, parts = ([[0.0] * UNITS for _ in range(4)] for _ in range(2))
    for unit in range(UNITS):
        for members in vectors(unit, down_OI, up_IH, g_down, g_up):
            for b in range(4):
                s = [w * g[b] - w * w * g[b] ** 2 / 2 for w, g in members]
                whole[b][unit] += abs(sum(s))
                parts[b][unit] += sum(map(abs, s))
    mean_v, mean_e = (sum(map(sum, each)) / (4 * UNITS) for each in (whole, parts))
    fused = [
        [
            (v / mean_v + e / mean_e) / 2 if fuse is Fuse.group else (v * e) ** 0.5
            for v, e in zip(whole[b], parts[b], strict=True)
        ]
        for b in range(4)
    ]
    mean = [sum(fused[b][u] for b in range(4)) / 4 for u in range(UNITS)]
    spread = [(sum((fused[b][u] - mean[u]) ** 2 for b in range(4)) / 4) ** 0.5 / mean[u] for u in range(UNITS)]
    middle = sum(spread) / UNITS
    deviation = (sum((each - middle) ** 2 for each in spread) / UNITS) ** 0.5
    asi = [(each - middle) / deviation for each in spread]
    rank = [sum(other < each for other in mean) for each in mean]
    steady = [sum(other > each for other in asi) for each in asi]
    expected = {
        Select.importance: mean,
        Select.asi: [max(asi) - each for each in asi],
        Select.rank_sum: [a + b + a / (2 * UNITS) for a, b in zip(rank, steady, strict=True)],
    }
    assert metric.score_units(down_OI, seen, units).tolist() == pytest.approx(expected[select], rel=1e-3, abs=1e-6)


def test_sobp_is_the_mean_squared_gate_and_ranks_all_blocks_together() -> None:
    weight_OI, pairs = windows(3, 6)
    units = Units(torch.arange(6).view(1, 3, 2))
    expected = [
        sum(sum(float(weight_OI[i, j]) * g[i][j] for i in range(3) for j in (2 * u, 2 * u + 1)) ** 2 for g in grads) / 4
        for u, grads in enumerate([slow_gradients(pairs)] * 3)
    ]
    metric, rule = SoBP(), GlobalRanking()
    found = metric.score_units(weight_OI, shown(metric.needs(), weight_OI, pairs), units)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    scores = [rule.measure_units(torch.tensor(each)) for each in ([0.0, 1, 2, 3], [5.0, 6, 7, 8])]
    assert rule.shares(0.5, [4, 4], scores, 0.99) == pytest.approx([0.9, 0.1])  # all of the first, but for its tenth
    assert rule.shares(0.25, [4, 4], scores, 0.99) == pytest.approx([0.5, 0.0])


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ("metric=pruner_zero", "sparsity=2:4"),
        ("metric=pruner_zero", "metric.source=model", "repair=swaps"),
        ("unit=channel", "unit.multiple=8", "metric=saap", "unit.uneven=true", "allocation=flap"),
        ("unit=channel", "unit.multiple=8", "metric=llm_pruner", "metric.source=model", "metric.form=mix"),
        ("unit=channel", "unit.multiple=8", "metric=sobp", "repair=obs", "unit.uneven=true", "allocation=global"),
        ("unit=head", "metric=sobp", "repair=obs"),
        ("unit=head", "metric=saap", "repair=none", "propagate=dense"),
    ],
)
def test_runs_with_gradients(options: tuple[str, ...], llama: Path, tmp_path: Path, prune_here: Any) -> None:
    report = prune_here(llama, tmp_path / "run", "calib.seq_len=8", *options)
    assert report.sparsity.achieved > 0.1
    assert verify(tmp_path / "run" / "checkpoint") >= 2


@pytest.mark.parametrize("source", Source)
def test_killed_and_continued_gives_the_same_bytes(
    source: Source, llama: Path, tmp_path: Path, prune_here: Any
) -> None:
    options = ("metric=pruner_zero", f"metric.source={source.value}", "calib.seq_len=8")
    prune_here(llama, tmp_path / "whole", *options)
    with stopped_before(".1.mlp.up_proj"):
        prune_here(llama, tmp_path / "killed", *options)
    prune_here(llama, tmp_path / "killed", *options)
    one, other = (tmp_path / each / "checkpoint" / "model.safetensors" for each in ("whole", "killed"))
    assert one.read_bytes() == other.read_bytes()


def test_what_cannot_be_is_refused_before_work(
    llama: Path, tmp_path: Path, prune_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("calib.seq_len=8", "metric=pruner_zero")
    with monkeypatch.context() as patch, pytest.raises(AceError, match=r"=model needs 9000.0 GB .* Use metric.source"):
        patch.setattr(checks, "model_bytes", lambda *_: 9 * 10**12)
        prune_here(llama, tmp_path / "one", *few, "metric.source=model")
    experts = make(tmp_path / "dense", "qwen3_moe")
    with pytest.raises(AceError, match="gradients of single experts"):
        prune_here(experts, tmp_path / "three", *few)
