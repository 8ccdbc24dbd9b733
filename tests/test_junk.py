"""Junk at every door of a model folder: it is read, or refused in one line; no traceback, no waiting for hours."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from test_source import write_gguf
from tiny_models import make, token_windows, weights

from ace_cli.core.errors import AceError
from ace_cli.model.bin_import import read_bin
from ace_cli.model.files import Checkpoint
from ace_cli.model.folder import INDEX, weight_map
from ace_cli.model.gguf_import import check_gguf, import_gguf
from ace_cli.model.header import read_header
from ace_cli.model.streamed import StreamedModel

NUMBERS = some.one_of(
    some.integers(-3, 70), some.integers(), some.sampled_from([-1, 0, 1, 2**31, 2**63, 2**64, 10**9, 10**400]),
    some.floats(), some.booleans(),
)  # fmt: skip
SCALARS = some.one_of(
    some.none(), NUMBERS, some.text(max_size=8), some.sampled_from(["../x", "/etc", "a\0b", "\ud800"])
)
JSON = some.recursive(
    SCALARS,
    lambda inner: some.one_of(
        some.lists(inner, max_size=3), some.dictionaries(some.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
BYTES = some.one_of(some.binary(max_size=64), JSON.map(lambda value: json.dumps(value).encode()))


def few(examples: int) -> Callable[..., Any]:
    """So many examples, the same ones in every run."""
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


def read_or_refused(action: Callable[[], Any]) -> Any:
    """What ``action`` gives, None if it refuses: in one line."""
    try:
        return action()
    except AceError as fault:
        assert str(fault).isprintable()
        assert len(str(fault)) < 4000
        return None


def put(content: Any, path: list[Any], value: Any) -> Any:
    """``content`` with ``value`` at the place that the numbers of ``path`` lead to."""
    place = content
    for step, number in enumerate(path):
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = keys[number % len(keys)]
        inner = place[key]
        if step + 1 == len(path) or not isinstance(inner, dict | list) or not inner:
            place[key] = value
            return content
        place = inner
    return content


PATHS = some.lists(some.integers(0, 60), min_size=1, max_size=3)


# --- safetensors -----------------------------------------------------------------------------------------------------


def as_file(folder: Path, header: bytes, data: bytes) -> Path:
    file = folder / "junk.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return file


@few(300)
@given(path=PATHS, value=JSON)
def test_headers_with_one_thing_wrong(tmp_path: Path, path: list[int], value: Any) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
    file = as_file(tmp_path, json.dumps(put(header, path, value)).encode(), bytes(32))
    found = read_or_refused(lambda: read_header(file))
    assert found is None or all(entry.start + entry.nbytes <= file.stat().st_size for entry in found)


@few(300)
@given(header=BYTES, length=some.one_of(some.none(), some.integers(0, 2**64 - 1)), data=some.binary(max_size=16))
def test_headers_of_anything(tmp_path: Path, header: bytes, length: int | None, data: bytes) -> None:
    file = as_file(tmp_path, header, data)
    if length is not None:
        file.write_bytes(length.to_bytes(8, "little") + header + data)
    read_or_refused(lambda: read_header(file))


@few(200)
@given(content=some.one_of(JSON, some.builds(lambda value: {"weight_map": value}, JSON),
                           some.builds(lambda value: {"weight_map": {"a": value}}, JSON)))  # fmt: skip
def test_indexes(tmp_path: Path, content: Any) -> None:
    (tmp_path / INDEX).write_text(json.dumps(content))
    found = read_or_refused(lambda: weight_map(tmp_path / INDEX))
    assert not found or all((tmp_path / name).parent == tmp_path for name in found.values())


# --- config.json -----------------------------------------------------------------------------------------------------


def run_through(folder: Path) -> None:
    model = StreamedModel(Checkpoint(folder), torch.device("cpu"), torch.float32)
    model.check_complete()
    list(model.batches(token_windows(1, 8)))


@pytest.fixture(scope="module", params=["llama", "gemma2", "mixtral"])
def configured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = make(tmp_path_factory.mktemp(request.param), request.param)
    return folder, json.loads((folder / "config.json").read_text())


@few(150)
@given(path=PATHS, value=JSON)
def test_configurations_with_one_thing_wrong(
    configured: tuple[Path, dict[str, Any]], path: list[int], value: Any
) -> None:
    folder, config = configured
    (folder / "config.json").write_text(json.dumps(put(json.loads(json.dumps(config)), path, value)))
    read_or_refused(lambda: run_through(folder))


@few(50)
@given(content=BYTES)
def test_configurations_of_anything(configured: tuple[Path, dict[str, Any]], content: bytes) -> None:
    folder, _ = configured
    (folder / "config.json").write_bytes(content)
    read_or_refused(lambda: run_through(folder))


# --- .bin and GGUF ---------------------------------------------------------------------------------------------------


@few(150)
@given(content=some.one_of(JSON, some.dictionaries(some.text(max_size=3), JSON, max_size=2)),
       how=some.sampled_from([torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))]))  # fmt: skip
def test_bin_files_of_anything(tmp_path: Path, content: Any, how: Callable[[Any, Path], Any]) -> None:
    how(content, tmp_path / "x.bin")
    found = read_or_refused(lambda: read_bin(tmp_path / "x.bin"))
    assert not found


def damaged(whole: bytes, changes: list[tuple[int, bytes]], within: int) -> bytes:
    """``whole`` with bytes replaced in its first ``within``."""
    raw = bytearray(whole)
    for place, value in changes:
        start = place % within
        raw[start : start + len(value)] = value
    return bytes(raw)


CHANGES = some.lists(
    some.tuples(some.integers(0, 10**6), some.one_of(some.binary(min_size=1, max_size=8),
                some.sampled_from([bytes(8), b"\xff" * 8, b"\xff" * 4, (2**40).to_bytes(8, "little")]))),
    min_size=1, max_size=3,
)  # fmt: skip


@few(150)
@given(changes=CHANGES)
def test_bin_files_with_bytes_wrong(tmp_path: Path, changes: list[tuple[int, bytes]]) -> None:
    torch.save({"a": torch.ones(3), "b": torch.zeros(2, 2)}, tmp_path / "x.bin")
    whole = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(damaged(whole, changes, len(whole)))
    read_or_refused(lambda: read_bin(tmp_path / "x.bin"))


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("gguf")
    return write_gguf(folder, "llama", weights(make(folder / "source", "llama"))).read_bytes()


@few(300)
@given(changes=CHANGES, keep=some.integers(0, 10**6))
def test_gguf_headers_with_bytes_wrong(
    tmp_path: Path, gguf_bytes: bytes, changes: list[tuple[int, bytes]], keep: int
) -> None:
    (tmp_path / "x.gguf").write_bytes(damaged(gguf_bytes, changes, 4000)[: keep if keep < 5000 else None])
    read_or_refused(lambda: check_gguf(tmp_path / "x.gguf"))


@few(25)
@given(changes=CHANGES)
def test_gguf_files_with_bytes_wrong(tmp_path: Path, gguf_bytes: bytes, changes: list[tuple[int, bytes]]) -> None:
    (tmp_path / "x.gguf").write_bytes(damaged(gguf_bytes, changes, 4000))
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    read_or_refused(lambda: import_gguf(tmp_path / "x.gguf", "float32", tmp_path / "out"))
