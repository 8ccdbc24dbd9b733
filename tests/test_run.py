"""Whole runs in this process: same bytes twice, sharding, failures that leave nothing finished, going on."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import edit, load, make, token_windows, weights

from ace_cli.core import registry
from ace_cli.core.errors import AceError
from ace_cli.core.locks import locked
from ace_cli.evaluation.dense import DenseCache
from ace_cli.model import files, pruned
from ace_cli.model.files import Checkpoint, CheckpointWriter
from ace_cli.model.folder import INDEX
from ace_cli.model.pruned import Violation, verify
from ace_cli.report.facts import Report
from ace_cli.report.terminal import Terminal
from ace_cli.run import journal
from ace_cli.run.config import RunConfig
from ace_cli.run.pipeline import run

Prune = Callable[..., Report]


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob("*.safetensors"))}


def finished_looking(folder: Path) -> list[str]:
    """What a user or a script could take for a result."""
    names = ("config.json", "report.json", "report.md", "pruning.json", INDEX)
    return [str(file) for name in names for file in folder.rglob(name)]


@pytest.mark.parametrize("metric", [name for name, cls in registry.choices("metric").items() if cls.weights])
@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_every_metric_runs_to_a_verified_checkpoint(
    llama: Path, tmp_path: Path, prune_here: Prune, metric: str, sparsity: str
) -> None:
    report = prune_here(llama, tmp_path / "out", f"metric={metric}", f"sparsity={sparsity}")
    assert report.sparsity.achieved == pytest.approx(0.5)
    assert verify(tmp_path / "out" / "checkpoint") == 14
    assert sorted(file.name for file in (tmp_path / "out").iterdir() if not file.name.startswith(".")) == [
        "checkpoint", "report.json", "report.md", "run.log",
    ]  # fmt: skip


@pytest.mark.parametrize("metric", ["varp", "cosp"])
def test_same_command_same_bytes(llama: Path, tmp_path: Path, prune_here: Prune, metric: str) -> None:
    for name in ("one", "two"):
        prune_here(llama, tmp_path / name, f"metric={metric}", "sparsity=2:4")
    assert digests(tmp_path / "one" / "checkpoint") == digests(tmp_path / "two" / "checkpoint") != {}


def test_another_seed_other_bytes(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    """Or the test above could not fail."""
    prune_here(llama, tmp_path / "one", "metric=varp")
    prune_here(llama, tmp_path / "two", "metric=varp", "calib.seed=1")
    assert digests(tmp_path / "one" / "checkpoint") != digests(tmp_path / "two" / "checkpoint")


def test_the_layer_scope_compares_the_whole_layer(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    prune_here(llama, tmp_path / "out", "metric=magnitude", "scope=layer", "sparsity=0.3")
    weight = weights(tmp_path / "out" / "checkpoint")["model.layers.0.mlp.up_proj.weight"]
    assert int((weight == 0).sum()) == int(weight.numel() * 0.3)
    assert len({int(row.count_nonzero()) for row in weight}) > 1


def test_shards(llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch) -> None:
    prune_here(llama, tmp_path / "whole", "metric=wanda", "sparsity=2:4")
    monkeypatch.setattr(files, "SHARD_BYTES", 100_000)
    prune_here(llama, tmp_path / "sharded", "metric=wanda", "sparsity=2:4")
    whole, sharded = tmp_path / "whole" / "checkpoint", tmp_path / "sharded" / "checkpoint"
    assert len(list(sharded.glob("model-*-of-*.safetensors"))) > 2
    assert (sharded / INDEX).is_file()
    assert not (whole / INDEX).exists()
    ids = token_windows(2, 12)
    with torch.inference_mode():
        assert torch.equal(load(sharded)(ids).logits, load(whole)(ids).logits)
    assert verify(sharded) == 14


def test_a_shard_left_by_an_index_does_not_stay(
    llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run into the same folder replaces the checkpoint, old shards and all."""
    monkeypatch.setattr(files, "SHARD_BYTES", 100_000)
    prune_here(llama, tmp_path / "out", "metric=wanda")
    monkeypatch.undo()
    prune_here(llama, tmp_path / "out", "metric=magnitude")
    assert list(digests(tmp_path / "out" / "checkpoint")) == ["model.safetensors"]
    assert not (tmp_path / "out" / "checkpoint" / INDEX).exists()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["method"]["metric"] == "magnitude"


# --- failures --------------------------------------------------------------------------------------------------------


def fail_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int, fault: BaseException) -> None:
    """The call after ``calls`` good ones raises."""
    original, count = getattr(owner, name), 0

    def wrapper(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            raise fault
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, wrapper)


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("name", "calls"), [("write", 0), ("write", 9), ("copy", 0), ("copy", 2), ("finish", 0)])
def test_a_full_disk_leaves_nothing_finished(
    llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch, name: str, calls: int
) -> None:
    fail_after(monkeypatch, CheckpointWriter, name, calls, FULL)
    with pytest.raises(AceError, match="No space left on device") as caught:
        prune_here(llama, tmp_path / "out", "metric=wanda")
    assert "\n" not in str(caught.value)
    assert finished_looking(tmp_path / "out") == []
    monkeypatch.undo()
    report = prune_here(llama, tmp_path / "out", "metric=wanda")  # and the next try succeeds
    assert verify(Path(report.checkpoint)) == 14


def test_a_full_disk_while_writing_the_small_files(
    llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_after(monkeypatch, pruned, "copy_other_files", 0, FULL)
    with pytest.raises(AceError, match="No space left on device"):
        prune_here(llama, tmp_path / "out", "metric=wanda")
    assert not (tmp_path / "out" / "checkpoint").exists()
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_failed_second_run_does_not_take_the_first_one_s_checkpoint(
    llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune_here(llama, tmp_path / "out", "metric=wanda")
    before = digests(tmp_path / "out" / "checkpoint")
    fail_after(monkeypatch, CheckpointWriter, "write", 3, FULL)
    with pytest.raises(AceError):
        prune_here(llama, tmp_path / "out", "metric=magnitude")
    assert digests(tmp_path / "out" / "checkpoint") == before
    assert verify(tmp_path / "out" / "checkpoint") == 14


def test_a_bad_model_leaves_nothing(own_llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    edit(own_llama, "model.layers.1.mlp.up_proj.weight", lambda weight: weight * float("nan"))
    with pytest.raises(AceError, match="NaN or Inf"):
        prune_here(own_llama, tmp_path / "out", "metric=magnitude")
    assert finished_looking(tmp_path / "out") == []
    assert not (tmp_path / "out" / "checkpoint.partial").exists()


def test_a_folder_of_somebody_else_is_not_overwritten(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    (tmp_path / "out" / "checkpoint").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint" / "thesis.txt").write_text("years of work")
    with pytest.raises(AceError, match="checkpoint"):
        prune_here(llama, tmp_path / "out", "metric=magnitude")
    assert (tmp_path / "out" / "checkpoint" / "thesis.txt").read_text() == "years of work"


def test_no_room_is_said_before_anything_is_written(
    llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(AceError, match="free"):
        prune_here(llama, tmp_path / "out", "metric=magnitude")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("propagate", ["sublayer", "block", "dense"])
@pytest.mark.parametrize("fault", [KeyboardInterrupt(), FULL], ids=["interrupted", "disk full"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch, fault: BaseException, propagate: str
) -> None:
    model = make(tmp_path / "m", "llama", num_hidden_layers=4)
    options = ("metric=wanda", f"propagate={propagate}")
    prune_here(model, tmp_path / "straight", *options)
    fail_after(monkeypatch, CheckpointWriter, "write", 7 * 2 + 3, fault)  # inside the third block
    with pytest.raises((AceError, KeyboardInterrupt)):
        prune_here(model, tmp_path / "broken", *options)
    monkeypatch.undo()
    assert finished_looking(tmp_path / "broken") == []
    report = prune_here(model, tmp_path / "broken", *options)
    assert digests(tmp_path / "broken" / "checkpoint") == digests(tmp_path / "straight" / "checkpoint")
    assert len(report.slots) == 4 * 7
    assert len(report.blocks) == 4


@pytest.mark.parametrize(("family", "writes"), [("mixtral", 4 + 3 * 4), ("gpt_oss", 4 + 2), ("gpt2", 4)])
def test_an_interrupted_run_of_another_layout_goes_on(
    tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch, family: str, writes: int
) -> None:
    """Experts by themselves or in one tensor, weights stored transposed; the fault is inside the second block."""
    model = make(tmp_path / "m", family)
    prune_here(model, tmp_path / "straight", "metric=wanda")
    fail_after(monkeypatch, CheckpointWriter, "write", writes + 2, FULL)
    with pytest.raises(AceError):
        prune_here(model, tmp_path / "broken", "metric=wanda")
    monkeypatch.undo()
    prune_here(model, tmp_path / "broken", "metric=wanda")
    assert digests(tmp_path / "broken" / "checkpoint") == digests(tmp_path / "straight" / "checkpoint")


def test_an_interrupted_run_of_another_method_method_is_not_continued(
    llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_after(monkeypatch, CheckpointWriter, "write", 7 + 3, FULL)
    with pytest.raises(AceError):
        prune_here(llama, tmp_path / "out", "metric=magnitude")
    monkeypatch.undo()
    prune_here(llama, tmp_path / "out", "metric=wanda")
    prune_here(llama, tmp_path / "straight", "metric=wanda")
    assert digests(tmp_path / "out" / "checkpoint") == digests(tmp_path / "straight" / "checkpoint")


@pytest.mark.parametrize("left", [None, -1000], ids=["lost", "shortened"])
def test_damaged_shards_are_not_trusted(
    tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch, left: int | None
) -> None:
    """The journal tells of finished blocks, but the file that held them is gone, or its end is."""
    model = make(tmp_path / "m", "llama", num_hidden_layers=4)
    fail_after(monkeypatch, CheckpointWriter, "write", 7 * 2 + 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        prune_here(model, tmp_path / "out", "metric=wanda")
    monkeypatch.undo()
    shard = tmp_path / "out" / "checkpoint.partial" / "model.safetensors"
    if left is None:
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:left])
    prune_here(model, tmp_path / "out", "metric=wanda")
    prune_here(model, tmp_path / "straight", "metric=wanda")
    assert digests(tmp_path / "out" / "checkpoint") == digests(tmp_path / "straight" / "checkpoint")


@pytest.mark.parametrize("names", [("read", 20), ("copy", 2)], ids=["reading", "copying"])
def test_a_source_that_ends_in_the_middle_loses_no_finished_block(
    tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch, names: tuple[str, int]
) -> None:
    """The file is cut while the run reads it, put back, and the run goes on."""
    model = make(tmp_path / "m", "llama", num_hidden_layers=4)
    prune_here(model, tmp_path / "straight", "metric=wanda")
    file, (name, calls) = model / "model.safetensors", names
    whole, owner = file.read_bytes(), Checkpoint if name == "read" else CheckpointWriter
    original, count = getattr(owner, name), 0

    def cutting(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls:
            file.write_bytes(whole[: len(whole) // 3])
        return original(*arguments)

    monkeypatch.setattr(owner, name, cutting)
    with pytest.raises(AceError, match=r"model\.safetensors ended while") as caught:
        prune_here(model, tmp_path / "out", "metric=wanda")
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert finished_looking(tmp_path / "out") == []
    assert len((tmp_path / "out" / "progress.jsonl").read_text().splitlines()) >= 1
    file.write_bytes(whole)
    prune_here(model, tmp_path / "out", "metric=wanda")
    assert digests(tmp_path / "out" / "checkpoint") == digests(tmp_path / "straight" / "checkpoint")


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        (["sparsity=2:4", "calib.seed=3"], "sparsity, calibration"),
        (["calib.pack=64"], "calibration"),  # the same tokens in rows of another length
    ],
)
def test_a_changed_configuration_begins_anew_and_says_why(
    llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], overrides: list[str], changed: str,
) -> None:  # fmt: skip
    fail_after(monkeypatch, CheckpointWriter, "write", 7 + 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        prune_here(llama, tmp_path / "out", "metric=wanda")
    monkeypatch.undo()
    prune_here(llama, tmp_path / "out", "metric=wanda", *overrides)
    assert f"but {changed} changed: starting anew" in capsys.readouterr().out.replace("\n", " ")


def test_two_runs_do_not_share_a_folder(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(AceError, match="Another run is working in") as caught:
        prune_here(llama, tmp_path / "out", "metric=magnitude")
    assert str(tmp_path / "out") in str(caught.value)
    assert [file.name for file in (tmp_path / "out").iterdir()] == [".lock"]


def test_two_runs_of_the_same_second_have_two_folders(
    llama: Path, tmp_path: Path, configure: Callable[..., RunConfig]
) -> None:
    """Nobody named the folder, and the dated one is there when the second run comes."""
    options = ("model=custom", f"model.path={llama}", "metric=magnitude", "eval=none", "html=false", "device=cpu")
    for sparsity in ("0.3", "0.5"):
        config = configure(*options, f"sparsity={sparsity}", f"output_dir={tmp_path / 'outputs' / 'now'}")
        run(replace(config, output_dir_given=False), "test", Terminal(), DenseCache())
    found = [json.loads((tmp_path / "outputs" / name / "report.json").read_text()) for name in ("now", "now-2")]
    assert [report["sparsity"]["requested"] for report in found] == ["0.3", "0.5"]


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder where nobody may write")
def test_a_folder_that_cannot_be_written_is_refused_before_work(llama: Path, prune_here: Prune) -> None:
    with pytest.raises(AceError, match=r"/sys/kernel") as caught:
        prune_here(llama, Path("/sys/kernel/ace-prune"), "metric=magnitude")
    assert "\n" not in str(caught.value)


def test_a_limit_on_file_sizes_is_a_full_disk(
    llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real refusal of the system while the checkpoint is begun; without the probe, which would meet it first."""
    monkeypatch.setattr("ace_cli.run.machine_limit._write", lambda folder, around: 1e9)
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, hard))
    try:
        with pytest.raises(AceError, match="File too large") as caught:
            prune_here(llama, tmp_path / "out", "metric=magnitude")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert finished_looking(tmp_path / "out") == []
    assert verify(Path(prune_here(llama, tmp_path / "out", "metric=magnitude").checkpoint)) == 14


def test_an_older_checkpoint_is_not_taken_for_the_unfinished_one(
    llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune_here(llama, tmp_path / "out", "metric=varp", "sparsity=2:4")
    fail_after(monkeypatch, CheckpointWriter, "write", 7 + 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        prune_here(llama, tmp_path / "out", "metric=magnitude", "sparsity=1:4")
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "out" / "checkpoint.partial")
    report = prune_here(llama, tmp_path / "out", "metric=magnitude", "sparsity=1:4")
    assert report.sparsity.achieved == pytest.approx(0.75)


def test_a_finished_checkpoint_is_only_evaluated(
    llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ended between the checkpoint and its report."""
    monkeypatch.setattr("ace_cli.run.pipeline.make_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prune_here(llama, tmp_path / "out", "metric=wanda")
    monkeypatch.undo()
    before = digests(tmp_path / "out" / "checkpoint")
    fail_after(monkeypatch, CheckpointWriter, "write", 0, AssertionError("pruned again"))
    report = prune_here(llama, tmp_path / "out", "metric=wanda")
    assert digests(tmp_path / "out" / "checkpoint") == before
    assert any("interrupted" in warning for warning in report.warnings)
    assert report.tokens_per_second == {}


def test_an_older_checkpoint_that_could_not_be_removed_goes_with_the_next_start(
    llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ended after the new checkpoint took the old one's place."""
    prune_here(llama, tmp_path / "out", "metric=wanda")
    remove = journal.remove

    def interrupted(folder: Path, *arguments: Any, **options: Any) -> list[str]:
        if folder.name == "checkpoint.old" and folder.exists():
            raise KeyboardInterrupt
        return remove(folder, *arguments, **options)

    monkeypatch.setattr(journal, "remove", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune_here(llama, tmp_path / "out", "metric=magnitude")
    monkeypatch.undo()
    assert (tmp_path / "out" / "checkpoint.old").exists()
    report = prune_here(llama, tmp_path / "out", "metric=magnitude")
    assert any("interrupted" in warning for warning in report.warnings)
    assert not (tmp_path / "out" / "checkpoint.old").exists()


def test_a_model_is_never_overwritten_by_its_own_result(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    prune_here(llama, tmp_path / "out", "metric=wanda")
    before = digests(tmp_path / "out" / "checkpoint")
    with pytest.raises(AceError, match="where the result would go"):
        prune_here(tmp_path / "out" / "checkpoint", tmp_path / "out", "metric=magnitude", "sparsity=1:4")
    assert digests(tmp_path / "out" / "checkpoint") == before


def test_stray_files_beside_the_model_are_not_read(own_llama: Path) -> None:
    shutil.copy(own_llama / "model.safetensors", own_llama / "model_old.safetensors")
    assert {entry.file.name for entry in Checkpoint(own_llama).tensors.values()} == {"model.safetensors"}


# --- verify ----------------------------------------------------------------------------------------------------------

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def checkpoint(llama: Path, tmp_path: Path, prune_here: Prune) -> Path:
    return Path(prune_here(llama, tmp_path / "pruned", "metric=wanda", "sparsity=2:4").checkpoint)


def test_verify_sees_a_weight_too_many(checkpoint: Path) -> None:
    assert verify(checkpoint) == 14
    edit(checkpoint, UP, lambda weight: torch.where(weight == 0, 0.5, weight))
    with pytest.raises(Violation, match=UP.replace(".", r"\.")):
        verify(checkpoint)


def test_verify_sees_a_weight_too_few(checkpoint: Path) -> None:
    edit(checkpoint, UP, lambda weight: weight * (torch.arange(weight.shape[1]) > 3))
    with pytest.raises(Violation, match="zeros"):
        verify(checkpoint)


def test_verify_sees_a_lost_weight_and_another_shape(checkpoint: Path) -> None:
    edit(checkpoint, UP, lambda weight: weight[:, :32].contiguous())
    with pytest.raises(Violation, match="shape"):
        verify(checkpoint)
    manifest = json.loads((checkpoint / "pruning.json").read_text())
    manifest["slots"][0]["name"] = "lost.weight"
    (checkpoint / "pruning.json").write_text(json.dumps(manifest))
    with pytest.raises(Violation, match=r"lost\.weight|shape"):
        verify(checkpoint)


def test_verify_of_another_folder(llama: Path) -> None:
    with pytest.raises(AceError, match=r"pruning\.json"):
        verify(llama)


def test_the_pruning_entry_is_neutral(checkpoint: Path) -> None:
    """Engines refuse, or misread, quantization_config and sparsity_config."""
    config = Checkpoint(checkpoint).config()
    assert not {"quantization_config", "sparsity_config", "compression_config"} & config.keys()
    entry = config["pruning"]
    assert entry["method"] == "wanda"
    assert entry["pattern"] == "2:4"
    assert entry["sparsity"] == pytest.approx(0.5)
    assert {"tool", "command", "calibration", "base_model", "repair", "allocation"} <= entry.keys()
    assert load(checkpoint).config.model_type == "llama"
    assert (checkpoint / "tokenizer.json").is_file()
    assert (checkpoint / "generation_config.json").is_file()
    assert "base_model" in (checkpoint / "README.md").read_text()


def test_a_refinement_that_its_statistics_do_not_allow_is_refused_by_name(
    llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refine(*_: object) -> None:
        raise ArithmeticError("the Gram matrix of 128 tokens holds NaN or Inf")

    monkeypatch.setattr("ace_cli.methods.metrics.ace.ACE.refine", refine)
    with pytest.raises(AceError, match=r"layers[.]0[.].*q_proj.*: the Gram matrix of 128 tokens holds NaN or Inf"):
        prune_here(llama, tmp_path / "out", "metric=ace", "calib.n_samples=8", "calib.seq_len=16")


@pytest.mark.parametrize("metric", ["varp", "ace", "magnitude"])
def test_zeros_of_the_dense_model_are_measured_and_said(
    own_llama: Path, tmp_path: Path, here: Callable[..., Any], metric: str
) -> None:
    """Half of every matrix is zero before: less than that has nothing to do, and says so before and after."""
    file = own_llama / "model.safetensors"
    for name in weights(own_llama):
        if "_proj" in name:
            edit(own_llama, name, lambda w: w.masked_fill(w.abs() < w.abs().median(), 0))
    assert file.is_file()
    out = tmp_path / "out"
    options = [f"model.path={own_llama}", f"metric={metric}", "calib=self", "calib.n_samples=8", "eval=none"]
    done = here(*options, "sparsity=0.3", f"output_dir={out}")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "about 50% of the source's weights are zero already: sparsity=0.3 prunes next to nothing more" in said
    assert "of these weights were zero before" in said
    report = json.loads((out / "report.json").read_text())
    assert report["sparsity"]["dense"] == pytest.approx(0.5, abs=0.01)
    assert "| dense | not measured |  | 49.9" in (out / "report.md").read_text()


def test_a_dense_source_is_not_called_sparse(llama: Path, tmp_path: Path, here: Callable[..., Any]) -> None:
    options = [f"model.path={llama}", "calib=self", "calib.n_samples=8", "eval=none", f"output_dir={tmp_path / 'out'}"]
    done = here(*options)
    assert "zero" not in done.stdout.replace("zeros in pruned", "")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["sparsity"]["dense"] == 0
