"""Channel permutation: what may be reordered is found, what is gained is RIA's, the function stays."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from grids import pairs
from scipy.optimize import linear_sum_assignment
from tiny_models import DENSE, load, make, token_windows, weights
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ace_cli.core.timing import Clock
from ace_cli.methods.metrics.base import Metric
from ace_cli.methods.metrics.cosp import CosP
from ace_cli.methods.metrics.magnitude import Magnitude
from ace_cli.methods.metrics.ria import RIA
from ace_cli.methods.metrics.varp import VarP
from ace_cli.methods.metrics.wanda import Wanda
from ace_cli.methods.patterns import NofM, Pattern, Ratio
from ace_cli.methods.repair.none import NoRepair
from ace_cli.model import streamed
from ace_cli.model.files import Checkpoint, CheckpointWriter
from ace_cli.model.links import Link, LinkFinder, Producer, reorder
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning import input_orders, permutation
from ace_cli.pruning.engine import prune, replay
from ace_cli.pruning.permutation import assign, best_order, kept_score, serpentine
from ace_cli.pruning.recipe import Propagate, Recipe

WINDOWS = token_windows(6, 16)
CPU, FLOAT = torch.device("cpu"), torch.float32


# --- the search ------------------------------------------------------------------------------------------------------


def scores(rows: int, columns: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    """Positive, with strong and weak columns, as scores of real weights are."""
    generator = torch.Generator().manual_seed(seed)
    strength_I = (spread * torch.randn(columns, generator=generator)).exp().sort().values
    return torch.rand(rows, columns, generator=generator) * strength_I


def whole(columns: int) -> Tensor:
    return torch.arange(columns).view(1, columns, 1)


def slow_kept(score_OI: Tensor, order: list[int], n: int, m: int) -> float:
    rows = score_OI.double().tolist()
    groups = [order[g : g + m] for g in range(0, len(order), m)]
    return sum(sum(sorted((row[j] for j in group), reverse=True)[:n]) for row in rows for group in groups)


def slow_ria(score_OI: Tensor, n: int, m: int) -> list[int]:
    """Both steps as methods.md 4 has them, P[g, c] summed out."""
    rows = score_OI.double().tolist()
    ranked = sorted(range(score_OI.shape[1]), key=lambda j: sum(row[j] for row in rows))
    count = len(ranked) // m
    chunks = [ranked[q * count : (q + 1) * count] for q in range(m)]
    groups = [[chunks[q][-1 - g if q % 2 else g] for q in range(m)] for g in range(count)]
    for q in range(m):
        candidates = [group[q] for group in groups]
        table = [
            [slow_kept(score_OI, [*group[:q], *group[q + 1 :], candidate], n, m) for candidate in candidates]
            for group in groups
        ]
        for group, chosen in zip(groups, linear_sum_assignment(table, maximize=True)[1], strict=True):
            group[q] = candidates[chosen]
    return [j for group in groups for j in group]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2), (3, 5)])
def test_is_ria_as_written_down_slowly(n: int, m: int) -> None:
    # columns alike enough that each counts in some row: the best assignment is unique
    score_OI, pattern = scores(24, 6 * m, m + n, spread=0.2), NofM(n, m)
    expected = slow_ria(score_OI, n, m)
    order_W = serpentine(score_OI.sum(0, dtype=torch.float64), m)
    assert assign(score_OI.T.contiguous(), order_W, pattern).tolist() == expected
    assert kept_score(score_OI[:, expected], pattern) == pytest.approx(slow_kept(score_OI, expected, n, m), rel=1e-6)
    if slow_kept(score_OI, order_W.tolist(), n, m) >= slow_kept(score_OI, list(range(6 * m)), n, m):
        assert best_order(score_OI, whole(6 * m), pattern).tolist() == expected


@pytest.mark.parametrize("seed", range(8))
def test_lies_between_the_identity_and_the_best_of_all(seed: int) -> None:
    score_OI, pattern = scores(3, 8, seed), NofM(2, 4)
    best = max(slow_kept(score_OI, list(order), 2, 4) for order in permutations(range(8)) if order[0] == 0)
    found = kept_score(score_OI[:, best_order(score_OI, whole(8), pattern, sweeps=9)], pattern)
    assert kept_score(score_OI, pattern) <= found <= best * (1 + 1e-6)
    assert found >= 0.97 * best


@pytest.mark.parametrize("part", [3, 1000])
@pytest.mark.parametrize("sweeps", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_never_keeps_less(monkeypatch: pytest.MonkeyPatch, seed: int, sweeps: int, part: int) -> None:
    monkeypatch.setattr(permutation, "PART", part)
    score_OI, pattern = scores(16, 64, seed), NofM(2, 4)
    order_I = best_order(score_OI, whole(64), pattern, sweeps)
    assert order_I.sort().values.tolist() == list(range(64))
    assert kept_score(score_OI[:, order_I], pattern) > 1.02 * kept_score(score_OI, pattern)
    again_I = best_order(score_OI[:, order_I], whole(64), pattern, sweeps)  # what is good is not spoilt
    assert kept_score(score_OI[:, order_I][:, again_I], pattern) >= kept_score(score_OI[:, order_I], pattern)
    assert torch.equal(order_I, best_order(score_OI.clone(), whole(64), pattern, sweeps))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_scores_stay_where_they_are(value: float) -> None:
    assert best_order(torch.full((4, 16), value), whole(16), NofM(2, 4)).tolist() == list(range(16))


def test_tied_inputs_stay_tied_inside_their_region() -> None:
    """Two key-value heads of eight, each read by three query heads."""
    channels_RWC = torch.arange(2 * 3 * 8).view(2, 3, 8).transpose(1, 2)
    score_OI, pattern = scores(10, 48)[:, torch.randperm(48, generator=torch.Generator().manual_seed(1))], NofM(2, 4)
    order_I = best_order(score_OI, channels_RWC, pattern)
    for head in order_I.view(2, 3, 8):
        assert torch.equal(head % 8, (head[0] % 8).expand(3, 8))
    assert torch.equal(order_I.div(8, rounding_mode="floor"), torch.arange(6).repeat_interleave(8))
    assert kept_score(score_OI[:, order_I], pattern) > kept_score(score_OI, pattern)


def test_a_link_says_why_it_does_not_fit() -> None:
    heads = Link("o", (), torch.arange(24).view(2, 2, 6).transpose(1, 2))
    assert heads.misfit(NofM(1, 2)) is None
    assert "6" in str(heads.misfit(NofM(2, 4)))
    scattered = Link("o", (), torch.arange(16).view(8, 2).T.reshape(2, 8, 1))
    assert "one after the other" in str(scattered.misfit(NofM(2, 4)))


# --- finding links ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Family and options -> a folder, made once."""
    made: dict[str, Path] = {}

    def get(family: str, **options: Any) -> Path:
        key = f"{family} {options}"
        if key not in made:
            made[key] = make(tmp_path_factory.mktemp(family), family, **{"num_hidden_layers": 3, **options})
        return made[key]

    return get


def streamed_model(folder: Path, dtype: torch.dtype = FLOAT) -> StreamedModel:
    return StreamedModel(Checkpoint(folder), CPU, dtype)


def links_of(model: StreamedModel, index: int = 0) -> list[Link]:
    finder = LinkFinder(model)
    with torch.inference_mode(), model.loaded(model.blocks[index]):
        return finder.links(index)


#: (regions, width, copies) of the attention's link; the other link spans the multilayer perceptron.
MULTI_HEAD = {"opt", "opt_350m", "gpt_neox", "bloom", "gptj", "mpt", "gpt2"}
ATTENTION = {**dict.fromkeys(DENSE, (2, 16, 2)), **dict.fromkeys(MULTI_HEAD, (4, 16, 1)), "falcon": (1, 16, 4)}


@pytest.mark.parametrize("family", DENSE)
def test_both_links_of_every_family_are_found(model_of: Any, family: str) -> None:
    attention, mlp = links_of(streamed_model(model_of(family)))
    assert tuple(attention.channels_RWC.shape) == ATTENTION[family]
    width = mlp.channels_RWC.numel()
    assert tuple(mlp.channels_RWC.shape) == (1, width, 1)
    assert width in (96, 128, 256)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"self_attn.o_proj": ["self_attn.v_proj"], "mlp.down_proj": ["mlp.gate_proj", "mlp.up_proj"]}),
        ("opt", {"self_attn.out_proj": ["self_attn.v_proj"], "fc2": ["fc1"]}),
        ("phi3", {"self_attn.o_proj": ["self_attn.qkv_proj"], "mlp.down_proj": ["mlp.gate_up_proj"] * 2}),
        ("gpt_neox", {
            "attention.dense": ["attention.query_key_value"], "mlp.dense_4h_to_h": ["mlp.dense_h_to_4h"],
        }),
    ],
)  # fmt: skip
@pytest.mark.parametrize("index", [0, 2])
def test_producers_are_the_right_ones(model_of: Any, family: str, expected: dict[str, list[str]], index: int) -> None:
    links = links_of(streamed_model(model_of(family)), index)
    assert {link.consumer: [producer.slot for producer in link.producers] for link in links} == expected


def test_rows_of_fused_slots(model_of: Any) -> None:
    """phi3: q (64), k (32), v (32 rows) and gate, up (96 each) one after the other; gpt_neox: q, k, v by head."""
    attention, mlp = links_of(streamed_model(model_of("phi3")))
    of_head = torch.tensor([96, 96, 112, 112]).repeat_interleave(16) + torch.arange(16).repeat(4)
    assert torch.equal(attention.producers[0].rows_I, of_head)
    assert [producer.rows_I.tolist() for producer in mlp.producers] == [[*range(96)], [*range(96, 192)]]
    attention, _ = links_of(streamed_model(model_of("gpt_neox")))
    assert torch.equal(attention.producers[0].rows_I, torch.cat([48 * h + 32 + torch.arange(16) for h in range(4)]))


@pytest.mark.parametrize("heads", [(8, 1), (8, 2), (8, 8)])
def test_every_way_to_share_heads(model_of: Any, heads: tuple[int, int]) -> None:
    folder = model_of("llama", num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=8)
    assert tuple(links_of(streamed_model(folder))[0].channels_RWC.shape) == (heads[1], 8, heads[0] // heads[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_links_are_found_in_half_precision(model_of: Any, dtype: torch.dtype) -> None:
    for family in ("llama", "gemma2", "phi3", "opt"):
        assert len(links_of(streamed_model(model_of(family), dtype))) == 2


def test_widths_that_happen_to_be_equal_mislead_nobody(model_of: Any) -> None:
    """Every slot of this Llama is 64 by 64."""
    folder = model_of("llama", intermediate_size=64, num_key_value_heads=4)
    links = links_of(streamed_model(folder))
    assert {link.consumer: {p.slot for p in link.producers} for link in links} == {
        "self_attn.o_proj": {"self_attn.v_proj"}, "mlp.down_proj": {"mlp.gate_proj", "mlp.up_proj"},
    }  # fmt: skip


class Wrong(nn.Module):
    """Stands in the way: not the same for every channel."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.function(x)
        return y * torch.linspace(0.5, 1.5, y.shape[-1])


def test_a_block_that_treats_channels_differently_has_no_link(model_of: Any) -> None:
    model = streamed_model(model_of("llama"))
    for block in model.blocks:
        block.module.mlp.act_fn = Wrong(block.module.mlp.act_fn)
    assert [link.consumer for link in links_of(model)] == ["self_attn.o_proj"]


@pytest.mark.parametrize("wrong", ["producer missing", "heads mixed", "other rows"])
def test_a_wrong_link_is_not_proven(model_of: Any, wrong: str) -> None:
    """A link learnt from one block is checked with the weights of each."""
    model = streamed_model(model_of("llama"))
    finder = LinkFinder(model)
    with torch.inference_mode():
        with model.loaded(model.blocks[0]):
            attention, mlp = finder.links(0)
        gate, up = mlp.producers
        up = Producer(up.slot, up.rows_I.flip(0))
        bad = {
            "producer missing": Link(mlp.consumer, mlp.producers[:1], mlp.channels_RWC),
            "heads mixed": Link(attention.consumer, attention.producers, attention.channels_RWC.reshape(1, 32, 2)),
            "other rows": Link(mlp.consumer, (gate, up), mlp.channels_RWC),
        }[wrong]
        finder._known = {kind: [bad, mlp] for kind in finder._known}
        with model.loaded(model.blocks[1]):
            assert finder.links(1) == [mlp]


def test_looking_leaves_the_block_as_it_was(model_of: Any) -> None:
    model = streamed_model(model_of("opt"))
    finder = LinkFinder(model)
    with torch.inference_mode(), model.loaded(model.blocks[0]):
        before = {name: value.clone() for name, value in model.blocks[0].module.state_dict().items()}
        finder.links(0)
        after = model.blocks[0].module.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert all("forward" not in vars(slot.module) for slot in model.blocks[0].slots)


# --- applying it -----------------------------------------------------------------------------------------------------


def some_order(link: Link, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    order_I = torch.arange(link.channels_RWC.numel())
    for channels_WC in link.channels_RWC:
        order_I[channels_WC] = channels_WC[torch.randperm(len(channels_WC), generator=generator)]
    return order_I


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "opt", "phi3", "gpt_neox", "falcon", "qwen2", "starcoder2", "bloom", "gpt2"]
)
def test_the_function_is_preserved(model_of: Any, family: str) -> None:
    """Biases included: the tiny models' are not zero."""
    model = streamed_model(model_of(family))
    batch = next(iter([*model.batches(WINDOWS)]))
    finder = LinkFinder(model)
    with torch.inference_mode(), model.loaded(model.blocks[0]):
        links, before = finder.links(0), model.forward(0, batch)
        old = {name: value.clone() for name, value in model.blocks[0].module.state_dict().items()}
        for link in links:
            changed = reorder(model.blocks[0], link, some_order(link, 1))
            for name, order_O in changed.items():
                axis = int(family == "gpt2" and old[name].dim() == 2)  # stored (I, O)
                expected = old[name].index_select(axis, order_O)
                assert torch.equal(model.blocks[0].module.state_dict()[name], expected)
        assert any(not torch.equal(old[name], value) for name, value in model.blocks[0].module.state_dict().items())
        torch.testing.assert_close(model.forward(0, batch), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


# --- in the engine ---------------------------------------------------------------------------------------------------


def run_engine(
    folder: Path, out: Path, metric: Metric, pattern: Pattern, propagate: Propagate, permuted: bool = True,
    dtype: torch.dtype = FLOAT,
) -> tuple[dict[str, Tensor], list[Tensor], list[dict[str, float]]]:  # fmt: skip
    """Stored tensors, the hidden states after every block, what each slot's diagnosis says."""
    out.mkdir()
    model = streamed_model(folder, dtype)
    patterns = {slot.name: pattern for block in model.blocks for slot in block.slots}
    writer = CheckpointWriter(model.checkpoint, out)
    recipe = Recipe(metric, patterns, NoRepair(), propagate, permuted)
    batches = list(model.batches(WINDOWS))
    hidden, facts = [], []
    for block in prune(model, batches, recipe, writer, Clock()):
        hidden.append(torch.cat([batch.hidden_BLH for batch in batches]).clone())
        facts += [slot.diagnosis for slot in block.slots]
    writer.finish()
    for file in folder.glob("*.json"):
        if "index" not in file.name:
            (out / file.name).write_text(file.read_text())
    stored = weights(out)
    for slot in (slot for block in model.blocks for slot in block.slots):
        assert pattern.check(slot.in_file(stored[slot.key]))[1] is None, slot.name
    return stored, hidden, facts


@pytest.mark.parametrize("family", ["llama", "opt", "phi3", "gpt_neox", "gemma2", "gpt2"])
def test_logits_are_those_of_the_masked_model(
    model_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Magnitude, 2:4, orders chosen here: the masks laid back into the old order give the same logits."""
    orders: list[Tensor] = []

    def choose(score_OI: Tensor, channels_RWC: Tensor, pattern: NofM) -> Tensor:
        orders.append(some_order(Link("", (), channels_RWC), len(orders)))
        return orders[-1]

    monkeypatch.setattr(input_orders, "best_order", choose)
    folder, pattern = model_of(family), NofM(2, 4)
    run_engine(folder, tmp_path / "out", Magnitude(), pattern, Propagate.block)
    reference, plain = load(folder), load(folder)
    left = iter(orders)
    model = streamed_model(folder)
    for index, block in enumerate(model.blocks):
        consumers = [link.consumer for link in links_of(model, index)]
        for name, module in reference.get_submodule(block.name).named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                weight_OI = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
                order_I = next(left) if name in consumers else torch.arange(weight_OI.shape[1])
                keep_OI = torch.zeros_like(weight_OI, dtype=torch.bool)
                keep_OI[:, order_I] = pattern.keep(weight_OI.abs()[:, order_I])
                weight_OI.masked_fill_(~keep_OI, 0)
    assert len(orders) == 6
    assert next(left, None) is None
    written = load(tmp_path / "out")
    with torch.inference_mode():
        logits, expected, dense = (model_(WINDOWS).logits for model_ in (written, reference, plain))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert float((dense - expected).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("metric", "propagate", "tokens"), pairs([Wanda(), CosP(), VarP()], list(Propagate), [32, 4096]), ids=str
)
def test_what_goes_on_is_what_is_written(
    model_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: Metric, propagate: Propagate, tokens: int
) -> None:
    """The hidden states of the run are those of the written blocks, so an interrupted run continues the same."""
    monkeypatch.setattr(streamed, "BATCH_TOKENS", tokens)
    folder = model_of("phi3")
    _, hidden, facts = run_engine(folder, tmp_path / "out", metric, NofM(2, 4), propagate)
    assert sum("permutation_gain" in diagnosis for diagnosis in facts) == 6
    assert all(diagnosis.get("permutation_gain", 1) > 0 for diagnosis in facts)
    model = streamed_model(folder)
    model = model if propagate is Propagate.dense else model.reading(Checkpoint(tmp_path / "out", bare=True))
    for blocks in (1, 2):
        batches = list(model.batches(WINDOWS))
        replay(model, batches, blocks, Clock())
        again = torch.cat([batch.hidden_BLH for batch in batches])
        torch.testing.assert_close(again, hidden[blocks - 1], rtol=1e-5, atol=1e-5 * float(again.abs().max()))


def test_runs_are_repeatable_and_nothing_changes_without_it(model_of: Any, tmp_path: Path) -> None:
    def stored(name: str, permuted: bool, pattern: Pattern = NofM(2, 4)) -> dict[str, Tensor]:  # noqa: B008
        return run_engine(model_of("llama"), tmp_path / name, RIA(), pattern, Propagate.sublayer, permuted)[0]

    def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
        return all(torch.equal(one[name], other[name]) for name in one)

    assert same(stored("a", True), stored("b", True))
    assert not same(stored("c", False), stored("d", True))
    half = Ratio(Fraction(1, 2))
    assert same(stored("e", False, half), stored("f", True, half))  # a ratio has no groups to fill


def test_in_bfloat16_the_stored_digits_are_kept(model_of: Any, tmp_path: Path) -> None:
    """Computed in bfloat16, stored in float32: what is written is a reordering of the file's own numbers."""
    folder = model_of("opt")
    stored, _, _ = run_engine(folder, tmp_path / "out", Wanda(), NofM(2, 4), Propagate.sublayer, dtype=torch.bfloat16)
    old = weights(folder)
    assert stored.keys() == old.keys()
    moved = 0
    for name, tensor in stored.items():
        assert tensor.dtype == old[name].dtype
        assert set(tensor.flatten().tolist()) <= {0.0, *old[name].flatten().tolist()}
        moved += "bias" in name and not torch.equal(tensor, old[name])
    assert moved == 6  # v_proj's and fc1's biases
