"""Documents from files, and windows cut from them."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY

from ace_cli.core.errors import AceError
from ace_cli.core.registry import choices
from ace_cli.data import generation as sampling
from ace_cli.data.documents import (
    consecutive_windows,
    fingerprint,
    load_tokenizer,
    random_windows,
)
from ace_cli.data.generation import CALIBRATION, EVALUATION, sample_windows, start_token
from ace_cli.data.text_files import local_documents, local_file_fault
from ace_cli.model.files import Checkpoint

TEXTS = ["w3 w4 w5", "w6 w7\nw8", "w9"]


def words(text: str, return_tensors: str | None = None) -> dict[str, Any]:
    """A stand-in tokenizer: "5 6 7" is tokens 5, 6, 7."""
    ids = [int(word) for word in text.split()]
    return {"input_ids": torch.tensor([ids]) if return_tensors else ids}


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> Any:
    return load_tokenizer(Checkpoint(llama))


def save(file: Path, field: str = "text") -> Path:
    lines = "\n".join(json.dumps({"id": i, field: text}) for i, text in enumerate(TEXTS)) + "\n"
    if file.suffix == ".parquet":
        import datasets

        datasets.Dataset.from_dict({"id": [0, 1, 2], field: TEXTS}).to_parquet(str(file))
    elif file.suffix == ".gz":
        file.write_bytes(gzip.compress(lines.encode()))
    else:
        file.write_text(json.dumps([{field: text} for text in TEXTS]) if file.suffix == ".json" else lines)
    return file


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.jsonl.gz", "a.parquet", "a.json"])
def test_tables_of_every_kind(tmp_path: Path, name: str) -> None:
    assert local_documents(str(save(tmp_path / name)), "text") == TEXTS
    assert local_documents(str(save(tmp_path / name, field="body")), "body") == TEXTS


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert "".join(local_documents(str(tmp_path / "a.txt"), "ignored")).split() == ["one", "two"]


def test_a_missing_column_is_named_beside_those_that_are_there(tmp_path: Path) -> None:
    file = save(tmp_path / "a.jsonl", field="body")
    with pytest.raises(AceError, match="no column 'text'") as caught:
        local_documents(str(file), "text")
    assert "body" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{not json\n", b"\x1f\x8bgarbage", b"\n\n"])
def test_files_that_are_not_what_they_say(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_bytes(content)
    with pytest.raises(AceError, match=r"broken\.jsonl") as caught:
        local_documents(str(file), "text")
    assert "\n" not in str(caught.value)


def test_a_truncated_gzip_file(tmp_path: Path) -> None:
    file = save(tmp_path / "a.jsonl.gz")
    file.write_bytes(file.read_bytes()[:-12])
    with pytest.raises(AceError, match=r"a\.jsonl\.gz"):
        local_documents(str(file), "text")


def test_file_faults_before_anything_is_loaded(tmp_path: Path) -> None:
    assert local_file_fault(str(save(tmp_path / "a.jsonl")), "calib.path") is None
    assert "calib.path is missing" in (local_file_fault(None, "calib.path") or "")
    assert "no such file" in (local_file_fault(str(tmp_path), "calib.path") or "")
    (tmp_path / "a.csv").write_text("text\n")
    assert ".jsonl" in (local_file_fault(str(tmp_path / "a.csv"), "calib.path") or "")


# --- windows ---------------------------------------------------------------------------------------------------------


def wanda_windows(documents: list[str], count: int, length: int, seed: int) -> list[list[int]]:
    """methods.md 0.2 (wanda/lib/data.py), written out."""
    random.seed(seed)
    windows = []
    while len(windows) < count:
        ids = words(documents[random.randint(0, len(documents) - 1)])["input_ids"]
        if len(ids) > length:
            start = random.randint(0, len(ids) - length - 1)
            windows.append(ids[start : start + length])
    return windows


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_random_windows_are_wanda_s_on_documents_that_are_long_enough(seed: int) -> None:
    documents = [" ".join(str(100 * d + i) for i in range(20 + d)) for d in range(6)]
    got = random_windows(documents, words, 12, 8, seed)
    assert got.dtype == torch.int64
    assert got.tolist() == wanda_windows(documents, 12, 8, seed)


def test_short_documents_are_passed_over() -> None:
    documents = ["1 2 3", " ".join(map(str, range(10, 40))), "4 5 6 7 8"]
    windows = random_windows(documents, words, 20, 5, 0)
    assert windows.shape == (20, 5)
    assert int(windows.min()) >= 10
    assert bool((windows.diff(dim=1) == 1).all())


def test_seeds_differ() -> None:
    documents = [" ".join(map(str, range(500)))]
    assert not torch.equal(random_windows(documents, words, 8, 8, 0), random_windows(documents, words, 8, 8, 1))


@pytest.mark.parametrize("documents", [["1 2 3"], ["1 2 3", "4 5", ""], ["1 2 3 4 5 6"] * 2])
def test_too_few_long_documents(documents: list[str]) -> None:
    with pytest.raises(AceError, match="Too few long documents") as caught:
        random_windows(documents, words, 50, 5, 0)
    assert "50 asked for" in str(caught.value)


def test_consecutive_windows_cover_the_text_without_overlap() -> None:
    text = " ".join(map(str, range(23)))
    assert consecutive_windows(text, words, 5).tolist() == torch.arange(20).view(4, 5).tolist()
    assert consecutive_windows(text, words, 23).tolist() == [list(range(23))]
    with pytest.raises(AceError, match="23 tokens"):
        consecutive_windows(text, words, 24)


@pytest.mark.parametrize(("most", "count", "whole"), [(None, 4, True), (5, 4, True), (4, 4, True), (3, 3, False)])
def test_a_text_with_no_more_windows_is_measured_whole(
    llama: Path, tmp_path: Path, most: int | None, count: int, whole: bool
) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in range(3, 26)))
    windows = choices("eval")["text"](path=str(tmp_path / "text.txt"), seq_len=5, max_windows=most).windows(
        Checkpoint(llama), "cpu"
    )
    assert windows.ids_NL.tolist() == torch.arange(3, 23).view(4, 5)[:count].tolist()
    assert windows.whole is whole


#: What the stand-in documents give: 128 windows of 16 tokens to calibrate on, all of 32 tokens to evaluate on.
FINGERPRINTS = {
    ("c4", "calib"): "1617b4d6ab2132c7", ("c4", "eval"): "5c146cc8b00d4fe5",
    ("wikitext2", "calib"): "a95ddf6acf712376", ("wikitext2", "eval"): "5c146cc8b00d4fe5",
    ("text", "calib"): "1617b4d6ab2132c7", ("text", "eval"): "5c146cc8b00d4fe5",
}  # fmt: skip


@pytest.mark.parametrize(("name", "group"), FINGERPRINTS)
def test_every_source_gives_the_windows_it_always_gave(
    llama: Path, documents: Path, configure: Any, monkeypatch: pytest.MonkeyPatch, name: str, group: str
) -> None:
    asked: list[Any] = []
    given = local_documents(str(documents), "text")
    if name != "text":
        monkeypatch.setattr("ace_cli.data.documents._column", lambda *args, **options: asked.append(options) or given)
    option = {"calib": "calib=self", "eval": "eval=none"} | {group: f"{group}={name}"}
    more = [f"{group}.path={documents}"] if name == "text" else []
    more += ["eval.seq_len=32"] if group == "eval" else []
    choice = getattr(configure(f"model.path={llama}", *option.values(), *more), group)
    windows = choice.windows(Checkpoint(llama), "cpu")
    ids_NL = windows if group == "calib" else windows.ids_NL
    assert fingerprint(ids_NL.contiguous())[:16] == FINGERPRINTS[name, group]
    splits = {"c4": ("train", "validation"), "wikitext2": ("train", "test")}
    assert [options["split"] for options in asked] == ([splits[name][group == "eval"]] if name in splits else [])


def test_one_file_offers_a_source_to_calibration_and_to_evaluation() -> None:
    """Its own fields come after those of the group; its defaults are those of the windows."""
    for group in ("calib", "eval"):
        assert set(choices("source")) == set(choices(group)) - {"none"}
    calib, evaluation = choices("calib")["text"], choices("eval")["text"]
    assert [field.name for field in dataclasses.fields(calib)][-3:] == ["min_tokens", "path", "field"]
    assert [field.name for field in dataclasses.fields(evaluation)][-3:] == ["max_windows", "path", "field"]
    evaluated = {name: choices("eval")[name]() for name in choices("source")}
    assert [(choice.seq_len, choice.max_windows) for choice in evaluated.values()] == [
        (2048, 256), (128, 32), (2048, None), (2048, None),
    ]  # fmt: skip
    assert {choice.seq_len for choice in (cls() for cls in choices("calib").values())} == {16}


def test_faults_of_a_source_name_the_option_they_came_from() -> None:
    assert choices("calib")["text"]().faults()[0].startswith("calib.path is missing")
    assert choices("eval")["text"]().faults()[0].startswith("eval.path is missing")
    assert choices("calib")["self"](seed=-1).faults() == ["calib.seed=-1: must not be negative"]
    assert choices("eval")["self"](seed=-1).faults() == ["eval.seed=-1: must not be negative"]
    assert "eval=self writes" in choices("eval")["self"](max_windows=None).faults()[0]


def test_what_the_model_wrote_is_measured_whole(llama: Path) -> None:
    windows = choices("eval")["self"](seq_len=4, max_windows=3).windows(Checkpoint(llama), "cpu")
    assert (windows.ids_NL.shape, windows.whole) == ((3, 4), True)


def test_the_folder_s_own_tokenizer(tokenizer: Any) -> None:
    assert tokenizer("w5 w9")["input_ids"] == [5, 9]


def test_a_folder_without_a_tokenizer(llama: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((llama / name).read_bytes())
    with pytest.raises(AceError, match="tokenizer") as caught:
        load_tokenizer(Checkpoint(tmp_path))
    assert "\n" not in str(caught.value)


# --- text the model writes itself --------------------------------------------------------------------------------


def test_self_written_windows_repeat_and_differ_by_seed_and_purpose(llama: Path) -> None:
    checkpoint = Checkpoint(llama)
    windows = {
        (seed, purpose): sample_windows(checkpoint, 6, 10, seed, purpose, "cpu")
        for seed in (0, 1) for purpose in (CALIBRATION, EVALUATION)
    }  # fmt: skip
    for (seed, purpose), ids in windows.items():
        assert (ids.shape, ids.dtype) == ((6, 10), torch.int64)
        assert torch.equal(ids, sample_windows(checkpoint, 6, 10, seed, purpose, "cpu"))
        assert int(ids.min()) >= 0
        assert int(ids.max()) < VOCABULARY
        assert bool((ids[:, 0] == start_token(checkpoint)).all())
    distinct = {tuple(ids.reshape(-1).tolist()) for ids in windows.values()}
    assert len(distinct) == len(windows)


def test_self_written_windows_follow_the_model_s_distribution(llama: Path) -> None:
    """The second token of many windows is drawn from the logits after the start token."""
    from tiny_models import load

    checkpoint = Checkpoint(llama)
    drawn = sample_windows(checkpoint, 20_000, 2, 0, CALIBRATION, "cpu")[:, 1]
    with torch.inference_mode():
        expected = load(llama)(torch.tensor([[start_token(checkpoint)]])).logits[0, -1].softmax(-1)
    found = drawn.bincount(minlength=VOCABULARY) / len(drawn)
    assert float((found - expected).abs().sum()) < 0.1
    assert float((1 / VOCABULARY - expected).abs().sum()) > 0.3  # far from uniform, or this shows nothing


def test_an_impossible_token_is_never_drawn() -> None:
    logits_NV = torch.tensor([float("-inf"), 0.0, float("-inf"), 1.0, float("-inf")]).expand(5000, 5)
    drawn_N = sampling.draw(logits_NV, torch.Generator().manual_seed(0))[:, 0]
    assert drawn_N.unique().tolist() == [1, 3]


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"bos_token_id": 1, "eos_token_id": 2}, 1), ({"bos_token_id": None, "eos_token_id": 2}, 2),
     ({"eos_token_id": [7, 8]}, 7), ({}, 0)],
)  # fmt: skip
def test_start_token(tmp_path: Path, llama: Path, config: dict[str, Any], expected: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    assert start_token(Checkpoint(tmp_path)) == expected
