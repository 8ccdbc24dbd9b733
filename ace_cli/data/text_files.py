"""Documents of a local file: JSON lines, JSON, Parquet or plain text; of a table, only the column that is asked for.

Read line by line with Python's own JSON, not with the readers of ``datasets``: those give every column one type and
refuse a file where a column that nobody asked for changes its, read dates into texts that look like one, and end the
process without a word where a line is nested deep.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ace_cli.core import memory
from ace_cli.core.errors import AceError, first_line

ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".txt")
#: No text shrinks to so small a part of its size; a file that was made to fill a memory shrinks to a thousandth.
_MOST_TIMES = 250
_PIECE = 1 << 20
#: What a file expands to before anybody asks how many times its size that is.
_HARMLESS = 64 * _PIECE
_LONGEST_LINE = 1 << 30
_KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}


def local_file_fault(path: str | None, name: str) -> str | None:
    """Why ``path`` cannot be read as documents, before anything is loaded; ``name`` is the override it came from."""
    if not path:
        return f"{name} is missing: give a {', '.join(ENDINGS)} file"
    if not Path(path).expanduser().is_file():
        return f"{name}={path}: no such file"
    if not path.endswith(ENDINGS):
        return f"{name}={path}: must end in {', '.join(ENDINGS)}"
    return None


def local_documents(path: str, field: str) -> list[str]:
    """The documents of a local file: column ``field`` of a table, without nulls; or the whole of a .txt file.

    Raises AceError for what is no such file, for a column that is missing or holds anything but text, for more than
    memory holds.
    """
    file = Path(path).expanduser()
    try:
        if file.name.endswith(".txt"):
            return [_plain(file)]
        rows = _parquet(file, field) if file.name.endswith(".parquet") else _json(file)
        return _column(file, rows, field)
    except (OSError, EOFError, ValueError, RecursionError) as fault:
        raise _unreadable(file, first_line(fault)) from fault
    except Exception as fault:
        import zlib

        if isinstance(fault, zlib.error):
            raise _unreadable(file, str(fault)) from fault
        raise


def _unreadable(file: Path, reason: str) -> AceError:
    return AceError(f"Cannot read {file}: {reason}", "Is it a whole file of the kind its name says?")


def _plain(file: Path) -> str:
    text = _decoded(b"".join(_pieces(file)), str(file))
    if not text.strip():
        raise AceError(f"{file} holds no text", "Give another file.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _column(file: Path, rows: Iterable[tuple[str, Any]], field: str) -> list[str]:
    """The texts under ``field`` of rows, each with its place in words."""
    texts: list[str] = []
    names: dict[str, None] = {}
    size, most = 0, memory.free() // 4
    for place, row in rows:
        if not isinstance(row, dict):
            raise AceError(f"{file}, {place} is {_kind(row)}, not an object like {{{json.dumps(field)}: ...}}")
        value = row.get(field)
        if isinstance(value, str):
            texts.append(re.sub("[\ud800-\udfff]", "\ufffd", value))  # half a letter is none
            size += len(value)
        elif value is not None:
            raise AceError(f"{file}, {place}: '{field}' holds {_kind(value)}, not text", "Name the column with text.")
        elif len(names) < 20:
            names |= dict.fromkeys(row)
        if size > most:
            raise AceError(f"{file} holds more text than memory: {size / 1e9:.1f} GB so far", "Give a part of it.")
    if not texts:
        found = ", ".join(names) or "nothing"
        raise AceError(f"{file} has no column '{field}' with text; found: {found}", "Name it with field=...")
    return texts


def _kind(value: object) -> str:
    return "null" if value is None else _KINDS.get(type(value), f"{type(value).__name__}")


def _json(file: Path) -> Iterator[tuple[str, Any]]:
    """The rows of JSON lines, of a list of objects, of one object that takes many lines."""
    lines = ((number, line) for number, line in _lines(file) if line.strip())
    for index, (number, line) in enumerate(lines):
        place = f"line {number}"
        try:
            row = _parsed(line, file, place)
        except ValueError as fault:
            if index:
                raise _unreadable(file, f"{place}: {fault}") from None
            row = _whole(file, [line, *(more for _, more in lines)], fault)
        if isinstance(row, list) and not index:
            yield from ((f"row {count}", each) for count, each in enumerate(row, 1))
        else:
            yield place, row


def _parsed(text: str, file: Path, place: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise AceError(f"{file}, {place} is nested too deep", "Leave it out.") from None


def _whole(file: Path, lines: list[str], fault: ValueError) -> Any:
    """One value in many lines, where the first one alone is none because of ``fault``."""
    try:
        return _parsed("".join(lines), file, "line 1")
    except ValueError as other:
        found = other if lines[0].lstrip().startswith("[") else fault
        raise _unreadable(file, f"line 1: {found}") from None


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers from 1, each with its line break."""
    parts: list[bytes] = []
    number, size = 1, 0
    for piece in _pieces(file):
        for part in re.findall(rb"[^\n]*\n|[^\n]+", piece):
            parts.append(part)
            size += len(part)
            if part.endswith(b"\n"):
                yield number, _decoded(b"".join(parts), f"{file}, line {number}")
                parts, number, size = [], number + 1, 0
            elif size > _LONGEST_LINE:
                raise AceError(f"{file}, line {number} is longer than {_LONGEST_LINE >> 20} MB", "Is it JSON lines?")
    if parts:
        yield number, _decoded(b"".join(parts), f"{file}, line {number}")


def _decoded(content: bytes, place: str) -> str:
    """UTF-8 as text, without the mark that some editors put first."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise AceError(f"{place} is UTF-16, not UTF-8", "Convert it: iconv -f utf-16 -t utf-8.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        found = f"byte 0x{content[fault.start]:02x} at position {fault.start:,}"
        raise AceError(f"{place} is not UTF-8: {found}", "Convert it, as with iconv -f latin1 -t utf-8.") from None


def _pieces(file: Path) -> Iterator[bytes]:
    """The bytes of a file, unpacked where it is packed."""
    with open(file, "rb") as packed:
        stream = gzip.GzipFile(fileobj=packed) if file.name.endswith(".gz") else packed
        done = 0
        while piece := stream.read(_PIECE):
            done += len(piece)
            if stream is not packed and done > max(_HARMLESS, _MOST_TIMES * packed.tell()):
                raise AceError(f"{file} expands to more than {_MOST_TIMES} times its size: no text does", "Give text.")
            yield piece


def _parquet(file: Path, field: str) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException, types
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as table:
            names = table.schema_arrow.names
            if field not in names:
                yield "row 1", dict.fromkeys(names)
                return
            kind = table.schema_arrow.field(field).type
            text = kind.value_type if types.is_dictionary(kind) else kind
            if not (types.is_string(text) or types.is_large_string(text) or types.is_string_view(text)):
                raise AceError(f"{file}: column '{field}' holds {kind}, not text", "Name the column with text.")
            row = 0
            for batch in table.iter_batches(columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield f"row {row}", {field: value}
    except ArrowException as fault:
        raise _unreadable(file, first_line(fault)) from fault
