"""What an interrupted run finds when it goes on, and what it may replace: only what is as it was, only what is ours."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import edit, make, write_documents

from ace_cli.core.errors import AceError
from ace_cli.core.own_files import others
from ace_cli.model.files import Checkpoint, CheckpointWriter
from ace_cli.model.pruned import MANIFEST, read_manifest, verify
from ace_cli.report.facts import Report
from ace_cli.run.journal import Work, read_journal

Prune = Callable[..., Report]
OPTIONS = ("metric=magnitude", "sparsity=2:4")
BLOCKS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=BLOCKS)


@pytest.fixture
def own(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "own"))


def weights_digest(out: Path) -> str:
    return hashlib.sha256((out / "checkpoint" / "model.safetensors").read_bytes()).hexdigest()


def interrupt(prune: Prune, source: Path, out: Path, *options: str, blocks: int = 2) -> None:
    """A run that stops inside the block after ``blocks`` finished ones."""
    with pytest.MonkeyPatch.context() as patch:
        written, write = 0, CheckpointWriter.write

        def failing(self: CheckpointWriter, name: str, tensor: torch.Tensor) -> None:
            nonlocal written
            written += 1
            if written > 7 * blocks + 3:
                raise KeyboardInterrupt
            write(self, name, tensor)

        patch.setattr(CheckpointWriter, "write", failing)
        with pytest.raises(KeyboardInterrupt):
            prune(source, out, *OPTIONS, *options)
    journal = read_journal(out)
    assert journal is not None
    assert len(journal.done) == blocks


def other_weights(folder: Path) -> None:
    """Other weights, but for the first and last bytes of each tensor."""
    tensors = load_file(folder / "model.safetensors")
    for tensor in tensors.values():
        if tensor.numel() > 400:
            flat = tensor.reshape(-1)
            flat[100:-100] = flat[100:-100].flip(0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# --- the source ------------------------------------------------------------------------------------------------------


def test_a_model_replaced_while_a_run_was_interrupted_is_not_mixed_with_it(
    own: Path, tmp_path: Path, prune_here: Prune, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(prune_here, own, tmp_path / "out")
    before = Checkpoint(own).fingerprint()
    other_weights(own)
    assert Checkpoint(own).fingerprint() == before, "or the quick look would do"
    prune_here(own, tmp_path / "out", *OPTIONS)
    assert "another one than when" in capsys.readouterr().out.replace("\n", " ")
    prune_here(own, tmp_path / "straight", *OPTIONS)
    assert weights_digest(tmp_path / "out") == weights_digest(tmp_path / "straight")


def test_a_model_that_was_only_touched_is_continued(
    own: Path, tmp_path: Path, prune_here: Prune, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(prune_here, own, tmp_path / "out")
    file = own / "model.safetensors"
    shutil.copy(file, tmp_path / "copy")
    (tmp_path / "copy").replace(file)
    prune_here(own, tmp_path / "out", *OPTIONS)
    assert f"{2} blocks are done" in capsys.readouterr().out
    prune_here(own, tmp_path / "straight", *OPTIONS)
    assert weights_digest(tmp_path / "out") == weights_digest(tmp_path / "straight")


def edit_in_place(folder: Path) -> None:
    """A few bytes of a block that was read, and the old time of change."""
    file, status = folder / "model.safetensors", (folder / "model.safetensors").stat()
    entry = Checkpoint(folder).tensors["model.layers.0.mlp.up_proj.weight"]
    with open(file, "r+b") as stream:
        stream.seek(entry.start + 5000)
        stream.write(b"\0\0\0\0")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def edit_what_comes(folder: Path) -> None:
    """Only a block that is read later."""
    edit(folder, f"model.layers.{BLOCKS - 1}.mlp.up_proj.weight", lambda weight: weight.flip(0))


def edit_config(folder: Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("1e-06", "1e-02"))


def lose_a_file(folder: Path) -> None:
    (folder / "generation_config.json").unlink()


@pytest.mark.parametrize("change", [other_weights, edit_in_place, edit_what_comes, edit_config, lose_a_file])
def test_a_model_that_changes_while_it_is_read_gives_no_result(
    own: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    record = Work.record

    def changing(self: Work, block: Any, *rest: Any) -> None:
        record(self, block, *rest)
        if block.index == 1:
            change(own)

    monkeypatch.setattr(Work, "record", changing)
    with pytest.raises(AceError, match="changed while") as caught:
        prune_here(own, tmp_path / "out", *OPTIONS)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").rglob("config.json"))
    assert not (tmp_path / "out" / "report.json").exists()
    monkeypatch.undo()
    prune_here(own, tmp_path / "out", *OPTIONS)
    prune_here(own, tmp_path / "straight", *OPTIONS)
    assert weights_digest(tmp_path / "out") == weights_digest(tmp_path / "straight")


def test_a_file_of_the_model_that_decides_nothing_may_change(
    own: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own / "README.md").write_text("# A model")
    monkeypatch.setattr("ace_cli.run.pipeline.make_report", _then(lambda: (own / "README.md").write_text("# M")))
    prune_here(own, tmp_path / "out", *OPTIONS)


def _then(first: Callable[[], Any]) -> Callable[..., Report]:
    from ace_cli.run.assemble import make_report

    def make(*arguments: Any) -> Report:
        first()
        return make_report(*arguments)

    return make


def test_a_tensor_read_twice_must_be_the_same(own: Path) -> None:
    checkpoint, name = Checkpoint(own), "model.layers.1.mlp.up_proj.weight"
    checkpoint.read(name)
    edit(own, name, lambda weight: weight + 1)
    with pytest.raises(AceError, match="changed while"):
        checkpoint.read(name)


# --- what was made ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [0, 1])
def test_a_finished_block_that_was_damaged_is_done_again(
    model: Path, tmp_path: Path, prune_here: Prune, capsys: pytest.CaptureFixture[str], block: int
) -> None:
    interrupt(prune_here, model, tmp_path / "out")
    partial = Checkpoint(tmp_path / "out" / "checkpoint.partial", bare=True)
    entry = partial.tensors[f"model.layers.{block}.mlp.up_proj.weight"]
    with open(entry.file, "r+b") as stream:
        stream.seek(entry.start)
        stream.write(bytes(entry.nbytes))
    prune_here(model, tmp_path / "out", *OPTIONS)
    assert f"not as it was from block {block} on" in capsys.readouterr().out.replace("\n", " ")
    prune_here(model, tmp_path / "straight", *OPTIONS)
    assert weights_digest(tmp_path / "out") == weights_digest(tmp_path / "straight")


def test_a_journal_that_claims_more_blocks_than_exist(model: Path, tmp_path: Path, prune_here: Prune) -> None:
    interrupt(prune_here, model, tmp_path / "out", blocks=3)
    journal = tmp_path / "out" / "progress.jsonl"
    line = json.loads(journal.read_text().splitlines()[-1])
    with open(journal, "a") as stream:
        for index in range(3, 9):
            line["block"] |= {"index": index, "name": f"model.layers.{index}"}
            stream.write(json.dumps(line) + "\n")
    report = prune_here(model, tmp_path / "out", *OPTIONS)
    assert len(report.blocks) == BLOCKS
    assert verify(tmp_path / "out" / "checkpoint") == BLOCKS * 7


def damages(value: Any) -> Iterator[Any]:
    """``value`` with each of its parts in turn replaced by something of another type or range, or left out."""
    for junk in (None, [], {}, "x", -1, 1e400, True, [[]], {"a": 1}):
        yield junk
    parts = (
        list(value.items() if isinstance(value, dict) else enumerate(value)) if isinstance(value, dict | list) else []
    )
    for name, part in parts[:12]:
        for junk in list(damages(part))[:60]:
            copy = dict(value) if isinstance(value, dict) else list(value)
            copy[name] = junk
            yield copy
        if isinstance(value, dict):
            yield {other: kept for other, kept in value.items() if other != name}


@pytest.mark.parametrize("line", [0, 1])
def test_a_journal_of_the_wrong_shape_is_never_a_crash(
    model: Path, tmp_path: Path, prune_here: Prune, line: int
) -> None:
    interrupt(prune_here, model, tmp_path / "out", blocks=1)
    journal = tmp_path / "out" / "progress.jsonl"
    lines = journal.read_text().splitlines()
    for damaged in damages(json.loads(lines[line])):
        changed = [*lines[:line], json.dumps(damaged), *lines[line + 1 :]]
        journal.write_text("\n".join(changed) + "\n")
        found = read_journal(tmp_path / "out")
        assert found is None or len(found.done) <= 1
    for raw in (b"", b"\xff\xfe\0", b"[" * 100_000, b"{}\n{}", b"null", b"5\n5"):
        journal.write_bytes(raw)
        assert read_journal(tmp_path / "out") is None


# --- pruning.json ----------------------------------------------------------------------------------------------------


def test_a_manifest_of_the_wrong_shape_is_refused_in_one_line(model: Path, tmp_path: Path, prune_here: Prune) -> None:
    checkpoint = Path(prune_here(model, tmp_path / "out", *OPTIONS).checkpoint)
    file = checkpoint / MANIFEST
    content = json.loads(file.read_text())
    assert others(checkpoint, content["files"]) == []
    for slots in damages(content["slots"]):
        file.write_text(json.dumps({**content, "slots": slots}))
        try:
            read_manifest(checkpoint)
        except AceError as fault:
            assert "\n" not in str(fault)
    for wrong in ([], None, {}, [content["slots"][0]] * 2, [{**content["slots"][0], "pattern": "1e-999999999"}]):
        file.write_text(json.dumps({**content, "slots": wrong}))
        with pytest.raises(AceError, match=r"pruning\.json"):
            verify(checkpoint)
    with pytest.raises(AceError, match=r"pruning\.json"):
        prune_here(model, tmp_path / "out", *OPTIONS)


# --- files of others -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "state"),
    [("checkpoint", "new"), ("checkpoint/deep/er", "finished"), ("checkpoint.partial", "interrupted"),
     ("checkpoint.partial", "new"), ("checkpoint.old", "finished")],
)  # fmt: skip
def test_files_that_others_put_there_stay(
    model: Path, tmp_path: Path, prune_here: Prune, place: str, state: str
) -> None:
    name = f"{place}/notes.txt"
    out = tmp_path / "out"
    if state != "new":
        prune_here(model, out, *OPTIONS)
    if state == "interrupted":
        interrupt(prune_here, model, out, "scope=null")
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("years of work")
    with pytest.raises(AceError, match=r"not (written|made) by ace-prune") as caught:
        prune_here(model, out, "metric=magnitude", "sparsity=0.3")
    assert name.split("/")[0] in str(caught.value)
    assert (out / name).read_text() == "years of work"
    (out / name).unlink()
    if state != "new":
        prune_here(model, out, *OPTIONS)


def test_a_file_put_there_during_the_run_stays(
    model: Path, tmp_path: Path, prune_here: Prune, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    prune_here(model, out, *OPTIONS)
    publish = Work.publish

    def late(self: Work) -> str:
        (out / "checkpoint" / "notes.txt").write_text("years of work")
        return publish(self)

    monkeypatch.setattr(Work, "publish", late)
    prune_here(model, out, "metric=magnitude", "sparsity=0.3")
    assert (out / "checkpoint.old" / "notes.txt").read_text() == "years of work"
    assert [file.name for file in (out / "checkpoint.old").iterdir()] == ["notes.txt"]
    assert "did not write" in capsys.readouterr().out
    assert verify(out / "checkpoint") == BLOCKS * 7


def test_what_an_earlier_run_kept_is_not_dropped(model: Path, tmp_path: Path, prune_here: Prune) -> None:
    out = tmp_path / "out"
    prune_here(model, out, *OPTIONS)
    before = weights_digest(out)
    for options in (OPTIONS, ("metric=magnitude", "sparsity=0.3")):
        with pytest.raises(AceError, match="keep_checkpoint=false"):
            prune_here(model, out, *options, "keep_checkpoint=false")
    assert weights_digest(out) == before


def test_a_checkpoint_that_is_not_to_be_kept_goes_also_after_an_interruption(
    model: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ace_cli.run.pipeline.make_report", _then(lambda: (_ for _ in ()).throw(KeyboardInterrupt)))
        patch.setattr("ace_cli.run.pipeline._write", _stop)
        prune_here(model, out, *OPTIONS, "keep_checkpoint=false")
    assert (out / "checkpoint").is_dir()
    prune_here(model, out, *OPTIONS, "keep_checkpoint=false")
    assert sorted(file.name for file in out.iterdir() if not file.name.startswith(".")) == [
        "report.json", "report.md", "run.log",
    ]  # fmt: skip


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_link_is_not_replaced(model: Path, tmp_path: Path, prune_here: Prune) -> None:
    out = tmp_path / "out"
    prune_here(model, out, *OPTIONS)
    shutil.move(out / "checkpoint", tmp_path / "elsewhere")
    (out / "checkpoint").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AceError, match="is a link"):
        prune_here(model, out, *OPTIONS)
    assert verify(tmp_path / "elsewhere") == BLOCKS * 7


def test_a_report_of_somebody_else_is_not_overwritten(model: Path, tmp_path: Path, prune_here: Prune) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.md").write_text("years of work")
    with pytest.raises(AceError, match=r"report\.md"):
        prune_here(model, tmp_path / "out", *OPTIONS)
    assert (tmp_path / "out" / "report.md").read_text() == "years of work"


@pytest.mark.parametrize("place", ["checkpoint", "checkpoint.partial", "checkpoint.old"])
def test_nothing_that_is_read_may_lie_where_the_result_goes(
    model: Path, tmp_path: Path, prune_here: Prune, place: str
) -> None:
    folder = tmp_path / "out" / place
    folder.mkdir(parents=True)
    pages = write_documents(folder / "pages.jsonl")
    (tmp_path / "link").symlink_to(folder)
    for path in (pages, tmp_path / "link" / "pages.jsonl"):
        with pytest.raises(AceError, match=r"calib\.path.*lies in"):
            prune_here(model, tmp_path / "out", "metric=wanda", "calib=text", f"calib.path={path}")
    shutil.copytree(model, folder / "model")
    with pytest.raises(AceError, match=r"model\.path.*lies in"):
        prune_here(folder / "model", tmp_path / "out", *OPTIONS)
    assert pages.is_file()
