"""Experts that go: the router forgets them, and the rest computes as if they had never been chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import add_tokenizer, load, make, token_windows
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ace_cli.core.errors import AceError
from ace_cli.core.timing import Clock
from ace_cli.methods.metrics.random import Random
from ace_cli.methods.metrics.reap import REAP
from ace_cli.methods.repair.none import NoRepair
from ace_cli.model.files import Checkpoint, CheckpointWriter
from ace_cli.model.pruned import verify
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.engine import prune
from ace_cli.pruning.expert_cutting import ExpertCutting
from ace_cli.pruning.observer import reached
from ace_cli.pruning.recipe import Propagate, Recipe
from ace_cli.pruning.units.expert import ExpertUnit

CPU = torch.device("cpu")
#: Family -> options, experts asked for, and whether probabilities of those that went took part in any sum.
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "mixtral": ({}, 3),
    "qwen3_moe": ({"mlp_only_layers": [0], "num_hidden_layers": 3}, 2),
    "olmoe": ({}, 3),
    "deepseek_v3": ({"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_hidden_layers": 3}, 6),
    "glm4_moe": ({}, 3),
    "gpt_oss": ({}, 3),
    "llama4_text": ({}, 3),
}


class Masked(TorchFunctionMode):
    """Routers whose logits for experts that went are minus infinity: they are never chosen, and weigh nothing."""

    def __init__(self, gone: dict[int, Tensor]) -> None:
        super().__init__()
        self.gone = gone

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear:
            gone = self.gone.get(args[1].data_ptr())
            return out if gone is None else out.index_fill(-1, gone, float("-inf"))
        return out


def masked_logits(folder: Path, kept: dict[str, list[int]]) -> Tensor:
    """Of transformers' dense model, with the experts that went out of the routers' sight."""
    model, gone = load(folder), {}
    for name, module in model.named_modules():
        mine = [stays for key, stays in kept.items() if key.rpartition(".")[0].split(".")[2] == name.split(".")[2:3][0]
                ] if name.count(".") >= 2 and name.split(".")[-1] in ("gate", "router") else []  # fmt: skip
        if mine and getattr(module, "weight", None) is not None:
            away = torch.tensor([e for e in range(len(module.weight)) if e not in mine[0]])
            gone[module.weight.data_ptr()] = away
            if hasattr(module, "e_score_correction_bias"):
                module.e_score_correction_bias[away] = float("-inf")
    assert len(gone) == len(kept)
    with torch.inference_mode(), Masked(gone):
        found: Tensor = model(token_windows(2, 20, seed=1), use_cache=False).logits
    return found


def run(prune_here: Any, folder: Path, out: Path, *options: str) -> Any:
    return prune_here(folder, out, "unit=expert", "calib.seq_len=16", *options)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_computes_what_the_router_would_without_them(family: str, tmp_path: Path, prune_here: Any) -> None:
    options, keep = FAMILIES[family]
    routed = 1 if family == "llama4_text" else 2
    folder, out = add_tokenizer(make(tmp_path / "dense", family, **options)), tmp_path / "run"
    report = run(prune_here, folder, out, f"keep={keep}")
    cuts = json.loads((out / "checkpoint" / "pruning.json").read_text())["cuts"]
    kept = {cut["name"]: cut["kept"] for cut in cuts}
    assert all(len(stays) == keep for stays in kept.values())
    with torch.inference_mode():
        ours = load(out / "checkpoint")(token_windows(2, 20, seed=1), use_cache=False).logits
    expected = masked_logits(folder, kept)
    assert torch.equal(ours, expected) or torch.allclose(ours, expected, atol=1e-5)
    assert verify(out / "checkpoint") == len(kept)
    assert {slot["tokens"] for slot in report.slots} == {8 * 16 * routed}
    gone = report.size.parameters["dense"] - report.size.parameters["pruned"]
    assert gone == sum(cut["fewer"] for cut in cuts) > 0


def test_reap_is_what_an_expert_adds_where_it_is_asked(tmp_path: Path) -> None:
    folder = make(tmp_path / "dense", "mixtral")
    model = StreamedModel(Checkpoint(folder), CPU, torch.float32)
    (batch,), block = model.batches(token_windows(2, 12)), model.blocks[0]
    total, tokens = [0.0] * 4, [0] * 4
    metric, found = REAP(), torch.zeros(4, dtype=torch.float64)

    def note(experts: Any, call: Any) -> None:
        up_ = dict(experts.module.named_parameters())
        hidden, index, gates = (value.double() for value in call.values.values())
        for t in range(len(hidden)):
            for k in range(2):
                e = int(index[t, k])
                gate, up = (up_["gate_up_proj"][e].double() @ hidden[t]).chunk(2)
                output = up_["down_proj"][e].double() @ (torch.nn.functional.silu(gate) * up)
                total[e] += float(gates[t, k] * output.norm())
                tokens[e] += 1
        for e in range(4):
            found[e] = metric.of_routed(experts.gates(call, e), experts.outputs(call, e))

    with model.loaded(block), torch.no_grad(), reached(block.experts, note):
        model.forward(0, batch)
    assert found.tolist() == pytest.approx(total, rel=1e-5)
    score_E = metric.score_experts(found, torch.tensor(tokens), 0)
    assert score_E.tolist() == pytest.approx([s / n for s, n in zip(total, tokens, strict=True)], rel=1e-5)


@pytest.mark.parametrize("propagate", [Propagate.sublayer, Propagate.dense])
def test_what_later_blocks_see_is_what_is_written(propagate: Propagate, tmp_path: Path) -> None:
    folder = make(tmp_path / "dense", "qwen3_moe", num_hidden_layers=3)
    model = StreamedModel(Checkpoint(folder), CPU, torch.float32)
    cutting = ExpertCutting(model, ExpertUnit(), "expert")
    cutting.ask(0, 3)  # type: ignore[arg-type]
    assert cutting.changes() is not None
    (tmp_path / "out").mkdir()
    writer = CheckpointWriter(model.checkpoint, tmp_path / "out", cutting.entries())
    windows = token_windows(3, 16)
    batches = list(model.batches(windows))
    facts = list(
        prune(cutting.watched, batches, Recipe(REAP(), {}, NoRepair(), propagate, cutting=cutting), writer, Clock())
    )
    writer.finish()
    again = list(model.batches(windows))
    cutting.replay(again, facts[:2], Checkpoint(tmp_path / "out", bare=True), propagate is Propagate.dense)
    if propagate is Propagate.dense:
        with model.loaded(model.blocks[2]), torch.no_grad():
            model.advance(2, again)
    assert torch.equal(batches[0].hidden_BLH, again[0].hidden_BLH)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make(tmp_path_factory.mktemp("mixture"), "deepseek_v3", n_routed_experts=8, n_group=2, num_hidden_layers=3)
    return add_tokenizer(folder)


def test_killed_and_continued_gives_the_same_bytes(
    mixture: Path, tmp_path: Path, prune_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(prune_here, mixture, tmp_path / "whole", "sparsity=25%")
    copy = CheckpointWriter.copy

    def failing(self: CheckpointWriter, names: Any) -> None:
        if any(".layers.2." in name for name in names):
            raise KeyboardInterrupt
        copy(self, names)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CheckpointWriter, "copy", failing)
        run(prune_here, mixture, tmp_path / "killed", "sparsity=25%")
    report = run(prune_here, mixture, tmp_path / "killed", "sparsity=25%")
    assert any("continued" in warning for warning in report.warnings)
    found = [(tmp_path / each / "checkpoint" / "model.safetensors").read_bytes() for each in ("whole", "killed")]
    assert found[0] == found[1]


def test_the_dense_model_teaches_one_of_fewer_experts(
    tmp_path: Path, prune_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the first epoch, and before the trained files are put in place."""
    folder = add_tokenizer(make(tmp_path / "dense", "gpt_oss"))
    options = ("keep=3", "calib.n_samples=64", "recover=distill", "recover.batch=32", "recover.lr=2e-4",
               "recover.windows=64")  # fmt: skip
    straight = run(prune_here, folder, tmp_path / "whole", *options)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for moment in ("ace_cli.recovery.distill.write_weights", "ace_cli.run.recover_checkpoint._move"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(moment, stop)
            run(prune_here, folder, tmp_path / "stopped", *options)
    report = run(prune_here, folder, tmp_path / "stopped", *options)
    assert report.recovery == straight.recovery
    assert report.recovery["after"] < report.recovery["before"]
    found = [(tmp_path / each / "checkpoint" / "model.safetensors").read_bytes() for each in ("whole", "stopped")]
    assert found[0] == found[1]
    assert verify(tmp_path / "stopped" / "checkpoint") == 2


def test_lots_differ_by_layer_and_seed_and_are_drawn_alike_again() -> None:
    nothing = torch.zeros(16)
    first, again, other, seeded = (
        metric.score_experts(nothing, nothing, index).tolist()
        for metric, index in ((Random(), 0), (Random(), 0), (Random(), 1), (Random(seed=1), 0))
    )
    assert first == again
    assert len({tuple(first), tuple(other), tuple(seeded)}) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["keep=3"], "keep=3: the router chooses from 2 groups"),
        (["keep=2"], "2 experts stay, of which a token may choose among 1: it is sent to 2"),
        (["keep=10"], "keep=5: a block has 4 experts"),
        (["sparsity=1%"], "takes none of the 4 experts away"),
        (["metric=wanda"], "metric=wanda does not go with unit=expert: it scores no experts"),
        (["repair=lstsq"], "repair=lstsq does not go with unit=expert"),
        (
            ["recover=blocks"],
            "recover=blocks does not follow a cut of experts, it trains blocks as they are: use distill",
        ),
        (["recover=both"], "recover=both does not follow a cut of experts"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: list[str], words: str, mixture: Path, tmp_path: Path, prune_here: Any
) -> None:
    with pytest.raises(AceError, match=words):
        run(prune_here, mixture, tmp_path / "run", "sparsity=25%", *options)


def test_too_few_for_a_token_and_none_at_all(llama: Path, tmp_path: Path, prune_here: Any) -> None:
    folder = add_tokenizer(make(tmp_path / "dense", "mixtral"))
    with pytest.raises(AceError, match="1 experts stay, of which a token may choose among 1: it is sent to 2"):
        run(prune_here, folder, tmp_path / "run", "keep=1")
    with pytest.raises(AceError, match="no experts were found in LlamaForCausalLM"):
        run(prune_here, llama, tmp_path / "run", "sparsity=25%")
