"""The engine against a slow, in-memory re-implementation of Wanda's loop on transformers' own model."""

from __future__ import annotations

import errno
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import edit, load, make, token_windows, weights
from torch import Tensor, nn

from ace_cli.core.errors import AceError
from ace_cli.core.timing import Clock
from ace_cli.methods.metrics.base import Metric
from ace_cli.methods.metrics.cosp import CosP, Mode
from ace_cli.methods.metrics.magnitude import Magnitude
from ace_cli.methods.metrics.wanda import Wanda
from ace_cli.methods.patterns import Scope, parse_sparsity
from ace_cli.methods.repair.none import NoRepair
from ace_cli.methods.repair.sparsegpt import SparseGPT
from ace_cli.methods.statistics import Gram, SecondMoment
from ace_cli.model import streamed
from ace_cli.model.files import Checkpoint, CheckpointWriter
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.engine import prune
from ace_cli.pruning.facts import BlockFacts
from ace_cli.pruning.recipe import Propagate, Recipe

WINDOWS = token_windows(6, 16)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Family -> a folder of three blocks, made once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            options = {} if family == "gemma3_text" else {"num_hidden_layers": 3}
            made[family] = make(tmp_path_factory.mktemp(family), family, **options)
        return made[family]

    return get


def run_engine(
    folder: Path, out: Path, metric: Metric, sparsity: str = "0.5", propagate: Propagate = Propagate.block
) -> tuple[dict[str, Tensor], list[BlockFacts]]:
    """Stored weights of the pruned slots, and the facts."""
    out.mkdir()
    model = StreamedModel(Checkpoint(folder), torch.device("cpu"), torch.float32)
    patterns = {slot.name: parse_sparsity(sparsity, Scope.row) for block in model.blocks for slot in block.slots}
    writer = CheckpointWriter(model.checkpoint, out)
    recipe = Recipe(metric, patterns, NoRepair(), propagate)
    facts = list(prune(model, list(model.batches(WINDOWS)), recipe, writer, Clock()))
    writer.finish()
    stored = weights(out)
    return {name: stored[name] for name in patterns}, facts


# --- the slow reference ----------------------------------------------------------------------------------------------


def linears_of(model: Any, block: str) -> dict[str, nn.Linear]:
    found = model.get_submodule(block).named_modules()
    return {f"{block}.{name}": module for name, module in found if isinstance(module, nn.Linear)}


def observe(model: Any, linears: dict[str, nn.Linear]) -> dict[str, Tensor]:
    """Run every window alone through the whole model; name -> sum of squared inputs, float64."""
    sums = {name: torch.zeros(linear.in_features, dtype=torch.float64) for name, linear in linears.items()}

    def hook(name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            sums[name] += args[0].reshape(-1, args[0].shape[-1]).double().square().sum(0)

        return add

    handles = [linear.register_forward_hook(hook(name)) for name, linear in linears.items()]
    with torch.inference_mode():
        for window in WINDOWS:
            model(window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return sums


def prune_linear(linear: nn.Linear, squares_I: Tensor, sparsity: str) -> None:
    """Wanda: per row, or per group of four, stable sort ascending, first half to zero."""
    with torch.no_grad():
        score_OI = linear.weight.double().abs() * squares_I.sqrt()
        flat = score_OI.reshape(-1, 4) if sparsity == "2:4" else score_OI
        order = flat.sort(dim=1, stable=True).indices[:, : flat.shape[1] // 2]
        pruned = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order, True)
        linear.weight[pruned.view_as(linear.weight)] = 0


def wanda_loop(folder: Path, sparsity: str, propagate: Propagate) -> dict[str, Tensor]:
    model = load(folder)
    blocks = [name for name, m in model.named_modules() if type(m).__name__ in (model._no_split_modules or ())]
    everything = {name: linear for block in blocks for name, linear in linears_of(model, block).items()}
    dense = observe(model, everything)
    for block in blocks:
        linears = linears_of(model, block)
        if propagate is Propagate.sublayer:
            for name in in_order_of_use(model, linears):
                prune_linear(linears[name], observe(model, {name: linears[name]})[name], sparsity)
            continue
        sums = dense if propagate is Propagate.dense else observe(model, linears)
        for name, linear in linears.items():
            prune_linear(linear, sums[name], sparsity)
    return {f"{name}.weight": linear.weight.detach() for name, linear in everything.items()}


def in_order_of_use(model: Any, linears: dict[str, nn.Linear]) -> list[str]:
    order: list[str] = []
    handles = [
        linear.register_forward_pre_hook(lambda module, args, name=name: order.append(name))
        for name, linear in linears.items()
    ]
    with torch.inference_mode():
        model(WINDOWS[:1], use_cache=False)
    for handle in handles:
        handle.remove()
    return order


def assert_same_choice(pruned: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal up to two pairs a matrix: one window at a time rounds differently, which may flip a near tie."""
    assert pruned.keys() == expected.keys()
    different = {name: int((weight != expected[name]).sum()) for name, weight in pruned.items()}
    assert max(different.values()) <= 4, different
    assert sum(different.values()) <= 12, different


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "sparsity"), [("llama", "0.5"), ("llama", "2:4"), ("gemma3_text", "0.5"), ("phi", "2:4")]
)
@pytest.mark.parametrize("propagate", Propagate)
def test_equals_the_slow_loop(model_of: Any, tmp_path: Path, family: str, propagate: Propagate, sparsity: str) -> None:
    pruned, _ = run_engine(model_of(family), tmp_path / "out", Wanda(), sparsity, propagate)
    assert_same_choice(pruned, wanda_loop(model_of(family), sparsity, propagate))


def test_what_is_propagated_matters(model_of: Any, tmp_path: Path) -> None:
    """Or the test above could not fail: later blocks see other inputs under each rule."""
    results = {
        propagate: run_engine(model_of("llama"), tmp_path / propagate.value, Wanda(), "0.5", propagate)[0]
        for propagate in Propagate
    }
    down, last = "model.layers.0.mlp.down_proj.weight", "model.layers.2.self_attn.q_proj.weight"
    assert torch.equal(results[Propagate.block][down], results[Propagate.dense][down])

    def differ(one: Propagate, other: Propagate, name: str) -> int:
        return int((results[one][name] != results[other][name]).sum())

    assert differ(Propagate.block, Propagate.dense, last) > 20
    assert differ(Propagate.block, Propagate.sublayer, down) > 20
    for weights_ in results.values():
        assert torch.equal(weights_[Q_PROJ], results[Propagate.block][Q_PROJ])


@pytest.mark.parametrize("propagate", Propagate)
@pytest.mark.parametrize("metric", [Wanda(), CosP(mode=Mode.exact2)], ids=lambda m: type(m).__name__)
def test_several_batches_choose_as_one(
    model_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, propagate: Propagate, metric: Metric
) -> None:
    """Batches of two and of four windows with a short last one."""
    once, _ = run_engine(model_of("llama"), tmp_path / "once", metric, "0.5", propagate)
    for tokens in (32, 64):
        monkeypatch.setattr(streamed, "BATCH_TOKENS", tokens)
        parts, facts = run_engine(model_of("llama"), tmp_path / str(tokens), metric, "0.5", propagate)
        assert all(slot.tokens == WINDOWS.numel() for block in facts for slot in block.slots)
        assert_same_choice(parts, once)


@pytest.mark.parametrize("propagate", Propagate)
def test_slots_that_read_one_tensor_share_its_statistics(
    model_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, propagate: Propagate
) -> None:
    """A Llama block has four different inputs: q/k/v, o, gate/up, down."""
    widths: list[int] = []
    update = SecondMoment.update

    def counting(self: SecondMoment, x_TI: Tensor, y_TO: Tensor, weight_OI: Tensor) -> None:
        widths.append(x_TI.shape[1])
        update(self, x_TI, y_TO, weight_OI)

    monkeypatch.setattr(SecondMoment, "update", counting)
    monkeypatch.setattr(streamed, "BATCH_TOKENS", 3 * 16)
    _, facts = run_engine(model_of("llama"), tmp_path / "out", Wanda(), propagate=propagate)
    batches, blocks = 2, 3
    assert sorted(widths) == sorted([64, 64, 64, 96] * batches * blocks)
    assert [len(block.slots) for block in facts] == [7, 7, 7]


def test_facts_name_what_is_stored(model_of: Any, tmp_path: Path) -> None:
    pruned, facts = run_engine(model_of("llama"), tmp_path / "out", Wanda(), "2:4")
    slots = [slot for block in facts for slot in block.slots]
    assert [block.index for block in facts] == [0, 1, 2]
    assert {slot.name for slot in slots} == pruned.keys()
    for slot in slots:
        assert int((pruned[slot.name] == 0).sum()) == pruned[slot.name].numel() // 2
        assert slot.shape == tuple(pruned[slot.name].shape)
        assert (slot.pattern, slot.tokens) == ("2:4", WINDOWS.numel())


def test_magnitude_needs_no_tokens(model_of: Any, tmp_path: Path) -> None:
    pruned, facts = run_engine(model_of("llama"), tmp_path / "out", Magnitude())
    dense = weights(model_of("llama"))
    for name, weight in pruned.items():
        order = dense[name].abs().sort(dim=1, stable=True).indices[:, : weight.shape[1] // 2]
        assert torch.equal(weight, dense[name].scatter(1, order, 0.0)), name
    assert all(slot.tokens == 0 for block in facts for slot in block.slots)


# --- faults ----------------------------------------------------------------------------------------------------------


def spoil(value: float, indices: Iterable[int] = (0,)) -> Any:
    def change(tensor: Tensor) -> Tensor:
        for index in indices:
            tensor.view(-1)[index] = value
        return tensor

    return change


@pytest.mark.parametrize("propagate", Propagate)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(
    own_llama: Path, tmp_path: Path, value: float, propagate: Propagate
) -> None:
    edit(own_llama, Q_PROJ, spoil(value))
    for metric in (Magnitude(), Wanda()):
        with pytest.raises(AceError, match="NaN or Inf") as caught:
            run_engine(own_llama, tmp_path / type(metric).__name__, metric, propagate=propagate)
        assert "layers.0" in str(caught.value)


@pytest.mark.parametrize("propagate", Propagate)
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.mlp.up_proj.weight",
    ],
)
def test_activations_that_overflow_are_refused(
    own_llama: Path, tmp_path: Path, name: str, propagate: Propagate
) -> None:
    """Finite weights, infinite products."""
    edit(own_llama, name, lambda tensor: tensor.sign() * 3e38)
    with pytest.raises(AceError, match="NaN or Inf"):
        run_engine(own_llama, tmp_path / "out", Wanda(), propagate=propagate)


def test_large_finite_weights_are_not_taken_for_infinite(own_llama: Path, tmp_path: Path) -> None:
    """Their float32 sum overflows; each of them is finite."""
    edit(own_llama, Q_PROJ, lambda tensor: tensor.abs().clamp(min=1e-3) * 1e38)
    pruned, _ = run_engine(own_llama, tmp_path / "out", Magnitude())
    assert int((pruned[Q_PROJ] == 0).sum()) == pruned[Q_PROJ].numel() // 2


def test_a_writer_that_fails_stops_the_engine(model_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing may happen in another thread: its error must arrive here, not vanish."""

    def full(self: CheckpointWriter, name: str, tensor: Tensor) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(CheckpointWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        run_engine(model_of("llama"), tmp_path / "out", Wanda())


@pytest.mark.parametrize("propagate", ["sublayer", "block"])
def test_statistics_of_a_pruned_slot_are_let_go_of(
    llama: Path, tmp_path: Path, prune_here: Any, monkeypatch: pytest.MonkeyPatch, propagate: str
) -> None:
    """A Gram matrix may be gigabytes: when the last slot of a block is repaired, no other's is in memory."""
    grams: weakref.WeakSet[Any] = weakref.WeakSet()
    alive: list[int] = []
    update, repair = Gram.update, SparseGPT.repair

    class Key:
        def __init__(self, gram: Gram) -> None:
            gram.key = self  # type: ignore[attr-defined]  # lives as long as the statistic

    def updated(self: Gram, *args: Any) -> None:
        if not hasattr(self, "key"):
            grams.add(Key(self))
        update(self, *args)

    def repaired(self: Any, *args: Any) -> Any:
        alive.append(len(grams))
        return repair(self, *args)

    monkeypatch.setattr(Gram, "update", updated)
    monkeypatch.setattr(SparseGPT, "repair", repaired)
    prune_here(llama, tmp_path / "out", "metric=wanda", "repair=sparsegpt", f"propagate={propagate}")
    first, second = alive[:9], alive[9:]
    assert len(second) == 9, "seven weights, of which two are repaired in two pieces"
    assert first[-1] == second[-1] == 1
    assert max(alive) == (1 if propagate == "sublayer" else 4), "q, k and v share one, as do gate and up"
