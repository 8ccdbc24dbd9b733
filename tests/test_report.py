"""The report of a run, its Markdown, and the table of a sweep."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ace_cli.core.errors import AceError
from ace_cli.evaluation.dense import DenseCache
from ace_cli.report import facts
from ace_cli.report.facts import SCHEMA_VERSION, Perplexity, Report
from ace_cli.report.markdown import gigabytes, render, table, windows_line
from ace_cli.report.sweep import JobRecord, gather

Prune = Callable[..., Report]


@pytest.fixture(scope="module")
def finished(llama: Path, tmp_path_factory: pytest.TempPathFactory, documents: Path) -> tuple[Report, Path]:
    """One evaluated run, shared by the tests here."""
    from running import composed

    from ace_cli.report.terminal import Terminal
    from ace_cli.run.pipeline import run

    out = tmp_path_factory.mktemp("report") / "out"
    config = composed(
        "model=custom", f"model.path={llama}", f"output_dir={out}", "metric=wanda", "sparsity=2:4", "calib=text",
        f"calib.path={documents}", "calib.n_samples=8", "eval=text", f"eval.path={documents}", "eval.seq_len=32",
        "eval.max_windows=5", "device=cpu",
    )  # fmt: skip
    report = run(config, "ace-prune the command", Terminal(), DenseCache())
    assert report is not None
    return report, out


def test_report_json_has_what_scripts_rely_on(finished: tuple[Report, Path]) -> None:
    report = json.loads((finished[1] / "report.json").read_text())
    assert report == json.loads(json.dumps(dataclasses.asdict(finished[0])))
    assert report["schema_version"] == SCHEMA_VERSION
    assert report["command"] == "ace-prune the command"
    assert report["perplexity"]["dense"] > 1
    assert report["perplexity"]["pruned"] > 1
    assert report["sparsity"]["achieved"] == 0.5
    assert {"import", "calibrate", "prune", "write", "evaluate", "total"} <= report["seconds"].keys()
    assert all(value >= 0 for value in report["seconds"].values())
    parts = sum(value for name, value in report["seconds"].items() if name != "total")
    assert parts <= report["seconds"]["total"] + 0.5
    assert report["peak_memory_bytes"]["host"] > 10_000_000
    assert report["peak_memory_bytes"]["device"] == 0
    assert len(report["slots"]) == 14
    assert {slot["sparsity"] for slot in report["slots"]} == {0.5}
    assert report["tokens_per_second"]["prune"] > 0
    assert report["bytes_on_disk"]["dense"] == pytest.approx(report["bytes_on_disk"]["pruned"], rel=0.01)


def test_the_protocol_says_what_was_measured(finished: tuple[Report, Path]) -> None:
    protocol = finished[0].perplexity.protocol
    assert protocol is not None
    assert (protocol.dataset, protocol.seq_len, protocol.windows, protocol.tokens) == ("pages.jsonl", 32, 5, 160)
    assert (protocol.all_windows, protocol.dtype) == (False, "float32")


def test_perplexities_are_those_of_the_files(finished: tuple[Report, Path], llama: Path, documents: Path) -> None:
    """Recomputed with transformers alone."""
    from test_streamed import perplexity_of
    from tiny_models import load

    from ace_cli.data.documents import consecutive_windows, load_tokenizer
    from ace_cli.data.text_files import local_documents
    from ace_cli.model.files import Checkpoint

    text = "\n\n".join(local_documents(str(documents), "text"))
    windows = consecutive_windows(text, load_tokenizer(Checkpoint(llama)), 32)[:5]
    numbers = finished[0].perplexity
    assert numbers.dense == pytest.approx(perplexity_of(load(llama), windows), rel=1e-4)
    assert numbers.pruned == pytest.approx(perplexity_of(load(finished[1] / "checkpoint"), windows), rel=1e-4)
    assert numbers.ratio == pytest.approx(numbers.pruned / numbers.dense)
    dense, pruned = load(llama), load(finished[1] / "checkpoint")
    expected = [perplexity_of(pruned, ids[None]) / perplexity_of(dense, ids[None]) for ids in windows]
    assert numbers.ratio_by_window == pytest.approx(expected, rel=1e-4)


def test_the_windows_are_summed_up(finished: tuple[Report, Path]) -> None:
    def line(*ratios: float) -> str:
        return windows_line(dataclasses.replace(finished[0], perplexity=Perplexity(ratio_by_window=list(ratios))))

    # logarithms 0, 0 and 3 ln 2: standard deviation sqrt(3) ln 2, over sqrt(3) windows
    assert line(1.0, 8.0, 1.0) == (
        "Window by window the ratio is 1.000 to 8.000, 1.000 in the median; standard error of the mean 69.3%."
    )
    assert line(2.0) == line() == ""


def test_report_md_shows_it(finished: tuple[Report, Path]) -> None:
    text = (finished[1] / "report.md").read_text()
    assert text == render(finished[0])
    report = finished[0]
    assert report.perplexity.dense is not None
    for expected in ("ace-prune the command", f"{report.perplexity.dense:.3f}", "5 windows of 32 tokens", "torch",
                     "model.layers.1.mlp.down_proj.weight", "sparsity: '2:4'"):  # fmt: skip
        assert expected in text


def test_the_log_tells_the_run(finished: tuple[Report, Path]) -> None:
    log = (finished[1] / "run.log").read_text()
    assert "$ ace-prune the command" in log
    assert f"{finished[0].perplexity.pruned:.3f}" in log
    assert str(finished[1]) in log


def test_without_evaluation_nothing_is_invented(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    report = prune_here(llama, tmp_path / "out", "metric=magnitude")
    assert (report.perplexity.dense, report.perplexity.pruned, report.perplexity.protocol) == (None, None, None)
    assert report.calibration is None
    assert "not measured" in render(report)


def test_tables_and_numbers() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"
    assert gigabytes(1_234_000_000) == "1.23 GB"


def test_a_report_is_read_as_it_was_written(finished: tuple[Report, Path]) -> None:
    report, folder = finished
    assert facts.load(folder / "report.json") == json_like(report)


@pytest.mark.parametrize("junk", ["", "[]", "null", "{", "[" * 100_000, "{}", '{"versions": [], "config": 5}'])
def test_what_is_no_report_is_refused_in_one_line(tmp_path: Path, junk: str) -> None:
    (tmp_path / "report.json").write_text(junk)
    with pytest.raises(AceError, match=r"report\.json") as caught:
        facts.load(tmp_path / "report.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["blocks", "seconds", "perplexity", "versions", "samples", "timeline", "command"])
def test_a_part_of_a_report_of_the_wrong_type_is_named(
    finished: tuple[Report, Path], tmp_path: Path, name: str
) -> None:
    content = json.loads((finished[1] / "report.json").read_text())
    for junk in (5, [5], {"x": []}, None):
        (tmp_path / "report.json").write_text(json.dumps({**content, name: junk}))
        with pytest.raises(AceError, match=name):
            facts.load(tmp_path / "report.json")


def json_like(report: Report) -> Report:
    """Tuples become lists in JSON."""
    return dataclasses.replace(report, slots=json.loads(json.dumps(report.slots)))


# --- sweeps ----------------------------------------------------------------------------------------------------------


def by(report: Report, metric: str) -> Report:
    return dataclasses.replace(report, method={**report.method, "metric": metric})


def changed(report: Report, **protocol: Any) -> Report:
    assert report.perplexity.protocol is not None
    new = dataclasses.replace(report.perplexity.protocol, **protocol)
    return dataclasses.replace(report, perplexity=dataclasses.replace(report.perplexity, protocol=new))


def test_a_sweep_keeps_unlike_protocols_apart(finished: tuple[Report, Path], tmp_path: Path) -> None:
    """Perplexities of different windows never stand in one table."""
    JobRecord(tmp_path, 0, ["metric=wanda", "seed=1"]).finish(by(finished[0], "wanda"))
    JobRecord(tmp_path, 1, ["metric=ria", "seed=1"]).finish(by(finished[0], "ria"))
    JobRecord(tmp_path, 2, ["metric=varp", "seed=1"]).finish(by(changed(finished[0], seq_len=64), "varp"))
    JobRecord(tmp_path, 3, ["metric=ace", "seed=1"]).fail("It broke.")
    sweep = gather(tmp_path)
    sweep.write()
    tables = (tmp_path / "sweep.md").read_text().partition("\n\n")[2].strip().split("\n\n## ")
    assert len(tables) == 3
    assert tables[1].splitlines()[2].startswith("| job | metric | perplexity | dense | ratio |")
    assert tables[1].splitlines()[4].startswith("| 2 | varp |"), "what tells it from the runs of other tables"
    assert [sum(name in text for name in ("wanda", "ria", "varp", "ace")) for text in tables] == [2, 1, 1]
    assert "It broke." in tables[2]
    assert "seed" not in tables[0], "what does not vary needs no column"
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert [("error" in job) for job in content["jobs"]] == [False, False, False, True]
    assert sweep.failed == 1
