"""Files of text that people bring: what is read of them, and that junk is one line and no more."""

from __future__ import annotations

import datetime
import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ace_cli.core.errors import AceError
from ace_cli.data import text_files
from ace_cli.data.text_files import ENDINGS, local_documents

QUICK = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def write(file: Path, content: str | bytes) -> str:
    content = content.encode() if isinstance(content, str) else content
    file.write_bytes(gzip.compress(content) if file.name.endswith(".gz") else content)
    return str(file)


def refusal(file: str, field: str = "text") -> str:
    with pytest.raises(AceError) as caught:
        local_documents(file, field)
    assert "\n" not in str(caught.value)
    assert Path(file).name in str(caught.value)
    return str(caught.value)


# --- what is read ----------------------------------------------------------------------------------------------------


def test_a_column_that_nobody_asked_for_may_change_its_type(tmp_path: Path) -> None:
    lines = '{"text": "a", "meta": 1}\n{"text": "b", "meta": {"x": []}}\n{"text": "c", "meta": "2020-01-01"}\n'
    assert local_documents(write(tmp_path / "a.jsonl", lines), "text") == ["a", "b", "c"]
    assert local_documents(write(tmp_path / "a.json", f"[{','.join(lines.split(chr(10))[:3])}]"), "text") == list("abc")


def test_texts_stay_as_they_are(tmp_path: Path) -> None:
    """What looks like a date is a text; blank lines and rows without text are passed over."""
    lines = '\n{"text": "2020-01-01"}\n\n{"text": null}\n{}\n{"text": "a\\nb\\u0000\\ud83d\\ude00"}\n  \n{"text": ""}'
    assert local_documents(write(tmp_path / "a.jsonl", lines), "text") == ["2020-01-01", "a\nb\0😀", ""]
    assert local_documents(write(tmp_path / "half.jsonl", '{"text": "a\\ud83d"}'), "text") == ["a�"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.jsonl.gz"])
def test_the_mark_of_some_editors_is_no_text(tmp_path: Path, name: str) -> None:
    content = "one\r\ntwo\rthree" if name == "a.txt" else '{"text": "one"}\r\n'
    expected = ["one\ntwo\nthree"] if name == "a.txt" else ["one"]
    assert local_documents(write(tmp_path / name, b"\xef\xbb\xbf" + content.encode()), "text") == expected


@pytest.mark.parametrize("name", ["pages[1].jsonl", "a*.jsonl", "a?b{c}.jsonl", "é ü,=#.jsonl", "**.jsonl"])
def test_any_name_is_one_file(tmp_path: Path, name: str) -> None:
    write(tmp_path / "pages1.jsonl", '{"text": "another"}')
    assert local_documents(write(tmp_path / name, '{"text": "this"}'), "text") == ["this"]


def test_json_of_every_shape(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b"}]
    for content in (
        json.dumps(rows),
        json.dumps(rows, indent=2),
        "\n\n" + json.dumps(rows),
        "[\n" + json.dumps(rows)[1:],
    ):
        assert local_documents(write(tmp_path / "a.json", content), "text") == ["a", "b"]
    assert local_documents(write(tmp_path / "a.json", json.dumps({"text": "a", "b": [1]}, indent=2)), "text") == ["a"]


def test_a_line_may_be_longer_than_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "_PIECE", 7)
    texts = ["w" * 100, "é" * 33, "", "x\ny"]
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    assert local_documents(write(tmp_path / "a.jsonl", lines), "text") == texts


def test_a_parquet_file_is_read_by_its_column(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    texts = pa.array(["a", None, "b"])
    columns = {"text": texts, "coded": texts.dictionary_encode(), "large": texts.cast(pa.large_string()),
               "number": [1, 2, 3], "date": [datetime.datetime(2020, 1, 1)] * 3, "list": [["a"]] * 3}  # fmt: skip
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    for column in ("text", "coded", "large"):
        assert local_documents(str(tmp_path / "a.parquet"), column) == ["a", "b"]
    for column, kind in (("number", "int64"), ("date", "timestamp"), ("list", "list")):
        assert kind in refusal(str(tmp_path / "a.parquet"), column)
    assert "found: text, coded, large" in refusal(str(tmp_path / "a.parquet"), "body")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"text": "a"}\n{"text": 5}\n', "line 2: 'text' holds a number, not text"),
        ('{"text": ["a"]}', "holds a list"),
        ('{"text": {"a": 1}}', "holds an object"),
        ('{"text": true}', "holds true or false"),
        ('{"text": "a"}\n["b"]\n', "line 2 is a list"),
        ('{"text": "a"}\n{"text": "b\n', "line 2"),
        ('"text"\n', "line 1 is text, not an object"),
        ('["a", "b"]', "row 1 is text"),
        ('{"body": "a", "id": 1}', "no column 'text' with text; found: body, id"),
        ('{"text": null}', "no column 'text' with text"),
        (b'{"text": "caf\xe9"}\n', "line 1 is not UTF-8: byte 0xe9"),
        ('{"text": "a"}'.encode("utf-16"), "UTF-16"),
        ('{"text":' + "[" * 100_000 + "]" * 100_000 + "}", "line 1 is nested too deep"),
        ("[" * 100_000, "nested too deep"),
        ('{"text": ' + "9" * 10_000 + "}", "line 1"),
        ("", "found: nothing"),
        ("text", "line 1"),
    ],
)
def test_lines_that_are_none(tmp_path: Path, content: str | bytes, expected: str) -> None:
    assert expected in refusal(write(tmp_path / "a.jsonl", content))


@pytest.mark.parametrize("content", [b"", b" \n", b"caf\xe9", b"\xff\xfea\0"])
def test_plain_files_without_text(tmp_path: Path, content: bytes) -> None:
    refusal(write(tmp_path / "a.txt", content))


def test_a_file_that_was_made_to_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "_HARMLESS", 1 << 20)
    assert "250 times its size" in refusal(write(tmp_path / "bomb.jsonl.gz", b" " * (8 << 20)))
    monkeypatch.setattr(text_files, "_LONGEST_LINE", 1 << 20)
    assert "line 1 is longer" in refusal(write(tmp_path / "long.jsonl", b" " * (2 << 20)))
    monkeypatch.setattr(text_files.memory, "free", lambda: 40)
    assert "more text than memory" in refusal(write(tmp_path / "much.jsonl", '{"text": "0123456789a"}'))


def test_a_deep_line_does_not_end_the_process(tmp_path: Path) -> None:
    write(tmp_path / "deep.jsonl", '{"text":' + "[" * 100_000 + "]" * 100_000 + "}")
    code = "from ace_cli.data.text_files import local_documents; local_documents('deep.jsonl', 'text')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ace_cli.core.errors.AceError")


# --- junk ------------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates().map(str),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
ROWS = st.lists(st.dictionaries(st.sampled_from(["text", "a"]), VALUES, max_size=2) | VALUES, max_size=4)
LINES = ROWS.map(lambda rows: "\n".join(json.dumps(row) for row in rows).encode())
CUT = st.tuples(LINES, st.integers(0, 40), st.binary(max_size=3)).map(lambda t: t[0][: t[1]] + t[2] + t[0][t[1] :])
CONTENT = st.binary(max_size=60) | LINES | ROWS.map(lambda rows: json.dumps(rows).encode()) | CUT


@QUICK
@given(CONTENT, st.sampled_from(ENDINGS), st.booleans())
def test_junk_is_text_or_one_line(content: bytes, ending: str, packed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"junk{ending}"
        file.write_bytes(gzip.compress(content) if packed else content)
        try:
            found: Any = local_documents(str(file), "text")
        except AceError as fault:
            assert "\n" not in str(fault)
        else:
            assert found
            assert all(isinstance(text, str) for text in found)
            "".join(found).encode()
