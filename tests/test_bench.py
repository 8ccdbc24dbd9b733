"""ace-bench and bench=true: every engine measured the same way, ratios within rounds, honest words."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gguf import byte_level, exported
from test_packed import make_sparse
from tiny_models import make

from ace_cli.cli.bench import main
from ace_cli.core.errors import AceError
from ace_cli.evaluation.speed import engines
from ace_cli.evaluation.speed.engines import Subject, holds_2_of_4, subjects
from ace_cli.evaluation.speed.measure import measure, spread, turns
from ace_cli.evaluation.speed.options import Bench
from ace_cli.export.packed import pack_folder
from ace_cli.kernels.bitmask import why_slow
from ace_cli.report.facts import SpeedFacts, Spread
from ace_cli.report.speed import gain, speed_rows
from ace_cli.run import config
from ace_cli.run import speed as run_speed

CPU = torch.device("cpu")
packed_here = pytest.mark.skipif(
    why_slow(torch.bfloat16) != "", reason=f"no packed product: {why_slow(torch.bfloat16)}"
)


class Clockwork:
    """A model whose tokens take as long as it is told."""

    vocabulary = 50

    def __init__(self, first: float, each: float, asked: list[Any]) -> None:
        self.first, self.each, self.asked = first, each, asked

    def write(self, ids: list[int], count: int) -> tuple[float, float]:
        self.asked.append((self, ids))
        return self.first, self.each * (count - 1)


def test_times_are_those_of_the_models_in_turn() -> None:
    asked: list[Any] = []
    models = [Clockwork(2.0, 0.5, asked), Clockwork(4.0, 0.25, asked)]
    steps: list[int] = []
    found = measure(
        [Subject(f"m{i}", "e", 7, lambda model=model: model) for i, model in enumerate(models)],  # type: ignore[misc]
        Bench(prompt=20, new=5, rounds=3), CPU, lambda: steps.append(1),
    )  # fmt: skip
    dense, pruned = found.entries
    assert (dense.first_token.median, dense.prefill.median, dense.decode.median) == (2.0, 10.0, 2.0)
    assert (pruned.prefill_ratio.median, pruned.decode_ratio.median) == (0.5, 2.0)
    assert [model for model, _ in asked] == [models[0], models[1]] * 4  # one that does not count, three rounds
    assert all(len(ids) == 20 and min(ids) >= 3 and max(ids) < 50 for _, ids in asked)
    assert len(steps) == turns([None] * 2, Bench(rounds=3)) == 8  # type: ignore[list-item]


def test_spread_is_median_and_quartiles() -> None:
    assert spread([5.0]) == Spread(5.0, 5.0, 5.0)
    assert spread([1.0, 2.0, 3.0, 4.0, 100.0]) == Spread(3.0, 2.0, 4.0)


def entry(decode: tuple[float, float, float], resident: int = 100, file: int = 100) -> SpeedFacts:
    same = Spread(1.0, 0.9, 1.1)
    return SpeedFacts("m", "e", same, same, same, same, Spread(*decode), resident, file)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (entry((1.0, 0.99, 1.01)), "no gain"),
        (entry((1.4, 1.0, 1.5)), "no gain"),  # the rounds do not agree
        (entry((1.4, 1.3, 1.5)), "decode 1.40x (1.30-1.50)"),
        (entry((0.5, 0.4, 0.6)), "no gain, slower decode 0.50x (0.40-0.60)"),
        (entry((1.0, 1.0, 1.0), 60, 56), "memory 0.60x, files 0.56x"),
        (entry((2.0, 1.9, 2.1), 150), "decode 2.00x (1.90-2.10), more memory 1.50x"),
    ],
)
def test_only_what_the_rounds_agree_on_is_a_gain(found: SpeedFacts, words: str) -> None:
    assert gain(found, entry((1.0, 1.0, 1.0))) == words


@pytest.mark.parametrize(
    ("bench", "fault"), [(Bench(prompt=0), "prompt=0"), (Bench(rounds=-1), "rounds=-1"), (Bench(new=1), "2 tokens")]
)
def test_numbers_that_make_no_sense_are_faults(bench: Bench, fault: str) -> None:
    assert any(fault in line for line in bench.faults())


# --- engines ------------------------------------------------------------------------------------------------------


def test_what_a_gpu_may_multiply_as_2_of_4() -> None:
    weight = torch.ones(32, 64)
    assert not holds_2_of_4(weight)
    weight.view(-1, 4)[:, 1:3] = 0
    assert holds_2_of_4(weight)
    assert not holds_2_of_4(weight[:, :32].contiguous())  # too narrow a tile
    weight[3, 1] = 1
    assert not holds_2_of_4(weight)


def test_a_dense_model_is_for_transformers_alone(llama: Path) -> None:
    assert [subject.engine for subject in subjects("x", llama, CPU, None, 10)] == ["transformers, float32"]


@pytest.mark.parametrize("options", [
    ("unit=channel", "unit.uneven=true", "allocation=angular", "unit.multiple=16", "sparsity=30%"), ("unit=hidden",),
    ("unit=rank", "unit.factors=true"),
])  # fmt: skip
def test_shapes_that_transformers_has_not_are_measured_too(
    llama: Path, tmp_path: Path, prune_here: Any, options: tuple[str, ...]
) -> None:
    report = prune_here(llama, tmp_path / "out", *options)
    folder = Path(report.stages["factors"]["result"]) if "factors" in report.stages else Path(report.checkpoint)
    found = subjects("x", folder, CPU, None, 10)
    assert [subject.engine for subject in found] == ["transformers, float32"]
    measured = measure(found, Bench(prompt=5, new=3, rounds=1), CPU)
    assert all(entry.decode.median > 0 for entry in measured.entries)


@packed_here
def test_a_pruned_model_is_measured_packed_too(llama: Path, tmp_path: Path, prune_here: Any) -> None:
    report = prune_here(llama, tmp_path / "out", "metric=magnitude", "pack=true")
    found = [
        subject
        for path in (llama, Path(report.checkpoint), tmp_path / "out" / "packed")
        for subject in subjects(path.name, path, CPU, None, 10)
    ]
    assert [s.engine.split(",")[0] for s in found] == ["transformers", "transformers", "packed", "packed"]
    assert found[3].file_bytes < 0.8 * found[2].file_bytes
    measured = measure(found, Bench(prompt=5, new=3, rounds=1), CPU)
    assert all(entry.decode.median > 0 and entry.first_token.median > 0 for entry in measured.entries)
    assert [row[0] for row in speed_rows(measured)] == [llama.name, "checkpoint", "checkpoint", "packed"]


def test_a_missing_engine_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(engines, "find_spec", lambda _: None)
    with pytest.raises(AceError, match=r"model\.gguf: llama\.cpp is not installed\. pip install xllamacpp"):
        subjects("x", tmp_path / "model.gguf", CPU, None, 10)


@pytest.mark.skipif(engines.no_llama_cpp() != "", reason="llama.cpp is not installed")
def test_llama_cpp_is_measured_too(tmp_path: Path) -> None:
    source = byte_level(make(tmp_path / "plain", "llama", vocab_size=310, bos_token_id=0, eos_token_id=1))
    file = exported(source, tmp_path / "out", "f16")
    found = [*subjects("plain", source, CPU, None, 100), *subjects("gguf", file, CPU, None, 100)]
    measured = measure(found, Bench(prompt=5, new=3, rounds=1), CPU)
    assert [entry.engine for entry in measured.entries] == ["transformers, float32", "llama.cpp"]
    assert measured.entries[1].decode.median > 0


@pytest.mark.skipif(engines.no_llama_cpp() != "", reason="llama.cpp is not installed")
def test_a_gguf_file_without_a_tokenizer_does_not_end_the_process(tmp_path: Path) -> None:
    file = exported(make(tmp_path / "plain", "llama"), tmp_path / "out")
    with pytest.raises(AceError, match="has no tokenizer"):
        engines._Xllamacpp(file, 10)


def test_a_broken_gguf_file_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(file: Path, context: int) -> Any:
        raise ValueError("bad magic\nand more")

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(engines, "_LLAMA_CPP", {"json": broken})
    with pytest.raises(AceError, match=r"llama\.cpp cannot load .*model\.gguf: bad magic\. Is it a whole file"):
        subjects("x", tmp_path / "model.gguf", CPU, None, 10)[0].load()


def test_what_does_not_fit_into_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject("x", "e", 10**15, lambda: pytest.fail("loaded"))  # type: ignore[arg-type, return-value]
    with pytest.raises(AceError, match=r"2 models side by side need 2000000\.0 GB"):
        measure([subject, subject], Bench(), CPU)


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_sparse(tmp_path / "plain")
    pack_folder(folder, tmp_path / "packed")
    out = tmp_path / "speed.json"
    options = ["--prompt", "5", "--new", "3", "--rounds", "2", "--threads", "1", "--device", "cpu", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["ace-bench", str(folder), str(tmp_path / "packed"), *options])
    main()
    assert "3 tokens after a prompt of 5, on 1 threads" in capsys.readouterr().out.replace("\n", " ")
    found = json.loads(out.read_text())
    assert [entry["engine"] for entry in found["entries"]] == ["transformers, bfloat16", "packed, bfloat16"]
    assert found["entries"][0]["decode_ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rounds", "0"], "--rounds 0: must be 1 or more"),
        (["--threads", "0"], "--threads 0: must be 1 or more"),
        (["--json", "/nowhere/x.json"], "there is no such folder"),
        (["nowhere-at-all"], "nowhere-at-all does not exist"),
    ],
)
def test_faults_are_one_line(
    options: list[str], words: str, llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ace-bench", str(llama), *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


# --- as a part of a run -------------------------------------------------------------------------------------------


@packed_here
def test_a_run_measures_its_results(llama: Path, tmp_path: Path, prune_here: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(config, "Bench", lambda: Bench(prompt=5, new=3, rounds=2))
    report = prune_here(llama, tmp_path / "out", "metric=magnitude", "pack=true", "bench=true", "html=true")
    found = [(entry.model, entry.engine) for entry in report.speed.entries]
    kinds = ["transformers, float32", "transformers, float32", "packed, float32"]
    assert found == list(zip(["dense", "pruned", "packed"], kinds, strict=True))
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| packed | packed, float32 |" in text
    assert "packed (packed, float32) against dense: " in text
    assert "2 rounds: medians in tokens a second" in text
    assert report.seconds["bench"] > 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "packed (packed, float32) against dense: " in page
    assert report.stages["packed"]["summary"] in page


def test_a_bench_that_does_not_fit_is_refused_before_work(
    llama: Path, tmp_path: Path, prune_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "Bench", lambda: Bench(prompt=5, new=3, rounds=2))
    monkeypatch.setattr(run_speed.memory, "free", lambda: 100)
    with pytest.raises(AceError, match="bench=true holds up to three models in memory"):
        prune_here(llama, tmp_path / "out", "metric=magnitude", "bench=true")
    assert not (tmp_path / "out").exists()


def test_more_tokens_than_positions_are_refused(llama: Path) -> None:
    with pytest.raises(AceError, match="has 128 positions, 129 were asked for"):
        subjects("x", llama, CPU, None, 129)
