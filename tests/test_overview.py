"""Many runs side by side: groups by protocol, the two pictures, ace-report, and what a sweep ends with."""

from __future__ import annotations

import copy
import csv
import itertools
import json
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import browser, look
from matplotlib.text import Text
from omegaconf import OmegaConf
from running import Terminal, composed, run

from ace_cli.cli import report as overview
from ace_cli.evaluation.dense import DenseCache
from ace_cli.report import html, near, plots
from ace_cli.report import overview as pages
from ace_cli.report.collect import NUMBERS, Group, Point, Row, find, groups, row, varied
from ace_cli.report.sweep import Sweep
from ace_cli.run.config import config_folder

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def one(llama: Path, tmp_path_factory: pytest.TempPathFactory, documents: Path) -> dict[str, Any]:
    """A real report, to make variants of."""
    out = tmp_path_factory.mktemp("one") / "out"
    config = composed(
        "model=custom", f"model.path={llama}", f"output_dir={out}", "metric=wanda", "calib=self", "calib.n_samples=8",
        "eval=text", f"eval.path={documents}", "eval.seq_len=32", "eval.max_windows=3", "device=cpu", "html=false",
        "samples.prompts=[w5]",
    )  # fmt: skip
    assert run(config, "test", Terminal(), DenseCache()) is not None
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


@pytest.fixture
def runs(one: dict[str, Any], tmp_path: Path) -> Path:
    """Two metrics at three lengths under one protocol, and one run under another."""
    for number, (metric, length, perplexity, seconds) in enumerate([
        ("wanda", 16, 9.0, 1.0), ("wanda", 32, 8.0, 2.0), ("wanda", 128, 7.5, 4.0),
        ("varp", 16, 8.5, 1.5), ("varp", 32, 8.1, 3.0), ("varp", 128, 7.9, 5.0), ("varp", 16, 3.0, 1.0),
    ]):  # fmt: skip
        report = copy.deepcopy(one)
        report["method"]["metric"] = metric
        report["calibration"]["seq_len"] = length
        report["perplexity"]["pruned"] = perplexity
        report["seconds"] |= {"prune": seconds, "write": 0.0}
        if number == 6:
            report["perplexity"]["protocol"]["fingerprint"] = "f" * 64
        (tmp_path / "runs" / str(number)).mkdir(parents=True)
        (tmp_path / "runs" / str(number) / "report.json").write_text(json.dumps(report))
    return tmp_path / "runs"


def test_unlike_protocols_stand_apart(runs: Path) -> None:
    found = groups(find([runs]))
    assert [len(group.rows) for group in found] == [6, 1]
    assert found[0].varied == ["metric", "calib.seq_len"]
    head, lines = found[0].cells()
    assert head[:3] == ["metric", "calib.seq_len", "perplexity"]
    assert lines[0][:3] == ["wanda", "16", "9.000"]
    assert "3.000" not in json.dumps(lines)


def run_of(one: dict[str, Any], metric: str, typed: dict[str, str], **options: Any) -> Row:
    report = copy.deepcopy(one)
    report["method"] |= {"metric": metric, "metric_options": options}
    if metric == "magnitude":
        report["calibration"] = None
    return row(Path("report.json"), report, typed)


def test_columns_are_the_overrides_in_which_runs_differ(one: dict[str, Any]) -> None:
    wanda, magnitude = run_of(one, "wanda", {}), run_of(one, "magnitude", {})
    raw, share = (run_of(one, "varp", {}, norm=norm, form="norms") for norm in ("raw", "share"))
    assert varied([wanda, raw]) == ["metric"], "one metric's options tell nothing beside another metric"
    assert varied([raw, wanda, share]) == ["metric", "metric.norm"]
    (group,) = groups([raw, wanda, share])
    assert [line[:2] for line in group.cells()[1]] == [["varp", "raw"], ["wanda", ""], ["varp", "share"]]
    assert varied([wanda, magnitude]) == ["metric"], "a run without calibration has no windows to differ in"
    longer = run_of(one, "wanda", {"calib.continue_to": "64", "sparsity": "50%", "model.revision": "a"})
    assert varied([longer, wanda]) == ["model.revision", "calib.continue_to"], "what was typed, and not told yet"
    assert varied([longer, wanda], always=("sparsity", "job")) == ["model.revision", "sparsity", "calib.continue_to"]


def test_rows_of_methods_are_sorted_and_others_as_asked_for(one: dict[str, Any], tmp_path: Path) -> None:
    for option, expected in (("recipe", ["1", "0"]), ("metric", ["0", "1"])):
        sweep = Sweep(tmp_path)
        for number, (name, value) in enumerate((("a", 9.0), ("b", 4.0))):
            report = copy.deepcopy(one)
            report["perplexity"]["pruned"] = value
            sweep.add(number, {"overrides": [f"{option}={name}"], "report": report, "objection": None})
        (group,) = sweep._groups()
        assert [row.choices["job"] for row in group.rows] == expected


def test_what_a_report_s_command_says_is_shown(runs: Path) -> None:
    report = json.loads((runs / "0" / "report.json").read_text())
    report["command"] = "ace-prune --config-dir=x model=smollm2 'include=*.q_proj.*' html=false eval.limit=5"
    (runs / "0" / "report.json").write_text(json.dumps(report))
    first, second, *_ = find([runs])
    assert (first.choices["model"], first.choices["include"]) == ("smollm2", "*.q_proj.*")
    assert set(first.choices) - set(second.choices) == {"include"}


def test_mean_accuracies_are_shown_in_per_cent_with_their_error(one: dict[str, Any]) -> None:
    report = copy.deepcopy(one)
    task = {"name": "rte", "fingerprint": "abcdef012345"}
    average = {"pruned": {"value": 0.5, "stderr": 0.0123}, "dense": {"value": 0.625, "stderr": None}}
    report["zero_shot"] = {"tasks": [task], "average": average, "dtype": "float32"}
    (group,) = groups([row(Path("report.json"), report, {})])
    shown = dict(zip(*(part if index == 0 else part[0] for index, part in enumerate(group.cells())), strict=True))
    assert (shown["tasks"], shown["dense tasks"]) == ("50.0 ± 1.2", "62.5")
    assert "1 zero-shot tasks (rte:abcdef), float32" in group.protocol


def test_lines_over_length_are_means_over_seeds(runs: Path) -> None:
    group = groups(find([runs]))[0]
    assert group.lengths() == {"wanda": [(16, 9.0), (32, 8.0), (128, 7.5)], "varp": [(16, 8.5), (32, 8.1), (128, 7.9)]}
    again = copy.deepcopy(group.rows[0])
    again.numbers["perplexity"] = 10.0
    group.rows.append(again)
    assert group.lengths()["wanda"][0] == (16, 9.5)
    assert groups(find([runs / "0"]))[0].lengths() == {}


def test_the_front_is_what_nothing_beats(runs: Path) -> None:
    ((_, points),) = groups(find([runs]))[0].times().items()
    assert {(each.x, each.y) for each in points if each.best} == {(1.0, 9.0), (1.5, 8.5), (2.0, 8.0), (4.0, 7.5)}


def test_machines_do_not_share_a_time_plot(runs: Path) -> None:
    group = groups(find([runs]))[0]
    group.rows[0].machine = group.rows[1].machine = "another"
    assert sorted(len(points) for points in group.times().values()) == [2, 4]


def test_ace_report_writes_everything(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overview.main([str(runs), "--format", "md", "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert text.count("\n## ") + text.startswith("## ") == 2
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"overview.html", "overview.md", "overview.csv", "overview.json", "overview_length.png",
                     "overview_bars.png", "overview_time.png"}  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "out" / "overview.csv").open()))
    assert [row["metric"] for row in rows] == ["wanda"] * 3 + ["varp"] * 4
    assert [float(row["perplexity"]) for row in rows] == [9.0, 8.0, 7.5, 8.5, 8.1, 7.9, 3.0]
    content = json.loads((tmp_path / "out" / "overview.json").read_text())
    assert [len(group["runs"]) for group in content["groups"]] == [6, 1]
    page = (tmp_path / "out" / "overview.html").read_text()
    assert page.count("<svg") == 3
    assert not re.search(r'(?:src|href)="(?!#|data:)', page)
    assert (tmp_path / "out" / "overview_time.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("form", ["terminal", "md", "csv", "json"])
def test_every_form_shows_the_numbers(runs: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    overview.main([str(runs / "0"), "--format", form])
    assert "9.0" in capsys.readouterr().out


def test_folders_without_reports_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "report.json").write_text("{}")
    for folder in ("nothing", "old"):
        with pytest.raises(SystemExit) as caught:
            overview.main([str(tmp_path / folder)])
        assert caught.value.code == 2
        err = capsys.readouterr().err
        assert folder in err
        assert err.count("\n") == 1


def test_the_page_in_a_browser(runs: Path, tmp_path: Path) -> None:
    overview.main([str(runs), "--out", str(tmp_path / "out")])
    with browser() as session:
        for scheme in ("light", "dark"):
            seen = look(session, tmp_path / "out" / "overview.html", 390, scheme)
            assert seen["errors"] == []
            assert seen["width"] <= 390
        for width, columns in ((1280, True), (400, False)):
            look(session, tmp_path / "out" / "overview.html", width)
            first, second = session.execute_script(
                "return [...document.querySelectorAll('.side')[0].children].slice(0, 2).map("
                "cell => [cell.getBoundingClientRect().x, cell.getBoundingClientRect().y])"
            )
            assert (first[1] == second[1], first[0] < second[0]) == (columns, columns), (
                "side by side, or one below other"
            )
        session.execute_script("document.querySelectorAll('th.sort button')[2].click()")
        order = "return [...document.querySelector('.runs').rows].slice(1).map(row => row.cells[2].textContent)"
        assert session.execute_script(order) == ["7.500", "7.900", "8.000", "8.100", "8.500", "9.000"]
        session.execute_script("document.querySelectorAll('th.sort button')[2].click()")
        assert session.execute_script(order)[0] == "9.000"


def test_ace_report_needs_no_torch(command: Command, tmp_path: Path, runs: Path) -> None:
    import sys

    code = (
        f"import sys; from ace_cli.cli.report import main; main([{str(runs)!r}]); "
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


# --- sweeps ----------------------------------------------------------------------------------------------------------


def test_a_sweep_ends_with_a_page_and_its_failures(here: Command, llama: Path, tmp_path: Path) -> None:
    done = here(
        "-m", f"model.path={llama}", "metric=wanda,varp", "sparsity=3:7,2:4", "calib=self", "calib.n_samples=8",
        "eval=self", "eval.seq_len=16", "eval.max_windows=4", "output_dir=sweep", "samples.prompts=[w5]", "html=false",
    )  # fmt: skip
    assert done.returncode == 1
    page = (tmp_path / "sweep" / "sweep.html").read_text()
    assert page.count("failed:") == 2
    assert "64 inputs" in page
    assert "What they write" in page
    assert (tmp_path / "sweep" / "sweep_time.png").is_file()


def test_a_page_of_many_runs_has_verdicts_links_and_a_heat_map(runs: Path, tmp_path: Path) -> None:
    for number, sparsity in enumerate(("0.5", "2:4", "0.5", "2:4")):
        file = runs / str(number) / "report.json"
        report = json.loads(file.read_text())
        report["method"] |= {"metric": ("wanda", "varp")[number // 2], "pattern": sparsity}
        report["calibration"]["seq_len"] = 16
        report["perplexity"] |= {"pruned": 10.0 + number, "ratio": 1.0 + number}
        file.write_text(json.dumps(report))
        (runs / str(number) / "report.html").write_text("")
    overview.main([*(str(runs / str(number)) for number in range(4)), "--out", str(tmp_path / "out")])
    page = (tmp_path / "out" / "overview.html").read_text()
    assert '<a href="../runs/3/report.html">report</a>' in page
    assert re.findall(r'class="badge (\w+)">([a-z ]+)<', page)[0] == ("good", "as good as dense")
    assert '<td class="n best">10.000</td>' in page
    assert re.search(r"<th>wanda</th><td style=[^>]*\b0%[^>]*>10.00</td><td style=[^>]*\b0%", page)
    assert re.search(r"<th>varp</th><td style=[^>]*\b16%[^>]*>12.00</td>", page), "60 % log2(12 / 10)"


def variants(one: dict[str, Any], folder: Path, **patterns: float) -> Path:
    """Runs of two metrics for each pattern, with so much gone; the second metric is a little better."""
    for number, (pattern, gone) in enumerate(patterns.items()):
        for place, metric in enumerate(("wanda", "varp")):
            report = copy.deepcopy(one)
            report["method"] |= {"metric": metric, "pattern": pattern}
            report["sparsity"] |= {"achieved": gone, "model": gone / 2}
            report["perplexity"] |= {"dense": 8.0, "pruned": 16.0 + 16 * number - place}
            report["perplexity"]["ratio"] = report["perplexity"]["pruned"] / 8
            (folder / f"{number}{metric}").mkdir(parents=True)
            (folder / f"{number}{metric}" / "report.json").write_text(json.dumps(report))
    return folder


def test_patterns_stand_in_order_and_sizes_are_what_is_left(one: dict[str, Any], tmp_path: Path) -> None:
    (group,) = groups(find([variants(one, tmp_path, **{"2:4": 0.5, "0.6": 0.6, "0.5": 0.5})]))
    assert group.methods("perplexity") == {
        "0.5": {"wanda": 48, "varp": 47}, "0.6": {"wanda": 32, "varp": 31}, "2:4": {"wanda": 16, "varp": 15},
    }  # fmt: skip
    what, points = group.sizes()
    assert what == "million parameters that are not zero"
    assert {(each.pattern, each.name) for each in points if each.best} == {(of, "varp") for of in ("0.5", "0.6", "2:4")}
    assert points[0].x == pytest.approx(one["model"]["parameters"] * 0.75 / 1e6)
    group.rows[0].bytes *= 2
    assert group.sizes()[0].startswith("GB on disk")
    pictures = [each.kind for each in pages._pictures(group, trials=False)]
    assert pictures == ["bars", "sparsity", "time", "size"]


def test_a_name_covers_no_point_and_no_other_name() -> None:
    """Twelve runs in a heap, all of them named."""
    points = [Point(f"method {n}", 1 + n % 4 / 50, 10 + n // 4 / 5, "0.5", not n) for n in range(12)]
    with plots._style(plots._INK):
        figure = plots._figure(plots.front_plot(points, "seconds"), 4.0, plots.WIDTH)
        figure.draw_without_rendering()
        renderer = figure.canvas.get_renderer()
        boxes = {note.get_text(): Text.get_window_extent(note, renderer) for note in figure.axes[0].texts}
        places = [figure.axes[0].transData.transform((each.x, each.y)) for each in points]
    assert set(boxes) == {each.name for each in points}
    for (name, box), (other, another) in itertools.combinations(boxes.items(), 2):
        assert plots._common(box, another) < 1, (name, other)
    assert not [name for name, box in boxes.items() if any(box.contains(*place) for place in places)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["wanda", "wanda sparsegpt damping=0.01 allocation=owl seq_len=128"])
def test_long_names_leave_room_for_bars(name: str) -> None:
    groups = {of: {f"{name} {n}": 20.0 * (n + 2) for n in range(3)} for of in ("0.5", "2:4")}
    with plots._style(plots._INK):
        figure = plots._figure(plots.grouped(groups, 19.0), plots.grouped_height(groups), plots.WIDTH)
        figure.draw_without_rendering()
    assert figure.axes[0].get_window_extent().width > 0.55 * figure.bbox.width


def test_each_run_of_a_sweep_is_shown_beside_the_others(one: dict[str, Any], tmp_path: Path) -> None:
    folder = variants(one, tmp_path, **{"0.5": 0.5, "0.6": 0.6})
    stranger = copy.deepcopy(one)
    stranger["model"]["fingerprint"] = "another"
    (folder / "stranger").mkdir()
    (folder / "stranger" / "report.json").write_text(json.dumps(stranger))
    (folder / "junk").mkdir()
    (folder / "junk" / "report.json").write_text("{")
    own = folder / "1varp"
    found = near.beside(own)
    assert len(found) == 5
    section = near.place(found, own)
    assert "4 runs of this model" in section
    assert "this run, 3.88" in section
    assert near.place(found, folder / "stranger") == "", "alone"
    (own / "report.html").write_text(f"before {html.framed('')} after")
    near.refresh(found)
    page = (own / "report.html").read_text()
    assert page == f"before {html.framed(section)} after"
    assert not (folder / "0wanda" / "report.html").exists()


def test_an_experiment_runs_as_it_stands(
    here: Command, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every job is composed and checked; none is run."""
    seen: list[Any] = []
    monkeypatch.setattr("ace_cli.run.pipeline.run", lambda config, *_: seen.append(config))
    here("experiment=sanity", "model=smollm2", "output_dir=out")
    assert len({str(config.metric) for config in seen}) == len(seen) == 2


@pytest.mark.parametrize(("name", "jobs"), [("sanity", 2), ("length", 24), ("nm", 12)])
def test_the_first_and_the_last_job_of_each_sweep(name: str, jobs: int) -> None:
    content: Any = OmegaConf.load(config_folder() / "experiment" / f"{name}.yaml")
    params = {option: str(values).split(",") for option, values in content.hydra.sweeper.params.items()}
    assert math.prod(map(len, params.values())) == jobs
    ends = [[f"{option}={values[end]}" for option, values in params.items()] for end in (0, -1)]
    first, last = (composed(f"experiment={name}", "model=smollm2", *overrides) for overrides in ends)
    assert first.text != last.text


def test_a_picture_calls_runs_by_the_one_choice_that_decides_the_others() -> None:
    def run(**choices: str) -> Row:
        every = {"metric": "wanda", "repair": "none", "sparsity": "0.5", **choices}
        return Row(every, {**dict.fromkeys(NUMBERS), "perplexity": 2.0}, {}, "p", "m", None, "r", [])

    recipes = [run(recipe="a"), run(recipe="b", repair="admm"), run(recipe="c", metric="ria", repair="admm")]
    assert list(Group("p", [], recipes).methods("perplexity")["0.5"]) == ["a", "b", "c"]
    grid = [run(metric=metric, repair=repair) for metric in ("wanda", "ria") for repair in ("none", "admm")]
    assert list(Group("p", [], grid).methods("perplexity")["0.5"]) == ["wanda", "wanda admm", "ria", "ria admm"]


def test_trials_are_drawn_with_the_best_so_far() -> None:
    drawn = plots.svg("trials", plots.trials_plot([3.0, 2.0, 2.5]))
    assert drawn.startswith("<svg")
    assert {"trial", "best so far", "perplexity"} <= set(re.findall(r">([a-z ]+)</text>", drawn))
