"""Several workers on one model: the same bytes and numbers as one, and how they end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import shutil
import socket
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
import working
from running import composed
from safetensors.torch import load_file
from tiny_models import add_tokenizer, make

from ace_cli.cli import evaluate
from ace_cli.core import workers
from ace_cli.core.steps import NOBODY
from ace_cli.core.workers import Workers
from ace_cli.evaluation.zero_shot.streamed_lm import StreamedLM
from ace_cli.methods.statistics import SHARED_TOKENS
from ace_cli.model import streamed
from ace_cli.model.files import Checkpoint
from ace_cli.model.streamed import StreamedModel
from ace_cli.report.facts import Report
from ace_cli.report.terminal import Terminal
from ace_cli.run import pipeline, prune_checkpoint
from ace_cli.run.at_scale import AtScale, at_scale, rates_of
from ace_cli.run.context import Texts
from ace_cli.run.plan import Demand, Plan, make_plan

no_forks = pytest.mark.skipif(sys.platform == "win32", reason="no forks")
#: Tokens enough for workers to share what statistics multiply.
LONG = ("calib.n_samples=40", "calib.seq_len=32")
#: A metric and what comes with it -> rows alone, experts alone, or neither.
CELLS = {
    "exchanges and a refit": ("llama", "metric=ace", "repair=admm", "sparsity=0.5"),
    "left to right": ("llama", "metric=sparsegpt", "sparsity=2:4", "repair=sparsegpt", "permute=ria"),
    "the whole layer": ("llama", "metric=sparsegpt", "sparsity=0.5"),
    "experts": ("mixtral", "metric=ace", "repair=swaps", "sparsity=2:4"),
    "no calibration": ("mixtral", "metric=magnitude", "sparsity=0.5"),
    "statistics by parts": ("wide", "metric=ace", "metric.sweeps=2", "sparsity=0.5", *LONG),
    "statistics of all rows": ("wide", "metric=ace", "metric.sweeps=2", "permute=ria", "sparsity=2:4", *LONG),
    "what was lost before": ("wide", "metric=wanda", "repair=sparsegpt", "catch_up=0.5", "sparsity=0.5", *LONG),
    "channels": ("llama", "unit=channel", "metric=sobp", "sparsity=0.25"),
    "heads": ("llama", "unit=head", "sparsity=0.5"),
    "experts that go": ("mixtral", "unit=expert", "sparsity=0.5"),
    "channels of experts": ("mixtral", "unit=channel", "sparsity=0.25"),
    "blocks that go": ("llama", "unit=block", "keep=1"),
    "products": ("llama", "unit=rank", "sparsity=40%"),
}
#: How kept weights are trained -> cells of which workers' sums are in another order.
TRAINED = {
    "blocks": ("llama", "metric=wanda", "sparsity=0.5", "recover=blocks"),
    "cut blocks": ("llama", "unit=channel", "sparsity=0.25", "recover=blocks", "recover.target=model"),
    "both": ("llama", "metric=wanda", "sparsity=2:4", "recover=both", "recover.batch=48"),
    "adapters": ("llama", "metric=wanda", "sparsity=2:4", "recover=lora", "recover.ranks=angular", "recover.batch=48"),
}
#: Cells of workers that have windows of their own: five of them, so that one has two and goes through blocks at once,
#: the other three, in two batches.
APART = {
    "exchanges": ("llama", "metric=ace", "sparsity=0.5"),
    "the whole block": ("llama", "metric=wanda", "sparsity=0.5", "propagate=block", "allocation=owl"),
    "dense inputs": ("llama", "metric=sparsegpt", "sparsity=0.5", "propagate=dense"),
    "another order": ("llama", "metric=sparsegpt", "sparsity=2:4", "repair=sparsegpt", "permute=ria"),
    "catching up": ("llama", "metric=wanda", "repair=sparsegpt", "sparsity=2:4", "catch_up=0.5"),
    "every token": ("llama", "metric=varp", "metric.form=series", "sparsity=0.5"),
    "experts that some see nothing of": (
        "mixtral", "metric=ace", "repair=swaps", "sparsity=2:4", "calib.n_samples=3", "calib.seq_len=2",
    ),
    "experts of a block": ("mixtral", "metric=wanda", "sparsity=0.5", "propagate=block", "allocation=dlp"),
    "channels": ("mixtral", "unit=channel", "sparsity=0.25"),
    "heads": ("llama", "unit=head", "sparsity=0.5"),
    "trained blocks": ("llama", "metric=wanda", "sparsity=0.5", "recover=blocks", "recover.batch=32"),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Matrices of several pieces of rows."""
    shape = {"hidden_size": 128, "intermediate_size": 224, "head_dim": 32, "num_hidden_layers": 2}
    wide = {"hidden_size": 320, "intermediate_size": 640, "head_dim": 80, "num_hidden_layers": 1}
    shapes = {"llama": ("llama", shape), "mixtral": ("mixtral", shape), "wide": ("llama", wide)}
    return {
        name: add_tokenizer(make(tmp_path_factory.mktemp(name), family, **sizes))
        for name, (family, sizes) in shapes.items()
    }


@pytest.fixture(scope="module")
def start() -> Callable[..., list[int | None]]:
    """Run ``function`` as two workers, from a server that has imported everything; their exit codes."""
    context = programs.server()

    def begin(function: Callable[..., None], log: Path, *given: Any) -> list[int | None]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        both: list[Any] = [context.Process(target=function, args=(rank, 2, port, log, *given)) for rank in (0, 1)]
        for process in both:
            process.start()
        for process in both:
            process.join(120)
            process.kill()
        return [process.exitcode for process in both]

    return begin


def digest(out: Path) -> str:
    return hashlib.sha256((out / "checkpoint" / "model.safetensors").read_bytes()).hexdigest()


@no_forks
def test_two_workers_write_the_bytes_of_one_and_find_its_numbers(
    models: dict[str, Path], documents: Path, tmp_path: Path, start: Any, prune_here: Callable[..., Report]
) -> None:
    torch.set_num_threads(1)  # as the workers have: products of several threads are sums in another order
    options = ["calib=self", "calib.n_samples=4", "calib.seq_len=16", "eval=none", "device=cpu", "html=false",
               "samples.prompts=[]"]  # fmt: skip
    texts = ["eval=text", f"eval.path={documents}", "eval.seq_len=128", "eval.max_windows=9", "observe.tokens=64"]
    cells = {**CELLS, **TRAINED}
    given = {name: [*options, *choices, *(texts if name == "experts" else ())] for name, (_, *choices) in cells.items()}
    alone = {
        name: prune_here(models[cells[name][0]], tmp_path / "one" / name, *overrides)
        for name, overrides in given.items()
    }
    each = [
        composed("model=custom", f"model.path={models[cells[name][0]]}", f"output_dir={tmp_path / 'two' / name}", *more)
        for name, more in given.items()
    ]
    log, results = tmp_path / "log", tmp_path / "results.json"
    assert start(working.jobs, log, each, results) == [0, 0], log.read_text()
    assert {name: digest(tmp_path / "two" / name) for name in CELLS} == {
        name: digest(tmp_path / "one" / name) for name in CELLS
    }
    reports = dict(zip(cells, json.loads(results.read_text()), strict=True))
    for name in TRAINED:
        check_trained_alike(alone[name], reports[name])
    for name, report in ((name, reports[name]) for name in CELLS):
        told = [[slot["name"], slot["diagnosis"], slot["notes"]] for slot in report["slots"]]
        assert told == [[slot["name"], slot["diagnosis"], slot["notes"]] for slot in alone[name].slots], name
    for part in ("perplexity", "fidelity"):
        assert reports["experts"][part] == dataclasses.asdict(getattr(alone["experts"], part))


@no_forks
def test_workers_with_windows_of_their_own_choose_what_one_does(
    models: dict[str, Path], tmp_path: Path, start: Any, prune_here: Callable[..., Report], documents: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Five windows, of which one worker has two: the same weights stay, but for sums in another order."""
    monkeypatch.setattr(streamed, "BATCH_TOKENS", 32)  # two windows
    torch.set_num_threads(1)
    options = ["calib=text", f"calib.path={documents}", "calib.n_samples=5", "calib.seq_len=16", "calib.min_tokens=1",
               "eval=none", "device=cpu", "html=false", "samples.prompts=[]"]  # fmt: skip
    alone = {
        name: prune_here(models[family], tmp_path / "one" / name, *options, *choices)
        for name, (family, *choices) in APART.items()
    }
    each = [
        composed(
            "model=custom", f"model.path={models[family]}", f"output_dir={tmp_path / 'two' / name}", "split=windows",
            *options, *choices,
        )
        for name, (family, *choices) in APART.items()
    ]  # fmt: skip
    log, results = tmp_path / "log", tmp_path / "results.json"
    assert start(working.jobs, log, each, results, 32) == [0, 0], log.read_text()
    for name, report in zip(APART, json.loads(results.read_text()), strict=True):
        for one, other in zip(alone[name].slots, report["slots"], strict=True):
            same = ("name", "tokens", "routed", "pattern")
            assert [one[key] for key in same] == [other[key] for key in same], name
            found = [each["diagnosis"] for each in (one, other)]
            if "permute=ria" in APART[name]:  # of two orders about as good either may be found
                found = [{key: value for key, value in each.items() if key == "permutation_gain"} for each in found]
            assert found[0] == pytest.approx(found[1], rel=0.002), name
        if "recover=blocks" in APART[name]:
            check_trained_alike(alone[name], report)
        elif "permute=ria" not in APART[name]:
            check_alike(tmp_path / "one" / name, tmp_path / "two" / name)


def check_alike(one: Path, other: Path) -> None:
    """The same weights stay, but for ties, and those that do are about the same."""
    tensors = [load_file(folder / "checkpoint" / "model.safetensors") for folder in (one, other)]
    for name, mine in tensors[0].items():
        theirs = tensors[1][name]
        both = (mine != 0) == (theirs != 0)
        assert float(both.float().mean()) > 0.999, (one.name, name)
        assert float((mine - theirs)[both].norm()) <= 1e-4 * float(mine.norm()), (one.name, name)


@no_forks
def test_a_run_of_windows_apart_goes_on_in_the_same_bytes_and_with_as_many_workers_only(
    models: dict[str, Path], tmp_path: Path, start: Any, prune_here: Callable[..., Report],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = ["metric=ace", "sparsity=0.5", "calib=self", "calib.n_samples=5", "calib.seq_len=16", "eval=none",
               "device=cpu", "html=false", "samples.prompts=[]", "split=windows"]  # fmt: skip
    model, log = models["llama"], tmp_path / "log"
    whole, stopped = (
        [f"model.path={model}", *options, f"output_dir={tmp_path / name}"] for name in ("whole", "stopped")
    )
    assert start(working.command, log, whole) == [0, 0], log.read_text()
    assert start(working.command, log, stopped, 1) == [1, -9], log.read_text()
    shutil.copytree(tmp_path / "stopped", tmp_path / "copied")
    prune_here(model, tmp_path / "copied", *options)
    assert "but workers changed: starting anew" in capsys.readouterr().out
    assert start(working.command, log, stopped) == [0, 0], log.read_text()
    assert "1 blocks are done" in log.read_text()
    assert digest(tmp_path / "stopped") == digest(tmp_path / "whole")


@no_forks
def test_what_workers_saw_of_other_tokens_is_what_one_sees(tmp_path: Path, start: Any) -> None:
    log = tmp_path / "log"
    assert start(working.joins, log) == [0, 0], log.read_text()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["metric=wanda", "calib.n_samples=1"], "split=windows: 1 calibration windows for 2 workers"),
        (
            ["metric=wanda", "recover=blocks", "recover.batch=16"],
            "a step of recover=blocks has 1 windows for 2 workers",
        ),
        (["metric=pruner_zero"], "split=windows does not go with metric=pruner_zero"),
        (["unit=block", "keep=1"], "split=windows does not go with unit=block"),
        (["unit=channel", "unit.uneven=true", "allocation=angular"], "does not go with allocation=angular"),
    ],
)
def test_what_cannot_be_split_is_said_before_work(
    models: dict[str, Path], tmp_path: Path, here: Callable[..., Any], overrides: list[str], said: str
) -> None:
    refused = here(f"model.path={models['llama']}", "calib=self", "calib.seq_len=16", "eval=none", "split=windows",
                   "dry_run=true", "workers=2", f"output_dir={tmp_path / 'out'}", *overrides)  # fmt: skip
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
    assert said in refused.stderr


def check_trained_alike(one: Report, two: dict[str, Any]) -> None:
    """Sums of gradients in another order: about the same errors."""
    entries = [json.loads((Path(each) / "pruning.json").read_text()) for each in (one.checkpoint, two["checkpoint"])]
    blocks = zip(one.blocks, two["blocks"], strict=True)
    pairs = [(mine["recovery"], other["recovery"]) for mine, other in blocks if mine["recovery"] is not None]
    pairs += [tuple(entry["recovery"] for entry in entries)] if "recovery" in entries[0] else []
    assert pairs[0][1]["before"] == pytest.approx(pairs[0][0]["before"], rel=1e-5)
    assert any(other["epochs"] for _, other in pairs)
    for mine, other in pairs:
        assert mine["epochs"] == other["epochs"]
        assert other["before"] == pytest.approx(mine["before"], rel=0.02)
        assert other["after"] == pytest.approx(mine["after"], rel=0.02)


@no_forks
def test_a_lost_worker_ends_the_other_and_no_block_is_done_twice(
    models: dict[str, Path], tmp_path: Path, start: Any, prune_here: Callable[..., Report], documents: Path
) -> None:
    options = ["metric=ace", "sparsity=2:4", "calib=self", "calib.n_samples=4", "calib.seq_len=16", "eval=text",
               f"eval.path={documents}", "eval.seq_len=64", "eval.max_windows=1", "gate.max_ppl_ratio=0.01",
               "device=cpu", "html=false", "samples.prompts=[]"]  # fmt: skip
    prune_here(models["llama"], tmp_path / "one", *options)
    arguments = [f"model.path={models['llama']}", *options, f"output_dir={tmp_path / 'two'}"]
    log = tmp_path / "log"
    assert start(working.command, log, arguments, 1) == [1, -9], log.read_text()
    assert log.read_text().count("ace-prune: Another worker has ended") == 1
    assert start(working.command, log, arguments) == [3, 0], log.read_text()
    assert "1 blocks are done" in log.read_text()
    assert digest(tmp_path / "two") == digest(tmp_path / "one")


@no_forks
def test_what_can_be_mended_is_said_once(models: dict[str, Path], tmp_path: Path, start: Any) -> None:
    """One worker is not like the other: both end with 2, and no block is kept of what they do not agree on."""
    log = tmp_path / "log"
    arguments = [f"model.path={models['llama']}", "metric=magnitude", "sparsity=0.5", "eval=none", "device=cpu",
                 "html=false", "samples.prompts=[]", f"output_dir={tmp_path / 'out'}"]  # fmt: skip
    assert start(working.unlike, log, arguments) == [2, 2], log.read_text()
    lines = [line for line in log.read_text().splitlines() if line.startswith("ace-prune: ")]
    assert len(lines) == 1
    assert "Worker 1 does not hold what worker 0 does" in lines[0]
    assert start(working.command, log, [*arguments, "metric=nonsense"]) == [2, 2]
    assert log.read_text().count("nonsense") == 1


@no_forks
def test_ace_eval_by_two_workers_says_once_what_one_says(
    models: dict[str, Path], documents: Path, tmp_path: Path, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(models["llama"]), "--tasks", "none", "--text", str(documents), "--seq-len", "128",
                 "--max-windows", "20", "--device", "cpu", "--json"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["ace-eval", *arguments, str(tmp_path / "one.json")])
    evaluate.main()
    log = tmp_path / "log"
    assert start(working.evaluate, log, [*arguments, str(tmp_path / "two.json")]) == [0, 0], log.read_text()
    assert (tmp_path / "two.json").read_text() == (tmp_path / "one.json").read_text()
    assert log.read_text().count("Scores: ") == 1
    assert start(working.evaluate, log, [str(tmp_path / "nothing"), *arguments[1:], "x"]) == [2, 2], log.read_text()
    assert log.read_text().count("ace-eval: ") == 1


@pytest.mark.parametrize("many", ["-m", "hydra.mode=MULTIRUN"])
def test_many_models_are_for_launchers(
    models: dict[str, Path], tmp_path: Path, here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, many: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = tmp_path / "sweep"
    refused = here(many, f"model.path={models['llama']}", "sparsity=0.1,0.2", f"output_dir={out}")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
    assert "Several workers make one model, -m makes many" in refused.stderr
    monkeypatch.setenv("RANK", "1")
    assert here(many, f"model.path={models['llama']}", "sparsity=0.1,0.2", f"output_dir={out}").stderr == ""


def test_pieces_do_not_depend_on_the_number_of_workers() -> None:
    for rows in (1, 63, 200, 2048, 5632):
        every = [[*chain(*Workers(0, size).pieces(rows, "cpu"))] for size in (1, 2, 3, 7)]
        assert all(each == every[0] for each in every)
        assert sorted(row for piece in every[0] for row in range(rows)[piece]) == list(range(rows))
    shares = [sum(len(range(5632)[piece]) for piece in of_one) for of_one in Workers(0, 2).pieces(5632, "cpu")]
    assert max(shares) <= 0.55 * 5632
    assert [len(of_one) for of_one in Workers(0, 3).pieces(300, "cuda")] == [1, 1, 1]
    assert [list(Workers(rank, 3).dealt(7)) for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]


def test_no_restart_mends_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = tmp_path / "run" / "attempt_0" / "1"
    attempt.mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(attempt / "error.json"))
    workers.remember_end(2)
    assert workers.ended() is None  # not started again
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "run" / "attempt_1" / "0" / "error.json"))
    assert workers.ended() == 2
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "other" / "attempt_1" / "0" / "error.json"))
    assert workers.ended() is None


def test_threads_are_no_part_of_a_run_whose_bytes_do_not_depend_on_them(
    tmp_path: Path, prune_here: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large enough that threads share the rows of a weight."""
    shape = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128, "num_hidden_layers": 1}
    wide = add_tokenizer(make(tmp_path / "wide", "llama", **shape))
    found: list[dict[str, Any]] = []
    original, before = prune_checkpoint.identity_of, torch.get_num_threads()

    def remembered(*given: Any) -> dict[str, Any]:
        found.append(original(*given))
        return found[-1]

    monkeypatch.setattr(pipeline, "identity_of", remembered)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            prune_here(wide, tmp_path / str(threads), "metric=magnitude")
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]
    assert digest(tmp_path / "1") == digest(tmp_path / "2")


def test_zero_shot_answers_are_those_of_one_worker(models: dict[str, Path]) -> None:
    """Each of two scores its batches alone; together they have scored all, bit for bit."""

    class Apart(Workers):
        def told(self, value: Any) -> list[Any]:
            return [json.loads(json.dumps(value))]

    model = StreamedModel(Checkpoint(models["llama"]), torch.device("cpu"), torch.float32)
    model.__class__ = type("Narrow", (StreamedModel,), {"plain_tokens": 32})  # several batches
    requests: list[Any] = [(("", ""), [1 + i % 5] * (3 + i % 7), [3 + i, 4]) for i in range(20)]

    def scored(workers: Workers) -> list[tuple[float, bool]]:
        return StreamedLM(model, workers=workers).score_tokens(requests)

    one, halves = scored(Workers()), [scored(Apart(rank, 2)) for rank in range(2)]
    unscored = (0.0, False)
    assert all((a == unscored) != (b == unscored) for a, b in zip(*halves, strict=True))
    assert [b if a == unscored else a for a, b in zip(*halves, strict=True)] == one


def test_what_a_run_is_has_no_node_and_the_number_of_workers_only_where_sums_depend_on_it(
    models: dict[str, Path], configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run goes on from the blocks on disk, on other machines and with more workers, where that changes no byte."""
    model = StreamedModel(Checkpoint(models["llama"]), torch.device("cpu"), torch.float32)

    def identity(*overrides: str) -> dict[str, Any]:
        config = configure(f"model.path={models['llama']}", *overrides)
        return prune_checkpoint.identity_of(config, model, Texts(None, None, None, None, None))

    alone, trained = identity("metric=ace"), identity("metric=ace", "recover=blocks")
    assert identity("metric=ace", "split=windows") == alone, "one worker has all windows"
    for variable, value in (("WORLD_SIZE", "2"), ("HOSTNAME", "another"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(platform, "node", lambda: "another")
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    assert identity("metric=ace") == alone
    assert identity("metric=ace", "recover=blocks") == {**trained, "device": "2 x cpu"}
    assert identity("metric=ace", "split=windows") == {**alone, "workers": "2, each with its own windows"}
    assert identity("metric=magnitude", "split=windows") == identity("metric=magnitude"), "no window is looked at"


# --- planned, where nothing runs ------------------------------------------------------------------------------------


def planned(models: dict[str, Path], configure: Any, *overrides: str, tokens: int = 128) -> AtScale:
    """By the card of the package, for the tiny models."""
    family = "mixtral" if "experts" in overrides else "llama"
    options = [each for each in overrides if each != "experts"]
    config = configure(
        f"model.path={models[family]}", "calib=self", "eval=none", "dry_run=true", "hardware=h100x8", *options
    )
    model = pipeline._open(config, torch.device("cpu"), NOBODY)
    model.device = torch.device("cuda")
    patterns = {slot.name: config.pattern for block in model.blocks for slot in block.slots}
    training = config.recover.forwards()
    demand = Demand(tokens=tokens, statistics=config.statistics, training_forwards=training)
    plan = make_plan(model, patterns, demand)
    return at_scale(config, model, plan, rates_of(config.hardware), config.workers, config.hardware.link)


def test_a_plan_shares_rows_and_experts_and_nothing_else(models: dict[str, Path], configure: Any) -> None:
    def parts(*overrides: str) -> AtScale:
        return planned(models, configure, *overrides)

    one, four = (parts("metric=ace", "repair=admm", f"workers={count}") for count in (1, 4))
    assert four.parts["exchanges and repairs"] == pytest.approx(one.parts["exchanges and repairs"] / 4)
    for same in ("read", "forward", "statistics", "write"):
        assert four.parts[same] == one.parts[same]
    slots = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 224 * 128) * 4  # bytes, of which each is sent three quarters
    assert (one.traffic, four.traffic) == (0, slots * 3 // 4)
    dealt, alone = parts("experts", "metric=ace", "workers=4"), parts("experts", "metric=ace", "workers=1")
    assert dealt.parts["statistics"] < alone.parts["statistics"]  # each sees the tokens of its own experts
    whole = [parts("metric=sparsegpt", "sparsity=0.5", f"workers={count}").parts for count in (1, 4)]
    assert whole[0] == whole[1]
    assert four.seconds == pytest.approx(max(four.parts["read"] + four.parts["write"], sum(
        seconds for name, seconds in four.parts.items() if name not in ("read", "write"))))  # fmt: skip


def test_a_plan_shares_windows_that_workers_have_of_their_own(models: dict[str, Path], configure: Any) -> None:
    base = [f"model.path={models['llama']}", "metric=wanda", "repair=sparsegpt", "calib=self", "calib.n_samples=6",
            "calib.seq_len=128", "eval=none", "dry_run=true", "hardware=h100x8"]  # fmt: skip

    def found(*overrides: str) -> tuple[Plan, AtScale]:
        config = configure(*base, *overrides)
        model = pipeline._open(config, torch.device("cpu"), NOBODY)
        model.device = torch.device("cuda")
        plan, limit = pipeline._plan(config, model, None, None, Terminal(quiet=True))
        return plan, at_scale(config, model, plan, limit.rates, config.workers, config.hardware.link)

    (plan, one), (own, four) = found("workers=1"), found("workers=4", "split=windows")
    assert (plan.tokens, own.tokens) == (6 * 128, 2 * 128)
    assert four.parts["forward"] == pytest.approx(one.parts["forward"] / 3)
    assert four.parts["statistics"] == pytest.approx(one.parts["statistics"] / 3)
    assert plan.device_bytes - own.device_bytes >= 4 * 128 * plan.token_bytes
    grams = 2 * (6 * 128**2 + 224**2) * 2  # bytes of halves, added up in quarters, which are then sent
    weights = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 224 * 128) * 4
    assert four.traffic == grams * 2 * 3 // 4 + weights * 3 // 4
    (_, one), (_, four) = found("recover=blocks", "workers=1"), found("recover=blocks", "workers=4", "split=windows")
    assert four.parts["recovery"] == pytest.approx(one.parts["recovery"] / 3)


def test_a_plan_shares_the_training(models: dict[str, Path], configure: Any) -> None:
    one, four = (
        planned(models, configure, "metric=wanda", "recover=blocks", "calib.seq_len=128", f"workers={count}")
        for count in (1, 4)
    )
    assert four.parts["recovery"] == pytest.approx(one.parts["recovery"] / 4)
    assert four.parts["forward"] == one.parts["forward"]
    long = planned(models, configure, "metric=wanda", "recover=blocks", "calib.seq_len=512", "workers=4")
    assert long.parts["recovery"] == one.parts["recovery"], "a step of one window has nothing to share"
    assert four.traffic > one.traffic == 0


def test_a_plan_shares_the_statistics_of_many_tokens(models: dict[str, Path], configure: Any) -> None:
    """On GPUs rows of what CosP multiplies sooner than x xT, which must be sent."""

    def parts(workers: int, tokens: int) -> AtScale:
        return planned(models, configure, "metric=ace", f"workers={workers}", tokens=tokens)

    def saved(tokens: int) -> float:
        return parts(1, tokens).parts["statistics"] - parts(4, tokens).parts["statistics"]

    weights, grams = 2 * (2 * 128**2 + 2 * 64 * 128 + 3 * 224 * 128), 2 * (6 * 128**2 + 224**2)
    assert saved(SHARED_TOKENS - 1) == 0
    assert saved(SHARED_TOKENS) == pytest.approx(SHARED_TOKENS * 2 * weights * 0.75 / 4e13)
    assert saved(8192) == pytest.approx(8192 * (2 * weights + grams) * 0.75 / 4e13)
    few, several, many = (parts(4, tokens).traffic for tokens in (1, SHARED_TOKENS, 8192))
    assert (several - few, many - few) == (0, 2 * grams * 3 // 4)  # bytes of halves of the matrices


def test_plans_at_scale_are_said_and_their_faults_too(
    models: dict[str, Path], tmp_path: Path, here: Callable[..., Any]
) -> None:
    base = [f"model.path={models['llama']}", "metric=ace", "calib=self", "eval=none", f"output_dir={tmp_path / 'out'}"]
    said = here(*base, "dry_run=true", "workers=16", "hardware=h100x8")
    assert said.returncode == 0, said.stderr
    assert "16 workers on 2 machines: about" in said.stdout
    assert "computes     on cuda in" in said.stdout
    assert "windows      each of" not in said.stdout
    said = here(*base, "dry_run=true", "workers=16", "hardware=h100x8", "split=windows", "metric=wanda")
    assert "windows      each of 16 workers has its own, 8 at most: sums, and so bytes, depend on" in said.stdout
    assert not (tmp_path / "out").exists()
    (tmp_path / "card.yaml").write_text("device: cuda\nworkers: 0\n")
    for overrides, word in (
        (["workers=2"], "torchrun decides"),
        (["dry_run=true", "hardware=h100"], "neither a card nor a file. Did you mean 'h100x8'?"),
        (["dry_run=true", f"hardware={tmp_path / 'card.yaml'}"], "Begin with a copy of"),
        (["dry_run=true", "workers=0"], "workers=0: must be 1 up to"),
    ):
        refused = here(*base, *overrides)
        assert refused.returncode == 2
        assert word in refused.stderr
