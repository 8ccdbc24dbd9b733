"""What enters from the command line and from YAML files: a result, or one line and exit code 2, never a traceback."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import programs
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from running import composed
from tiny_models import add_tokenizer, make

from ace_cli.cli import bench, evaluate, prune, report, verify
from ace_cli.cli.arguments import as_typed, for_hydra
from ace_cli.cli.job import known
from ace_cli.core.errors import AceError, first_line
from ace_cli.evaluation.dense import DenseCache
from ace_cli.report.terminal import Terminal
from ace_cli.run.config import CONFIGURATION_ERRORS
from ace_cli.run.pipeline import run

Command = Callable[..., subprocess.CompletedProcess[str]]
LONG = "x" * 5000
ODD = ["a=b", "a,b", "out(1)", "a#b", "café", "a b", "it's", 'say "hi"', "a\\", "a\\'b", "[x]", "{x}", "1e5", "007",
       "true", "C:\\x\\y", "x:y", "größe/日本", "a;b&c|d", "-", "!x", "@x", "%", "^", "<>", " a ", "a\tb"]  # fmt: skip


def assert_one_line(done: subprocess.CompletedProcess[str], *expected: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert len(done.stderr) < 1500
    for text in expected:
        assert text in done.stderr


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ODD)
def test_any_path_is_a_value(path: str) -> None:
    (override,) = for_hydra([f"output_dir={path}"])
    assert OverridesParser.create().parse_override(override).value() == path
    assert as_typed(override) == f"output_dir={path}"
    first, second = for_hydra(["-m", f"calib.path='{path}'" if "," in path else f"calib.path={path}", "x=y"])[1:]
    assert OverridesParser.create().parse_override(first).value() == path
    assert second == "x=y"


def test_what_is_quoted_or_null_already_stays_as_it_is() -> None:
    typed = ["calib.path='a,b'", 'output_dir="x y"', "eval.path=null", "calib.path=", "metric=wanda", "x", "--help"]
    assert for_hydra(typed) == ["--help", *typed[:-1]]


def test_commas_separate_paths_in_a_sweep_alone() -> None:
    assert for_hydra(["calib.path=a.txt,b c.txt"]) == ["calib.path='a.txt,b c.txt'"]
    assert for_hydra(["-m", "calib.path=a.txt,b c.txt,'d,e'"])[1] == "calib.path=a.txt,'b c.txt','d,e'"
    assert for_hydra(["-m", "calib.path=glob(*)"])[1] == "calib.path=glob(*)"


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert for_hydra(["output_dir=~/x"]) == ["output_dir=/home/me/x"]


def test_paths_with_odd_letters_work(here: Command, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "models, a=b (1)").symlink_to(llama)
    out = "out=1, (é) #2"
    done = here("model.path=models, a=b (1)", "metric=magnitude", "eval=none", "html=false", f"output_dir={out}")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads((tmp_path / out / "report.json").read_text(encoding="utf-8"))
    assert shlex.split(report["command"])[-1] == f"output_dir={tmp_path / out}"


def test_a_hub_id_or_a_folder_may_stand_where_a_card_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "conf" / "model" / "org").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "org" / "card.yaml").write_text("path: org/name\n")
    assert for_hydra(["model=org/name", "x=1"]) == ["model=custom", "model.path=org/name", "x=1"]
    assert for_hydra(["model=mine"]) == ["model=custom", "model.path=mine"]
    assert for_hydra(["model=m.gguf"]) == ["model=custom", "model.path=m.gguf"]
    assert for_hydra(["-m", "model=a/b,c/d"]) == ["-m", "model=custom", "model.path=a/b,c/d"]
    for card in (["model=smollm2"], ["-m", "model=smollm2,llama7b"], ["--config-dir", "conf", "model=org/card"]):
        assert for_hydra(card) == card
    with pytest.raises(AceError, match="mixes cards and paths"):
        for_hydra(["-m", "model=smollm2,a/b"])


# --- names and values that cannot be -------------------------------------------------------------------------------


def test_flags_may_stand_between_overrides() -> None:
    """Hydra's parser takes what follows for unknown."""
    assert for_hydra(["model=smollm2", "-m", "metric=wanda,ace"]) == ["-m", "model=smollm2", "metric=wanda,ace"]
    assert for_hydra(["x=1", "--cfg", "job", "y=2"]) == ["--cfg", "job", "x=1", "y=2"]
    assert for_hydra(["x=1", "--config-name=mine", "y=2", "--info"]) == [
        "--config-name=mine",
        "--info",
        "all",
        "x=1",
        "y=2",
    ]
    assert for_hydra(["--info", "config", "x=1"]) == ["--info", "config", "x=1"]
    with pytest.raises(AceError, match="unrecognized arguments: --foo"):
        for_hydra(["x=1", "--foo", "y=2"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([f"metric={LONG}"], "there is no such metric"),
        ([f"model={LONG}"], "there is no such model"),
        ([f"{LONG}=1"], "there is no such option"),
        (["allocation=[null]"], "takes one name"),
        (["metric=[[]]"], "takes one name"),
        (["metric=null"], "takes one name"),
        (["--resolve"], "--resolve"),
        (["--run", "--multirun"], "--multirun"),
        (["metric.alpha=[", "metric=ria"], "metric.alpha=["),
    ],
)
def test_arguments_that_hydra_would_choke_on(here: Command, arguments: list[str], expected: str) -> None:
    base = [] if arguments[0].startswith("model=") else ["model.path=org/name"]
    assert_one_line(here(*base, *arguments), expected)


def test_bytes_that_are_no_utf_8() -> None:
    with pytest.raises(AceError, match="not UTF-8"):
        for_hydra([os.fsdecode(b"output_dir=caf\xe9")])


def test_a_working_folder_that_was_removed(tmp_path: Path) -> None:
    start = "import os; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')\n"
    start += "from ace_cli.cli.prune import main; main()"
    done = subprocess.run([sys.executable, "-c", start], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert_one_line(done, "is gone")


def test_a_sweep_where_no_folder_can_be_made(here: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in ("file/sweep", "file", "/proc/sweep"):
        arguments = ["-m", "model.path=org/name", "sparsity=0.4,0.5", f"output_dir={folder}"]
        assert_one_line(here(*arguments), folder.split("/sweep")[0])


# --- standard output -------------------------------------------------------------------------------------------------


def said(llama: Path, tmp_path: Path, out: Path | Connection) -> subprocess.CompletedProcess[str]:
    """A plan, printed to ``out`` by a program of its own that has torch already."""
    words = [f"model.path={llama}", "metric=magnitude", "eval=none", "dry_run=true"]
    process = programs.start("__main__", words, tmp_path, out, tmp_path / "err")
    process.join(60)
    return subprocess.CompletedProcess(words, process.exitcode, "", (tmp_path / "err").read_text())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_an_output_that_is_full_is_named(llama: Path, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "ace_cli", "--cfg", "job"]
        shown = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    shown.stdout = ""
    for done in (shown, said(llama, tmp_path, Path("/dev/full"))):
        assert_one_line(done, "Standard output cannot be written: No space left on device")


def test_a_reader_that_went_away_is_told(llama: Path, tmp_path: Path) -> None:
    reading, writing = Pipe(duplex=False)
    reading.close()
    command = [sys.executable, "-m", "ace_cli", "--help"]
    shown = subprocess.run(
        command, cwd=tmp_path, stdout=writing.fileno(), stderr=subprocess.PIPE, text=True, check=False
    )
    shown.stdout = ""
    for done in (shown, said(llama, tmp_path, writing)):
        assert_one_line(done, "Standard output cannot be written: Broken pipe")
    writing.close()


# --- YAML files ------------------------------------------------------------------------------------------------------

GLOBAL = b"# @package _global_\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (GLOBAL + b'sparsity:\t"0.5"\n', "line 2"),
        (GLOBAL + b'sparsity: "0.5"\nsparsity: "0.6"\n', "duplicate key sparsity"),
        (GLOBAL + b'sparsity: "0.5\0"\n', "#x0000"),
        (GLOBAL + b"output_dir: caf\xe9\n", "not UTF-8"),
        (GLOBAL + b"dry_run: true\n---\ndry_run: false\n", "another document"),
        (b"\xef\xbb\xbf" + GLOBAL + b"dry_run: true\n", "byte order mark"),
        (b"dry_run: true\n", "# @package _global_"),
        (b"- a\n", "# @package _global_"),
        (b"", "# @package _global_"),
        (GLOBAL + b"metric: wanda\n", "defaults: [{override /metric: wanda}]"),
        (GLOBAL + b"sparsty: 1\n", "Did you mean 'sparsity'?"),
        (GLOBAL + b"calib: {n_samples: many}\n", "calib.n_samples"),
        (GLOBAL + b"a: &a [*a]\n", "leads back into itself"),
        (GLOBAL + b"x: " + b"[" * 2_000 + b"]" * 2_000 + b"\n", "nested too deep"),
        (GLOBAL + b'dry_run: !!python/object/apply:os.system ["touch bad"]\n', "python/object"),
        (GLOBAL + b"null: 1\n", "NoneType"),
        (GLOBAL + b"? [a]\n: 6\n", "unhashable"),
        (GLOBAL + b"defaults: 5\n", "defaults must be a list"),
        (GLOBAL + b"defaults: [null]\n", "NoneType"),
        (GLOBAL + b"sparsity: 2020-01-01\n", "sparsity=2020-01-01"),
        (GLOBAL + b"sparsity: ${nothing}\n", "nothing"),
    ],
)  # fmt: skip
def test_a_yaml_file_of_the_user_s(here: Command, tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "e.yaml").write_bytes(content)
    assert_one_line(here("--config-dir", "mine", "experiment=e", "model.path=org/name"), expected)
    assert not (tmp_path / "bad").exists()


def test_a_folder_of_that_name(here: Command, tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment" / "e.yaml").mkdir(parents=True)
    assert_one_line(here("--config-dir", "mine", "experiment=e", "model.path=org/name"), "experiment=e")


# --- words -----------------------------------------------------------------------------------------------------------


def test_an_error_is_one_short_line_whatever_it_names() -> None:
    text = str(AceError(f"a\nb\x1b[0m\0 {LONG}", "c\r\nd"))
    assert text.isprintable()
    assert len(text) < 300
    assert str(AceError("Größe, 日本.", "Ok.")) == "Größe, 日本. Ok."


def test_the_cause_that_a_first_line_announces_is_said() -> None:
    assert first_line(ValueError("Validation error for field 'x':\n    TypeError: must be int\nmore")) == (
        "Validation error for field 'x': TypeError: must be int"
    )
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError("")) == "ValueError"
    assert first_line(ValueError("all:\n")) == "all:"


def test_ace_eval_hints_at_its_own_options(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ace_cli.cli import evaluate

    (tmp_path / "short.txt").write_text("w3 w4")
    text = str(tmp_path / "short.txt")
    monkeypatch.setattr(sys, "argv", ["ace-eval", str(llama), "--tasks", "none", "--text", text, "--seq-len", "64"])
    with pytest.raises(SystemExit, match="2"):
        evaluate.main()
    said = capsys.readouterr().err
    assert "Lower --seq-len" in said
    assert "eval." not in said


# --- values --------------------------------------------------------------------------------------------------------

SELF = ["calib=self", "calib.n_samples=4"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["exclude=*"], "leaves no weight to prune"),
        (["allocation=owl", "allocation.mo=inf"], "allocation.mo=inf"),
        (["calib.seed=99999999999999999999999"], "calib.seed=99999999999999999999999: must fit in 64 bits"),
        (["eval=self", "eval.max_windows=9999999999"], "at most 100,000,000 tokens"),
        (["eval.tasks=[[[[]]]]"], "eval.tasks"),
        (["samples.prompts=[[[[]]]]"], "samples.prompts"),
        (["sparsity='1e-1000000000'"], "not a sparsity"),
        ([f"sparsity='{10**40}:4'"], "not a sparsity"),
        (["metric=ace", "metric.sweeps=100000000000"], "metric.sweeps=100000000000"),
        (["repair=swaps", "repair.sweeps=100000000000"], "repair.sweeps is 100000000000"),
        (["repair=sparsegpt", "repair.refit_steps=100000000000"], "repair.refit_steps"),
        (["repair=admm", "repair.iterations=100000000000"], "repair.iterations"),
        (["samples.tokens=100000000000"], "samples.tokens"),
        (["memory_gb=nan"], "memory_gb=nan"),
        (["model.path=~nobody-of-this-name/m"], "no user of this name"),
        (["output_dir=a\nb"], "output_dir=a\\nb"),
        ([f"model.path={LONG}"], "too long"),
        (["calib=text", f"calib.path={LONG}.jsonl"], "too long"),
        (["eval.tasks=[boolq]", f"eval.task_data={LONG}"], "too long"),
        (["calib.continue_to=129"], "calib.continue_to=129: the model has 128 positions"),
        (["calib.n_samples=16", "calib.seq_len=16", "calib.pack=256"], "calib.pack=256: the model has 128 positions"),
    ],
)
def test_values_out_of_range(llama: Path, arguments: list[str], expected: str) -> None:
    """What the command then prints is the error's text: others show that, and the test below."""
    model = [] if arguments[0].startswith("model.path") else [f"model.path={llama}"]
    options = for_hydra([*model, *SELF, "eval=none", "metric=wanda", *arguments, "dry_run=true"])
    with pytest.raises((AceError, OSError, *CONFIGURATION_ERRORS)) as caught:
        run(composed("model=custom", *options), "test", Terminal(), DenseCache())
    assert_one_line(subprocess.CompletedProcess([], 2, "", f"{known(caught.value)}\n"), expected)


@pytest.mark.parametrize("last", ["exclude=*", "memory_gb=nan", "calib.n_samples=[["])
def test_a_value_out_of_range_is_one_line_on_standard_error(here: Command, llama: Path, last: str) -> None:
    """Refused by the model, by the options, and by their grammar."""
    assert_one_line(here(f"model.path={llama}", *SELF, "eval=none", last, "dry_run=true"), last.partition("=")[0])


@pytest.mark.parametrize("group", ["metric", "calib", "tracker"])
def test_a_group_that_a_file_empties(here: Command, tmp_path: Path, group: str) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "e.yaml").write_text(f"# @package _global_\n{group}: null\n")
    assert_one_line(
        here("--config-dir", "mine", "experiment=e", "model.path=org/name"), f"{group}=None: must be one of"
    )


def test_a_home_folder_in_a_file(here: Command, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "e.yaml").write_text("# @package _global_\noutput_dir: ~/x\n")
    arguments = ["--config-dir", "mine", "experiment=e", f"model.path={llama}", "metric=magnitude", "eval=none"]
    assert here(*arguments, "-m").returncode == 0
    assert (tmp_path / "home" / "x" / "sweep.json").is_file()


def test_the_probe_measures_once_however_late_it_is(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine so busy that all of the probe's time passes before its first turn."""
    import torch

    from ace_cli.methods.patterns import NofM
    from ace_cli.model.files import Checkpoint
    from ace_cli.run import machine_limit

    monkeypatch.setattr(machine_limit, "_PROBE_SECONDS", -1.0)
    rates = machine_limit.probe(torch.device("cpu"), torch.float32, Checkpoint(llama), tmp_path, NofM(2, 4))
    assert min(rates.matmul, rates.read, rates.write, rates.memory) > 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--device", "nonsense"], "--device nonsense: must be auto, cpu, cuda or cuda:N"),
        (["--json", "."], "--json .: is a folder"),
        (["--limit", "9" * 30], "must fit in 64 bits"),
        (["--text", "~nobody-of-this-name/x.txt"], "no user of this name"),
    ],
)
def test_ace_eval_checks_its_values_before_any_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    from ace_cli.cli import evaluate

    monkeypatch.setattr(sys, "argv", ["ace-eval", "org/name", "--tasks", "none", "--text", "c4", *arguments])
    with pytest.raises(SystemExit, match="2"):
        evaluate.main()
    assert expected in capsys.readouterr().err


# --- flags, and what a model's own code says -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("main", "words", "expected"),
    [
        (prune.main, ["--foo"], "unrecognized arguments: --foo. See ace-prune --help."),
        (prune.main, ["--config-dir"], "expected one argument"),
        (prune.main, ["--info", "nope"], "invalid choice: 'nope'"),
        (verify.main, [], "the following arguments are required: folder. See ace-verify --help."),
        (evaluate.main, ["--foo", "x"], "unrecognized arguments: --foo. See ace-eval --help."),
        (bench.main, ["--threads", "a", "x"], "invalid int value: 'a'"),
        (report.main, ["--format", "x"], "invalid choice: 'x'"),
    ],
)
def test_flags_that_are_wrong_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    main: Callable[[], None],
    words: list[str],
    expected: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    out, err = capfd.readouterr()
    assert_one_line(subprocess.CompletedProcess([], int(caught.value.code or 0), out, err), expected)


def test_a_value_with_which_the_model_s_own_code_cannot_compute_is_one_line(here: Command, tmp_path: Path) -> None:
    model = add_tokenizer(make(tmp_path / "opt", "opt"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dropout": 128}))
    done = here(f"model.path={model}", "metric=wanda", "calib=self", "calib.n_samples=4", "eval=none")
    assert_one_line(done, "dropout probability has to be between 0 and 1, but got 128", "modeling_opt.py")
