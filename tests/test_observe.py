"""What a run looks at for its report: activations, block outputs, fidelity, memory over time."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import load, make, weights

from ace_cli.core.timing import MemorySampler
from ace_cli.core.typed_json import typed
from ace_cli.data.generation import CALIBRATION, sample_windows
from ace_cli.evaluation.dense import DenseCache
from ace_cli.evaluation.fidelity import TOKENS, DenseStates, FidelityMeter
from ace_cli.model.files import Checkpoint
from ace_cli.pruning.diagnostics import SINK, ActivationFacts, Activations, output_change
from ace_cli.report.facts import Report

Prune = Callable[..., Report]


def activations(x_TI: torch.Tensor, most: int = 256, pieces: int = 1) -> ActivationFacts:
    statistic = Activations(most)
    for chunk_TI in x_TI.chunk(pieces):
        statistic.update(chunk_TI, chunk_TI, torch.empty(0))
    return statistic.facts()


def test_activations_are_those_of_the_definition() -> None:
    x_TI = torch.randn(40, 11, generator=torch.Generator().manual_seed(0))
    x_TI[3] *= 60
    facts = activations(x_TI)
    columns = x_TI.double().T.tolist()
    norms = sorted(math.sqrt(sum(v * v for v in column) / 40) for column in columns)
    assert facts.tokens == 40
    assert facts.input_norm.median == pytest.approx(norms[5], rel=1e-5)
    assert facts.input_norm.largest == pytest.approx(norms[-1], rel=1e-5)
    assert facts.largest_to_median == pytest.approx(norms[-1] / norms[5], rel=1e-5)
    variances = [sum((v - sum(c) / 40) ** 2 for v in c) / 40 for c in columns]
    assert facts.input_variance.median == pytest.approx(sorted(variances)[5], rel=1e-4)
    flat = [v for column in columns for v in column]
    assert facts.above_one == pytest.approx(sum(abs(v) > 1 for v in flat) / len(flat))
    assert facts.largest == pytest.approx(max(map(abs, flat)))
    sizes = [math.sqrt(sum(v * v for v in row)) for row in x_TI.tolist()]
    assert facts.token_norm.largest == pytest.approx(max(sizes), rel=1e-5)
    assert facts.sinks == sum(size > SINK * sorted(sizes)[19] for size in sizes) == 1


def test_activations_of_the_first_tokens_however_they_come() -> None:
    x_TI = torch.randn(300, 8, generator=torch.Generator().manual_seed(1))
    assert activations(x_TI, 100, pieces=7) == activations(x_TI[:100], 100) != activations(x_TI, 200)
    stored = json.loads(json.dumps(dataclasses.asdict(activations(x_TI))))
    assert typed(ActivationFacts, stored, "facts") == activations(x_TI)


def test_output_change_of_known_vectors() -> None:
    dense = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    turned = torch.tensor([[[0.0, 1.0], [0.0, 2.0]]])
    change = output_change(dense, turned)
    assert change.angle == pytest.approx(45)  # 90 and 0
    assert change.error == pytest.approx(math.sqrt(2) / 2)
    assert output_change(dense, 3 * dense).angle == pytest.approx(0, abs=1e-6)
    assert output_change(dense, 3 * dense).error == pytest.approx(2)
    tiny = torch.tensor([[[1.0, 1e-7]]])
    assert output_change(torch.tensor([[[1.0, 0.0]]]), tiny).angle == pytest.approx(math.degrees(1e-7), rel=1e-4)


@pytest.mark.parametrize("propagate", ["sublayer", "block", "dense"])
def test_block_outputs_are_compared_for_the_same_input(
    llama: Path, tmp_path: Path, prune_here: Prune, propagate: str
) -> None:
    """Recomputed with transformers: the pruned model so far, then this block dense or pruned."""
    options = ("metric=wanda", f"propagate={propagate}", "observe.windows=3")
    report = prune_here(llama, tmp_path / "out", *options)
    assert all(block["output"]["error"] > 0.01 and block["output"]["angle"] > 0.1 for block in report.blocks)
    ids = sample_windows(Checkpoint(llama), 8, 16, 0, CALIBRATION, "cpu")[:3]
    dense, pruned = load(llama), load(Path(report.checkpoint))
    before = dense if propagate == "dense" else pruned
    with torch.inference_mode():
        for index, block in enumerate(report.blocks):
            outs = []
            for model in (dense, pruned):
                mixed = load(llama)
                for earlier in range(index):
                    mixed.model.layers[earlier] = before.model.layers[earlier]
                mixed.model.layers[index] = model.model.layers[index]
                outs.append(_after(mixed, ids, index))
            expected = output_change(*outs)
            assert block["output"]["error"] == pytest.approx(expected.error, rel=1e-3)
            assert block["output"]["angle"] == pytest.approx(expected.angle, rel=1e-3)


def _after(model: torch.nn.Module, ids: torch.Tensor, index: int) -> torch.Tensor:
    caught: list[torch.Tensor] = []
    layer = model.model.layers[index]  # type: ignore[union-attr, index]
    handle = layer.register_forward_hook(lambda _, __, out: caught.append(out[0] if isinstance(out, tuple) else out))
    model(ids)
    handle.remove()
    return caught[0]


@pytest.mark.parametrize(("family", "options"), [
    ("llama", ["metric=wanda"]), ("gpt2", ["metric=wanda", "repair=sparsegpt"]), ("mixtral", ["metric=wanda"]),
    ("phi3", ["metric=wanda", "propagate=dense"]), ("llama", ["unit=rank", "metric=svd_llm", "sparsity=0.4"]),
])  # fmt: skip
def test_errors_of_weights_are_those_of_their_own_products(
    family: str, options: list[str], tmp_path: Path, prune_here: Prune
) -> None:
    """Recomputed from both checkpoints: what the first block's weights make of what they read in the dense model."""
    report = prune_here(make(tmp_path / "dense", family), tmp_path / "out", *options, "observe.windows=3")
    assert all(slot["error"] is None or 0.01 < slot["error"] < 2 for slot in report.slots)
    seen = [slot for slot in report.slots if slot["error"] is not None]
    assert len(seen) > len(report.slots) / 2, "an expert may be sent no token"
    if family != "llama":
        return
    ids = sample_windows(Checkpoint(tmp_path / "dense"), 8, 16, 0, CALIBRATION, "cpu")[:3]
    dense, pruned = load(tmp_path / "dense"), weights(Path(report.checkpoint))
    inputs: dict[str, torch.Tensor] = {}
    for name, module in dense.model.layers[0].named_modules():
        module.register_forward_pre_hook(lambda _, given, name=name: inputs.update({name: given[0]}) if given else None)
    with torch.inference_mode():
        dense(ids)
    for slot in report.slots[:7]:
        name = slot["name"].removeprefix("model.layers.0.").removesuffix(".weight")
        x_TI = inputs[name].flatten(0, -2).double()
        before, after = (
            x_TI @ of.double().T for of in (weights(tmp_path / "dense")[slot["name"]], pruned[slot["name"]])
        )
        assert slot["error"] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4), slot["name"]


@pytest.mark.parametrize("propagate", ["sublayer", "dense"])
def test_a_metric_without_statistics_is_compared_like_others(
    llama: Path, tmp_path: Path, prune_here: Prune, propagate: str
) -> None:
    """The allocation looks at inputs, the metric does not: inputs must not be taken for outputs."""
    given = ("metric=magnitude", "allocation=owl", f"propagate={propagate}")
    little = prune_here(llama, tmp_path / "little", *given, "sparsity=0.1")
    assert all(0 < block["output"]["error"] < 0.2 for block in little.blocks)
    half = prune_here(llama, tmp_path / "half", *given, "sparsity=0.5")
    assert all(0.05 < block["output"]["error"] < 0.9 for block in half.blocks)


def test_looking_changes_no_weight(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    from test_run import digests

    prune_here(llama, tmp_path / "seen", "metric=varp", "observe.windows=8", "observe.tokens=100")
    report = prune_here(llama, tmp_path / "unseen", "metric=varp", "observe.windows=0", "observe.tokens=0")
    assert digests(tmp_path / "seen" / "checkpoint") == digests(tmp_path / "unseen" / "checkpoint")
    assert all(slot["activations"] is None and slot["error"] is None for slot in report.slots)
    assert all(block["output"] is None for block in report.blocks)


def test_an_interrupted_run_keeps_what_it_saw(
    llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_run import fail_after

    from ace_cli.model.files import CheckpointWriter

    straight = prune_here(llama, tmp_path / "straight", "metric=varp")
    fail_after(monkeypatch, CheckpointWriter, "write", 7 + 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        prune_here(llama, tmp_path / "out", "metric=varp")
    monkeypatch.undo()
    report = prune_here(llama, tmp_path / "out", "metric=varp")
    assert [slot["error"] for slot in report.slots] == [slot["error"] for slot in straight.slots]
    assert [slot["activations"] for slot in report.slots] == [slot["activations"] for slot in straight.slots]
    assert [block["output"] for block in report.blocks] == [block["output"] for block in straight.blocks]


# --- fidelity --------------------------------------------------------------------------------------------------------


def test_fidelity_is_that_of_the_whole_models(llama: Path, tmp_path: Path, prune_here: Prune, documents: Path) -> None:
    """With transformers alone, softmax in float64."""
    from ace_cli.data.documents import consecutive_windows, load_tokenizer
    from ace_cli.data.text_files import local_documents
    from ace_cli.model.files import Checkpoint

    options = ("eval=text", f"eval.path={documents}", "eval.seq_len=32", "eval.max_windows=4")
    found = prune_here(llama, tmp_path / "out", "metric=wanda", *options).fidelity
    text = "\n\n".join(local_documents(str(documents), "text"))
    ids = consecutive_windows(text, load_tokenizer(Checkpoint(llama)), 32)[:4]
    with torch.inference_mode():
        dense, pruned = (load(f)(ids).logits[:, :-1].double() for f in (llama, tmp_path / "out" / "checkpoint"))
    p, q = dense.softmax(-1), pruned.softmax(-1)
    assert found is not None
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    assert found.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert (found.windows, found.tokens, len(found.kl_by_window)) == (4, 4 * 31, 4)
    assert 0 < found.cosine < 1


def test_a_sweep_measures_dense_once_and_fidelity_every_time(llama: Path, documents: Path, tmp_path: Path) -> None:
    from running import Terminal, composed, run

    reports = []
    cache = DenseCache(tmp_path / "dense")
    for name, sparsity in (("a", "0.0"), ("b", "0.6")):
        config = composed(
            "model=custom", f"model.path={llama}", "metric=magnitude", f"sparsity={sparsity}", "eval=text",
            f"eval.path={documents}", "eval.seq_len=16", "eval.max_windows=3", f"output_dir={tmp_path / name}",
            "device=cpu", "samples.prompts=[]", "html=false",
        )  # fmt: skip
        reports.append(run(config, "test", Terminal(), cache))
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) == 1
    same, other = (report.fidelity for report in reports if report is not None and report.fidelity is not None)
    assert (same.kl, same.agreement) == (pytest.approx(0, abs=1e-6), 1.0)
    assert same.cosine == pytest.approx(1)
    assert other.kl > 0.01


def test_the_states_that_are_kept_are_bounded() -> None:
    ids_L = torch.arange(TOKENS // 2)
    states = DenseStates()
    for _ in range(3):
        states(ids_L, torch.zeros(len(ids_L), 4), torch.zeros(0))
    assert len(states.windows_LH) == 2
    long = DenseStates()
    long(torch.arange(2 * TOKENS), torch.zeros(2 * TOKENS, 4), torch.zeros(0))
    assert len(long.windows_LH) == 1
    nothing = FidelityMeter(None, DenseStates())  # type: ignore[arg-type]
    nothing(ids_L, torch.zeros(0), torch.zeros(0))
    assert nothing.kl == []


# --- memory over time ------------------------------------------------------------------------------------------------


def test_memory_is_sampled_and_stops() -> None:
    with MemorySampler(0.01) as sampler:
        ballast = torch.ones(20_000_000)
        time.sleep(0.1)
    count = len(sampler.samples)
    seconds, sizes = zip(*sampler.samples, strict=True)
    assert count >= 4
    assert list(seconds) == sorted(seconds)
    assert max(sizes) >= ballast.nbytes
    time.sleep(0.05)
    assert len(sampler.samples) == count


def test_a_long_run_is_sampled_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemorySampler, "MOST", 10)
    sampler = MemorySampler()
    for _ in range(100):
        sampler.sample()
    assert 5 <= len(sampler.samples) <= 10


def test_the_timeline_is_in_the_report(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    timeline = prune_here(llama, tmp_path / "out", "metric=wanda").timeline
    assert len(timeline.seconds) == len(timeline.bytes) >= 2
    assert {"import", "calibrate", "prune"} <= {span.phase for span in timeline.phases}
    assert all(0 <= span.start <= span.end <= timeline.seconds[-1] + 0.1 for span in timeline.phases)


@pytest.mark.parametrize("metric", ["wanda", "ria", "varp"])
def test_inputs_that_are_all_alike_are_flagged(
    llama: Path, tmp_path: Path, prune_here: Prune, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("wanda", "ria", "varp"):
        monkeypatch.setattr(f"ace_cli.methods.metrics.{module}.spread", lambda _: 1.01)
    report = prune_here(llama, tmp_path / "out", f"metric={metric}")
    assert all(slot["like_magnitude"] for slot in report.slots)
    assert any("is magnitude pruning" in warning for warning in report.warnings)
