"""Experts that no module shows, against each family's own formulas written out, and what may be chosen about them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grids import pairs
from tiny_models import add_tokenizer, load, make, token_windows, weights
from torch import Tensor, nn
from torch.nn.functional import silu

from ace_cli.core.errors import AceError
from ace_cli.core.timing import Clock
from ace_cli.methods.metrics.base import Metric
from ace_cli.methods.metrics.cosp import CosP
from ace_cli.methods.metrics.wanda import Wanda
from ace_cli.methods.patterns import NofM
from ace_cli.methods.repair.none import NoRepair
from ace_cli.methods.statistics import SecondMoment, Statistic
from ace_cli.model import slots as slots_module
from ace_cli.model import streamed
from ace_cli.model.files import Checkpoint, CheckpointWriter
from ace_cli.model.pruned import verify
from ace_cli.model.slots import SlotFilter
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.engine import prune
from ace_cli.pruning.facts import SlotFacts
from ace_cli.pruning.recipe import Propagate, Recipe

WINDOWS = token_windows(8, 16)
EXPERTS_ALONE = SlotFilter(exclude=("*attn*",))


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


def open_model(
    folder: Path, selection: SlotFilter = EXPERTS_ALONE, dtype: torch.dtype = torch.float32
) -> StreamedModel:
    return StreamedModel(Checkpoint(folder), torch.device("cpu"), dtype, selection)


def run_engine(
    folder: Path,
    out: Path,
    propagate: Propagate = Propagate.sublayer,
    metric: Metric | None = None,
    selection: SlotFilter = EXPERTS_ALONE,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[dict[str, Tensor], dict[str, SlotFacts]]:
    """Pruned slots, (O, I), and what is told of them."""
    out.mkdir()
    model = open_model(folder, selection, dtype)
    slots = [slot for block in model.blocks for slot in block.slots]
    writer = CheckpointWriter(model.checkpoint, out)
    patterns = {slot.name: NofM(2, 4) for slot in slots}
    recipe = Recipe(metric or Wanda(), patterns, NoRepair(), propagate, **options)
    facts = list(prune(model, list(model.batches(WINDOWS)), recipe, writer, Clock()))
    writer.finish()
    stored = weights(out)
    pruned = {slot.name: slot.in_file(stored[slot.key]) for slot in slots}
    return pruned, {fact.name: fact for block in facts for fact in block.slots}


# --- the slow reference: the formulas of three layouts ---------------------------------------------------------------


def mixtral(up_OI: Tensor, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
    gate_TI, up_TI = (x_TI @ up_OI.T).chunk(2, dim=1)
    return silu(gate_TI) * up_TI


def gpt_oss(up_OI: Tensor, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
    both = x_TI @ up_OI.T + bias_O
    gate, up = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


FORMULA = {"mixtral": mixtral, "qwen3_moe": mixtral, "gpt_oss": gpt_oss, "llama4_text": mixtral}


def seen_by_experts(folder: Path, everyone: bool) -> tuple[nn.Module, list[Tensor]]:
    """The first layer of experts of the dense model, and the tokens (T, H) of each of its experts."""
    model, seen = load(folder), []
    layer = next(m for m in model.modules() if getattr(m, "down_proj", None) is not None and m.down_proj.dim() == 3)

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        count = len(layer.down_proj)
        for expert in range(count):
            if len(args) == 3:
                chosen_T = (args[1] == expert).any(1) | everyone
                seen.append(args[0][chosen_T])
            else:
                rows = args[0].view(count, -1, args[0].shape[1])
                rows = rows.flatten(0, 1) if everyone else rows[expert]
                seen.append(rows[rows.abs().sum(1) > 0])

    handle = layer.register_forward_pre_hook(note)
    with torch.inference_mode():
        model(WINDOWS, use_cache=False)
    handle.remove()
    return layer, seen


def wanda(weight_OI: Tensor, x_TI: Tensor) -> Tensor:
    score_GM = (weight_OI.double().abs() * x_TI.double().square().sum(0).sqrt()).reshape(-1, 4)
    weakest_GM = score_GM.sort(dim=1, stable=True).indices[:, :2]
    return weight_OI.reshape(-1, 4).scatter(1, weakest_GM, 0.0).view_as(weight_OI)


def slow_experts(folder: Path, family: str, propagate: Propagate, everyone: bool) -> list[tuple[Tensor, Tensor]]:
    """Of each expert of the first layer: pruned gate and up (2I, H), pruned down (H, I)."""
    layer, seen = seen_by_experts(folder, everyone)
    turned, pruned = family in ("gpt_oss", "llama4_text"), []
    for expert, x_TH in enumerate(seen):
        up, down = layer.gate_up_proj[expert].detach(), layer.down_proj[expert].detach()
        up, down = (up.T, down.T) if turned else (up, down)
        bias = layer.gate_up_proj_bias[expert].detach() if family == "gpt_oss" else None
        new_up = wanda(up, x_TH)
        leading = new_up if propagate is Propagate.sublayer else up
        pruned.append((new_up, wanda(down, FORMULA[family](leading, x_TH, bias))))
    return pruned


def first_layer(pruned: dict[str, Tensor], expert: int) -> tuple[Tensor, Tensor]:
    """The same from what the engine pruned, whatever the names in the files."""
    names = [name for name in pruned if ".layers.0." in name and f".{expert}." in f"{name}.".partition("experts")[2]]
    mine = [pruned[name] for name in names]
    assert len(mine) in (2, 3)
    *up, down = mine
    return torch.cat(up), down


@pytest.mark.parametrize(
    ("family", "propagate", "everyone"), pairs(list(FORMULA), [Propagate.sublayer, Propagate.block], [False, True])
)
def test_each_expert_is_pruned_by_what_it_sees(
    model_of: Any, tmp_path: Path, family: str, propagate: Propagate, everyone: bool
) -> None:
    pruned, facts = run_engine(model_of(family), tmp_path / "out", propagate, all_experts=everyone)
    expected = slow_experts(model_of(family), family, propagate, everyone)
    for expert, (up, down) in enumerate(expected):
        got_up, got_down = first_layer(pruned, expert)
        assert int((got_up != up).sum()) <= 4, f"expert {expert}"
        assert int((got_down != down).sum()) <= 4, f"expert {expert}"
    if family != "llama4_text":
        _, seen = seen_by_experts(model_of(family), False)
        first = [fact for name, fact in facts.items() if ".layers.0." in name]
        assert {fact.routed for fact in first} == {len(x) for x in seen}
        assert all(fact.tokens == (WINDOWS.numel() if everyone else fact.routed) for fact in first)


def test_what_an_expert_sees_matters(model_of: Any, tmp_path: Path) -> None:
    """Or the test above could not fail."""
    routed, _ = run_engine(model_of("mixtral"), tmp_path / "routed")
    everyone, _ = run_engine(model_of("mixtral"), tmp_path / "all", all_experts=True)
    assert all(int((routed[name] != everyone[name]).sum()) > 20 for name in routed)


@pytest.mark.parametrize(
    ("family", "metric", "propagate"),
    pairs(["mixtral", "gpt_oss", "llama4_text"], [Wanda(), CosP()], list(Propagate)), ids=str,
)  # fmt: skip
def test_several_batches_choose_as_one(
    model_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, metric: Metric, propagate: Propagate
) -> None:
    """With attention and shared experts pruned, too."""
    once, _ = run_engine(model_of(family), tmp_path / "once", propagate, metric, SlotFilter())
    monkeypatch.setattr(streamed, "BATCH_TOKENS", 48)
    parts, facts = run_engine(model_of(family), tmp_path / "parts", propagate, metric, SlotFilter())
    assert all(fact.tokens == (fact.routed or WINDOWS.numel()) for fact in facts.values())
    different = sum(int((once[name] != parts[name]).sum()) for name in once)
    assert different <= 0.01 * sum(weight.numel() for weight in once.values())


def test_an_expert_with_few_tokens_is_observed_on_all(model_of: Any, tmp_path: Path) -> None:
    _, plain = run_engine(model_of("mixtral"), tmp_path / "plain")
    counts = sorted({fact.routed for fact in plain.values() if ".layers.0." in fact.name if fact.routed is not None})
    least = counts[1]
    _, facts = run_engine(model_of("mixtral"), tmp_path / "out", min_tokens=least)
    first = [fact for name, fact in facts.items() if ".layers.0." in name]
    assert {fact.tokens for fact in first if fact.routed == counts[0]} == {WINDOWS.numel()}
    assert all(fact.tokens == fact.routed for fact in first if fact.routed != counts[0])


def test_statistics_of_one_expert_are_held_at_a_time(model_of: Any, tmp_path: Path) -> None:
    """Gram matrices of all experts together would be larger than the model."""
    alive: list[int] = []
    living: set[int] = set()

    class Counted(SecondMoment):
        def update(self, x_TI: Tensor, y_TO: Tensor, weight_OI: Tensor) -> None:
            living.add(id(self))
            alive.append(len(living))
            super().update(x_TI, y_TO, weight_OI)

        def __del__(self) -> None:
            living.discard(id(self))

    class Watching(Wanda):
        def needs(self) -> tuple[Statistic, ...]:
            return (Counted(),)

        def score(self, weight_OI: Tensor, seen: Any) -> Tensor:
            return weight_OI.abs() * seen[Counted()].mean_I.sqrt().float()

        def diagnose(self, seen: Any) -> dict[str, Any]:
            return {}

    run_engine(model_of("mixtral"), tmp_path / "out", metric=Watching())
    assert 0 < max(alive) <= 2


# --- choosing --------------------------------------------------------------------------------------------------------


def test_a_router_is_pruned_if_asked_for(model_of: Any, tmp_path: Path) -> None:
    for family, name in (("mixtral", "*.block_sparse_moe.gate.weight"), ("phimoe", "*.gate.weight"),
                         ("llama4_text", "*.router.weight"), ("gpt_oss", "*.router.weight")):  # fmt: skip
        selection = SlotFilter(include=(name,))
        pruned, facts = run_engine(model_of(family), tmp_path / family, selection=selection)
        routers = [weight for slot, weight in pruned.items() if slot.endswith(name[1:])]
        assert len(routers) == 2, family
        assert all(bool((w.reshape(-1, 4).count_nonzero(dim=1) == 2).all()) for w in routers)
        assert all(fact.tokens == WINDOWS.numel() for slot, fact in facts.items() if slot.endswith(name[1:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_output_of_a_router_that_stays_in_float32_is_seen(
    model_of: Any, tmp_path: Path, dtype: torch.dtype
) -> None:
    selection = SlotFilter(include=("*.gate.weight",))
    pruned, _ = run_engine(model_of("deepseek_v3"), tmp_path / "out", metric=CosP(), selection=selection, dtype=dtype)
    before = weights(model_of("deepseek_v3"))
    routers = [name for name in pruned if name.endswith(".gate.weight")]
    assert routers
    for name in routers:
        kept_OI = pruned[name] != 0
        assert bool((kept_OI.reshape(-1, 4).sum(1) == 2).all())
        assert torch.equal(pruned[name][kept_OI], before[name][kept_OI])


def test_what_is_excluded_keeps_its_bytes(model_of: Any, tmp_path: Path) -> None:
    pruned, _ = run_engine(model_of("mixtral"), tmp_path / "out", selection=SlotFilter(exclude=("*.experts.1.w2.*",)))
    dense, after = weights(model_of("mixtral")), weights(tmp_path / "out")
    kept = [name for name in dense if ".experts.1.w2." in name]
    assert len(kept) == 2
    assert all(torch.equal(dense[name], after[name]) for name in kept)
    assert not set(kept) & set(pruned)


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_glob_that_matches_nothing_is_refused(model_of: Any, option: str) -> None:
    with pytest.raises(AceError, match=rf"{option}=\*\.no_such\.\*") as caught:
        open_model(model_of("mixtral"), SlotFilter(**{option: ("*.no_such.*",)}))
    assert "model.layers.0." in str(caught.value)


def test_a_layout_misread_is_refused_by_name(model_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(slots_module.STORED_TRANSPOSED, "Llama4TextExperts", False)
    with pytest.raises(AceError, match="Llama4TextExperts"):
        run_engine(model_of("llama4_text"), tmp_path / "out")


def test_experts_of_unknown_layout_are_left_with_a_reason(model_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(slots_module.STORED_TRANSPOSED, "Llama4TextExperts")
    model = open_model(model_of("llama4_text"), SlotFilter())
    reasons = {left.why for block in model.blocks for name, left in block.left.items() if "experts" in name}
    assert len(reasons) == 1
    assert "Llama4TextExperts" in reasons.pop()


# --- a whole run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_a_run_reports_experts_and_its_checkpoint_verifies(
    model_of: Any, tmp_path: Path, prune_here: Any, family: str
) -> None:
    report = prune_here(
        add_tokenizer(make(tmp_path / family, family)), tmp_path / "out", "metric=varp", "sparsity=4:8", "permute=ria",
        "allocation=owl", "calib.min_tokens=100000",
    )  # fmt: skip
    experts = [slot for slot in report.slots if "experts" in slot["name"] and slot["routed"] is not None]
    assert experts
    assert report.sparsity.achieved == pytest.approx(0.5, abs=0.03)
    assert any("were observed on all tokens of their layer" in line for line in report.warnings)
    assert any("(router)" in line for line in report.warnings)
    assert verify(tmp_path / "out" / "checkpoint") == len(report.slots)
