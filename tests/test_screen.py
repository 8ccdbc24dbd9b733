"""What a person sees on a terminal: help, completion, tables that fit, bars that tell how much longer, the end."""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from running import composed
from safetensors.torch import load_file

from ace_cli.cli.completion import script
from ace_cli.cli.help import SECTIONS, comments_of, show
from ace_cli.core.registry import PACKAGES, choices
from ace_cli.core.steps import Steps
from ace_cli.evaluation.samples import Samples, write_on
from ace_cli.model.files import Checkpoint
from ace_cli.model.source import ModelConfig, open_model
from ace_cli.report.bars import live
from ace_cli.report.fitting import fitting
from ace_cli.report.pace import Pace, duration, durations, expecting
from ace_cli.report.sweep import JobRecord, Launched, launched
from ace_cli.report.terminal import Terminal
from ace_cli.report.verdict import advice, sentence, verdict_of
from ace_cli.run.config import Schema, config_folder
from ace_cli.run.words import chosen

Command = Callable[..., subprocess.CompletedProcess[str]]


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_names_every_option_with_a_line_of_its_own() -> None:
    named = [name for names in SECTIONS.values() for name in names]
    assert sorted(named) == sorted(
        [*(each.name for each in dataclasses.fields(Schema)), "preset", "recipe", "experiment"]
    )
    assert set(named) <= set(comments_of(config_folder() / "prune.yaml"))
    text = show([])
    assert max(map(len, text.splitlines())) <= 80
    assert [name for name in named if not re.search(rf"^  {name} ", text, re.M)] == []
    assert "\n" + " " * 18 + "[c4], self" in text, "choices stand below their comment"
    for default in ("[ace]", "[smollm2]", "[uniform]", "[wikitext2]", "[sublayer]", "gate.max_ppl_ratio=null"):
        assert default in text


@pytest.mark.parametrize("group", ["model", "preset", "recipe", "experiment", "gate", *PACKAGES])
def test_help_of_a_group_has_its_choices_and_their_options(group: str) -> None:
    text = show([group])
    assert f"{group}{'.max_ppl_ratio' if group == 'gate' else ''}=" in text
    assert ("metric.alpha=0.5" in text) == (group == "metric")


def test_help_of_nothing_is_refused(here: Command) -> None:
    done = here("--help", "metrics")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "Did you mean 'metric'?" in done.stderr


def test_the_configuration_says_which_choice_its_options_belong_to(here: Command) -> None:
    lines = here("preset=best", "metric=ria", "--cfg", "job").stdout.splitlines()
    assert {"metric:  # metric=ria", "repair:  # repair=sparsegpt", "calib:  # calib=self"} < set(lines)


@pytest.mark.parametrize(("preset", "metric", "repair"), [
    ("fast", "varp", "none"), ("balanced", "ace", "none"), ("best", "wanda", "sparsegpt"),
])  # fmt: skip
def test_presets(preset: str, metric: str, repair: str) -> None:
    config = composed(f"preset={preset}", "output_dir=/given")
    words = chosen(config).split()
    assert not [word for word in words if "None" in word], "as one would type it"
    assert f"metric={metric}" in words
    assert (f"repair={repair}" in words) == (repair != "none")


# --- completion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("line", "expected"), [
    ("ace-prune met", {"metric=ace", "metric.alpha="}), ("ace-prune metric=wan", {"wanda"}),
    ("ace-prune -m html=", {"true", "false"}), ("ace-prune preset=b", {"best", "balanced"}),
    ("ace-eval --ta", {"--tasks", "--task-data"}), ("ace-bench smoll", {"smollm2"}), ("ace-report --f", {"--format"}),
    ("ace-verify a", {"a_file"}), ("ace-prune calib.path=a_", {"a_file"}),
])  # fmt: skip
def test_bash_completes(line: str, expected: set[str], tmp_path: Path) -> None:
    (tmp_path / "a_file").write_text("")
    words = "compopt() { :; }\n" + script(["bash"])  # compopt only works while a key is pressed
    program = shlex.split(line)[0]
    ask = f"COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)}; _{program.replace('-', '_')}"
    lines = f"{words}\n{ask}\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", lines], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert expected <= set(done.stdout.split())


@pytest.mark.skipif(shutil.which("fish") is None, reason="apt-get install fish")
@pytest.mark.parametrize(("line", "expected"), [
    ("ace-prune met", {"metric=ace", "metric.alpha="}), ("ace-prune metric=wan", {"metric=wanda"}),
    ("ace-prune calib.path=a_", {"calib.path=a_file"}), ("ace-eval --ta", {"--tasks"}), ("ace-verify a", {"a_file"}),
    ("ace-prune a", set()),
])  # fmt: skip
def test_fish_completes(line: str, expected: set[str], tmp_path: Path) -> None:
    (tmp_path / "a_file").write_text("")
    (tmp_path / "words.fish").write_text(script(["fish"]))
    ask = f"source words.fish; complete -C {shlex.quote(line)}"
    done = subprocess.run(["fish", "-N", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True,
                          env={**os.environ, "HOME": str(tmp_path)})  # fmt: skip
    found = {each.split("\t")[0] for each in done.stdout.splitlines()}
    assert expected <= found
    assert "a_file" not in found - expected


@pytest.mark.skipif(shutil.which("zsh") is None, reason="apt-get install zsh")
@pytest.mark.parametrize(("line", "expected"), [
    ("ace-prune metric=wan", "metric=wanda "), ("ace-prune calib.path=a_", "calib.path=a_file "),
    ("ace-prune push_t", "push_to_hub="), ("ace-eval --task-", "--task-data "),
])  # fmt: skip
def test_zsh_completes(line: str, expected: str, tmp_path: Path) -> None:
    """A shell in a terminal of its own, and a key."""
    (tmp_path / "a_file").write_text("")
    (tmp_path / "words.zsh").write_text(script(["zsh"]))
    process, terminal = pty.fork()
    if not process:
        os.chdir(tmp_path)
        os.execvpe("zsh", ["zsh", "-f", "-i"], {**os.environ, "HOME": str(tmp_path), "TERM": "dumb", "PS1": "> "})
    try:
        os.write(terminal, b"unsetopt zle_bracketed_paste 2>/dev/null; source ./words.zsh; echo re''ady\n")
        read_until(terminal, "ready")
        os.write(terminal, line.encode() + b"\t")
        assert read_until(terminal, expected)
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(terminal)


def read_until(terminal: int, text: str) -> bool:
    """Whether the terminal shows ``text`` within ten seconds."""
    shown, end = "", time.monotonic() + 10
    while time.monotonic() < end:
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 4096).decode(errors="replace")
            if text in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\x08", "", shown):
                return True
    return False


def test_other_shells_are_refused(here: Command) -> None:
    assert "bash, zsh or fish" in here("--completion", "tcsh").stderr


# --- tables ----------------------------------------------------------------------------------------------------------


def printed(parts: list[Any], width: int) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, highlight=False)
    for part in parts:
        console.print(part)
    return stream.getvalue()


HEAD = ["metric", "perplexity", "dense", "peak GB"]
ROWS = [["wanda", "123.456", "30.294", "1.12"], ["varp", "98.765", "30.294", "12.10"]]


@pytest.mark.parametrize("width", [80, 40, 34, 20])
def test_a_table_never_cuts_what_it_shows(width: int) -> None:
    best = {(1, "perplexity"), (0, "peak GB")}
    text = printed(fitting(HEAD, ROWS, width, drop=("peak GB", "dense"), best=best), width)
    assert max(map(len, text.splitlines())) <= width
    for row in ROWS:
        assert row[0] in text
        assert row[1] in text
    assert "98.765*" in text
    assert "…" not in text
    assert ("1.12*" in text) == (width in (80, 20))  # left out in between; upright rows have all
    assert ("no room here for peak GB" in " ".join(text.split())) == (width in (40, 34))


def test_the_last_part_of_a_path_is_enough(tmp_path: Path) -> None:
    from ace_cli.report.collect import Group, Row

    def row(model: str, path: str) -> Row:
        choices = {"model": model, "calib.path": path}
        numbers = dict.fromkeys(("perplexity", "dense", "ratio", "KL", "same top-1", "tasks", "dense tasks", "zeros",
                                 "fewer", "prune s", "total s", "peak GB"))  # fmt: skip
        return Row(choices, {**numbers, "perplexity": float(len(path))}, {}, "p", "m", None, "r", [])

    group = Group("p", ["model", "calib.path"], [row("/a/llama", "/x/pages.jsonl"), row("/b/llama", "/other/one")])
    head, lines = group.cells()
    assert head == ["model", "calib.path", "perplexity"]
    assert [line[:2] for line in lines] == [["a/llama", "pages.jsonl"], ["b/llama", "one"]]
    assert group.best() == {(1, "perplexity")}


# --- bars ------------------------------------------------------------------------------------------------------------


def test_time_left_is_a_forecast_until_steps_tell_better() -> None:
    now = [0.0]
    pace = Pace(10, 0, (40.0, 90.0), lambda: now[0])
    assert pace.left() == (40, 90)
    now[0] = 30
    assert pace.left() == (10, 270), "a first step that takes so long says something, too"
    assert 0 < pace.shown() < 1
    now[0] = 31
    pace()
    assert pace.left() == (279, 279)
    now[0] = 41
    assert pace.left() == (269, 269)
    now[0] = 100
    assert pace.left() == (248, 248), "a step that takes longer than the others does not eat the others' time"
    assert pace.shown() < 2
    run = expecting({"before": (1, 2), "this": (3, 4), "next": (5, 9)})
    assert run.begin("this") == (3, 4)
    assert run.with_later((1, 1)) == (6, 10)
    assert run.begin("unheard of") is None
    assert run.with_later(None) is None
    assert Pace(10, 0, None, lambda: now[0]).left() is None


def test_a_bar_learns_how_many_steps_there_are() -> None:
    now = [0.0]
    pace = Pace(None, 0, None, lambda: now[0])
    now[0] = 5
    assert (pace.shown(), pace.left()) == (0, None)
    pace.of(4)
    now[0] = 7
    pace()
    assert (pace.done, pace.total, pace.left()) == (1, 4, (6, 6)), "what came before tells nothing of the steps"
    assert pace.elapsed == 7


class Counted(Steps):
    """What a bar hears."""

    def __init__(self) -> None:
        self.heard: list[int] = []

    def of(self, total: int) -> None:
        self.heard += [total, 0]

    def __call__(self) -> None:
        self.heard[-1] += 1


def test_every_wait_that_has_steps_tells_them(llama: Path, documents: Path, tmp_path: Path) -> None:
    checkpoint, cpu = Checkpoint(llama), torch.device("cpu")
    shutil.copytree(llama, tmp_path / "bin")
    torch.save(load_file(llama / "model.safetensors"), tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    own, text = composed("calib=self", "output_dir=/given").calib, choices("calib")["text"](path=str(documents))
    waits: list[tuple[Callable[[Steps], Any], list[int]]] = [
        (lambda steps: own.windows(checkpoint, "cpu", steps), [15, 15]),
        (lambda steps: text.windows(checkpoint, "cpu", steps), [128, 128]),
        (lambda steps: choices("eval")["self"](seq_len=9).windows(checkpoint, "cpu", steps), [8, 8]),
        (lambda steps: write_on(checkpoint, Samples(["w5"], 6), cpu, torch.float32, steps), [6, 6]),
        (lambda steps: open_model(ModelConfig(path=str(tmp_path / "bin")), steps), [1, 1]),
    ]
    for wait, heard in waits:
        steps = Counted()
        wait(steps)
        assert steps.heard == heard


def test_without_a_screen_a_wait_that_is_not_short_has_a_line_every_ten_per_cent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seconds, lines in ((0.01, []), (1.0, [f"writing: {done}/30" for done in range(3, 31, 3)])):
        clock = itertools.count(0, seconds)
        monkeypatch.setattr("ace_cli.report.terminal.Pace", partial(Pace, clock=lambda of=clock: next(of)))
        with Terminal().waiting("writing") as steps:
            steps.of(30)
            for _ in range(30):
                steps()
        assert [line.partition(",")[0] for line in capsys.readouterr().out.splitlines()] == lines


def test_a_long_detail_of_the_plan_goes_on_below_where_it_began(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    terminal._screen = Console(width=40, force_terminal=True, highlight=False)  # type: ignore[assignment]
    terminal._pairs({"from": "/a/very/long/path/" + "x" * 40, "needs": "memory"})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("from         /a/very")
    assert lines[1].startswith(" " * 13 + "x")
    assert "".join(line[13:].strip() for line in lines) == "/a/very/long/path/" + "x" * 40 + "memory"


def test_durations() -> None:
    assert [duration(each) for each in (0.4, 24, 150, 9000)] == ["0 s", "24 s", "2 min", "2.5 h"]
    assert [durations(each) for each in ((3, 3.2), (40, 90), (50, 150))] == ["3 s", "40 to 90 s", "50 s to 2 min"]


@pytest.mark.parametrize("total", [30, None])
def test_a_bar_says_how_much_longer(total: int | None) -> None:
    stream = io.StringIO()
    screen = Console(file=stream, width=80, force_terminal=True, highlight=False)
    pace = Pace(total, 0, (24.0, 24.0), lambda: 0.0)
    with live(screen, "evaluating pruned", pace, expecting({"samples": (3.0, 9.0)})) as step:
        step()
        step()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "evaluating pruned" in text
    assert "-:--" not in text
    assert ("0/30, 0 s, 27 to 33 s left" in text) == (total is not None)


def test_a_job_of_a_sweep_says_what_is_left(tmp_path: Path) -> None:
    Launched(4, ["metric"]).write(tmp_path)
    started = launched(tmp_path)
    assert started == Launched(4, ["metric"])
    records = [JobRecord(tmp_path, number, ["a=1", f"metric=m{number}"]) for number in range(4)]
    records[0]._write({"report": {"seconds": {"total": 100.0}}})
    records[1].fail("of something")
    records[2].begin()
    assert started.line(records[2]) == "Job 3 of 4 (number 2): metric=m2; about 3 min left"
    assert launched(tmp_path / "elsewhere") is None


# --- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "word", "level"), [
    (None, "not measured", ""), (1.0, "as good as", "good"), (1.1, "slightly worse", "good"),
    (1.4, "clearly worse", "fair"), (2.0, "much worse", "bad"), (9.0, "badly damaged", "bad"),
])  # fmt: skip
def test_verdict(ratio: float | None, word: str, level: str) -> None:
    assert verdict_of(ratio).word.startswith(word)
    assert verdict_of(ratio).level == level
    told = sentence({"perplexity": {"ratio": ratio, "dense": 10.0, "pruned": 10 * (ratio or 0)}})
    assert told.startswith(word.capitalize())


@pytest.mark.parametrize(("ratio", "method", "tokens", "words"), [
    (1.0, {"repair": "none", "recover": "none"}, 2048, ""),
    (2.0, {"repair": "none", "recover": "none"}, 2048, "experiment=best "),
    (2.0, {"repair": "sparsegpt", "recover": "none"}, 2048, "recover=blocks"),
    (2.0, {"repair": "sparsegpt", "recover": "blocks"}, 2048, "experiment=best_long"),
    (2.0, {"repair": "sparsegpt", "recover": "blocks"}, 16384, "recover=both"),
    (2.0, {"repair": "sparsegpt", "recover": "both"}, 32768, "a lower sparsity"),
    (2.0, {"unit": "channel", "repair": "lstsq", "recover": "none"}, 2048, "recover=blocks"),
    (2.0, {"unit": "channel", "repair": "lstsq", "recover": "blocks"}, 2048, "fewer units"),
    (2.0, {"unit": "block", "repair": "lstsq", "recover": "none"}, 2048, "recover=blocks"),
    (2.0, {"unit": "expert", "repair": "none", "recover": "none"}, 2048, "fewer units"),
    (2.0, {"repair": "sparsegpt", "quantize": "int4", "recover": "none"}, 2048, "experiment=best_long"),
])  # fmt: skip
def test_what_to_try_next_was_not_done_yet(ratio: float, method: dict[str, str], tokens: int, words: str) -> None:
    report = {"perplexity": {"ratio": ratio}, "method": method, "calibration": {"tokens": tokens}}
    assert advice(report).startswith(words)
    assert bool(advice(report)) == bool(words)


def test_a_run_says_a_line_before_and_the_verdict_after(here: Command, llama: Path, tmp_path: Path) -> None:
    options = ["metric=magnitude", "eval=self", "eval.seq_len=16", "eval.max_windows=2", "samples.prompts=[]",
               "html=true"]  # fmt: skip
    done = here(f"model.path={llama}", *options, f"output_dir={tmp_path / 'out'}")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{llama.name} sparsity=0.5 metric=magnitude eval=self eval.seq_len=16")
    assert "$ ace-prune" not in done.stdout
    assert "$ ace-prune" in (tmp_path / "out" / "run.log").read_text()
    assert any(line == f"Report   {tmp_path / 'out' / 'report.html'}" for line in lines)
    assert lines[-1] == f'Load     AutoModelForCausalLM.from_pretrained("{tmp_path / "out" / "checkpoint"}")'


def test_a_run_whose_folder_holds_code_says_how_to_load_it(here: Command, llama: Path, tmp_path: Path) -> None:
    options = ["unit=channel", "unit.multiple=8", "unit.uneven=true", "allocation=angular", "sparsity=40%",
               "calib=self", "calib.seq_len=8", "calib.n_samples=4", "eval=none", "samples.prompts=[]"]  # fmt: skip
    done = here(f"model.path={llama}", *options, f"output_dir={tmp_path / 'out'}")
    folder = tmp_path / "out" / "checkpoint"
    assert f'from_pretrained("{folder}", trust_remote_code=True)' in done.stdout.splitlines()[-1]


def test_in_a_notebook_a_log_is_a_log_and_quiet_is_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where rich finds a notebook it would show everything there, whatever the file that was asked for."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    for quiet in (True, False):
        terminal = Terminal(quiet=quiet)
        with terminal.logging_to(tmp_path / f"{quiet}.log"):
            terminal.say("a line")
        assert (tmp_path / f"{quiet}.log").read_text() == "a line\n"
        assert capsys.readouterr().out == ("" if quiet else "a line\n")
