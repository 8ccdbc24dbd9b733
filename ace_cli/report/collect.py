"""Many runs side by side: their report.json files -> tables and pictures. Unlike protocols never share a table."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ace_cli.errors import AceError
from ace_cli.report.markdown import protocol_words

#: Columns of numbers: name -> how it is shown.
NUMBERS = {
    "perplexity": ".3f", "dense": ".3f", "ratio": ".3f", "KL": ".4f", "same top-1": ".3f", "tasks": ".3f",
    "zeros": ".4f", "prune s": ".1f", "total s": ".1f", "peak GB": ".2f",
}  # fmt: skip


#: Columns about the calibration windows -> their names in report.json.
_WINDOWS = {"calib": "source", "windows": "n_samples", "length": "seq_len", "seed": "seed"}


@dataclass
class Row:
    """One run: its choices by name, its numbers by column (None where not measured)."""

    choices: dict[str, str]
    numbers: dict[str, float | None]
    protocol: str
    machine: str
    length: int | None
    report: str
    samples: list[dict[str, Any]]


@dataclass
class Group:
    """Runs under one protocol. ``varied``: the choices in which they differ."""

    protocol: str
    varied: list[str]
    rows: list[Row]

    @property
    def columns(self) -> list[str]:
        """The numbers that at least one run has."""
        return [name for name in NUMBERS if any(row.numbers[name] is not None for row in self.rows)]

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Head and lines of the table, as text."""
        lines = [
            [*(row.choices[name] for name in self.varied), *(_shown(name, row.numbers[name]) for name in self.columns)]
            for row in self.rows
        ]
        return [*self.varied, *self.columns], lines

    def lengths(self) -> dict[str, list[tuple[int, float]]]:
        """Method -> (calibration length, perplexity), a mean over seeds; empty if all have one length."""
        points: dict[str, dict[int, list[float]]] = {}
        for row in self.rows:
            if row.length is not None and (value := row.numbers["perplexity"]) is not None:
                points.setdefault(_method(self, row), {}).setdefault(row.length, []).append(value)
        lines = {name: sorted((x, statistics.fmean(values)) for x, values in of.items()) for name, of in points.items()}
        return lines if len({x for line in lines.values() for x, _ in line}) > 1 else {}

    def times(self) -> dict[str, list[tuple[str, float, float, bool]]]:
        """Machine -> (method, seconds to prune and write, perplexity, whether no run is better and as fast)."""
        machines: dict[str, list[tuple[str, float, float]]] = {}
        for row in self.rows:
            seconds, value = row.numbers["prune s"], row.numbers["perplexity"]
            if seconds is not None and value is not None:
                machines.setdefault(row.machine, []).append((_name(row, self.varied), seconds, value))
        return {
            machine: [(name, x, y, not any(_beats(other, (x, y)) for _, *other in points)) for name, x, y in points]
            for machine, points in machines.items()
            if len(points) > 1
        }


def find(folders: Iterable[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Every report.json in and below the folders, in the order of their paths. AceError where there is none."""
    found: dict[Path, dict[str, Any]] = {}
    for folder in folders:
        files = sorted(folder.rglob("report.json"), key=lambda file: [_natural(part) for part in file.parts])
        if not files:
            raise AceError(f"{folder}: no report.json in it or below.", "Name folders of runs or sweeps.")
        for file in files:
            found[file.resolve()] = _read(file)
    return list(found.items())


def groups(reports: list[tuple[Path, dict[str, Any]]]) -> list[Group]:
    """The runs by protocol, in order of appearance; a run that measured nothing has a protocol of its own."""
    together: dict[str, list[Row]] = {}
    for file, report in reports:
        row = _row(file, report)
        together.setdefault(row.protocol, []).append(row)
    return [Group(protocol, _varied(rows), rows) for protocol, rows in together.items()]


def _varied(rows: list[Row]) -> list[str]:
    """The choices in which the runs differ. That a run without calibration has no windows is no difference."""
    values = {name: {row.choices[name] for row in rows} for name in rows[0].choices}
    varied = [name for name, found in values.items() if len(found - ({"none"} if name in _WINDOWS else set())) > 1]
    # options of two metrics differ because the metrics do: they say something only between runs of one metric
    for group in ("metric", "repair", "allocation"):
        pairs = {(row.choices[group], row.choices[f"{group} options"]) for row in rows}
        if f"{group} options" in varied and len(pairs) == len(values[group]):
            varied.remove(f"{group} options")
    return varied


def as_csv(found: list[Group]) -> str:
    """All runs, all choices, all numbers; the protocol is a column."""
    stream = io.StringIO()
    names = list(found[0].rows[0].choices)
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["protocol", *names, *NUMBERS, "machine", "report"])
    for group in found:
        for row in group.rows:
            numbers = ["" if row.numbers[name] is None else row.numbers[name] for name in NUMBERS]
            writer.writerow([row.protocol, *row.choices.values(), *numbers, row.machine, row.report])
    return stream.getvalue()


def as_json(found: list[Group]) -> str:
    """The same, by protocol."""
    content = [
        {"protocol": group.protocol, "varied": group.varied,
         "runs": [{"choices": row.choices, "numbers": row.numbers, "machine": row.machine, "report": row.report}
                  for row in group.rows]}
        for group in found
    ]  # fmt: skip
    return json.dumps({"schema_version": 1, "groups": content}, indent=1, allow_nan=False) + "\n"


def _read(file: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        _row(file, report)
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise AceError(f"{file} is no report of this version of ace-prune.", "Leave it out.") from fault
    return report


def _row(file: Path, report: dict[str, Any]) -> Row:
    method, calibration = report["method"], report["calibration"] or {}
    choices = {"model": report["model"]["path"]}
    for group in ("metric", "repair", "allocation"):
        options = ", ".join(f"{name}={value}" for name, value in method[f"{group}_options"].items())
        choices |= {group: method[group], f"{group} options": options}
    choices |= {name: str(method[name]) for name in ("pattern", "scope", "propagate", "permute", "dtype")}
    choices |= {shown: str(calibration.get(name, "none")) for shown, name in _WINDOWS.items()}
    return Row(
        choices, _numbers(report), _protocol(report), _machine(report), calibration.get("seq_len"), str(file),
        report["samples"],
    )  # fmt: skip


def _numbers(report: dict[str, Any]) -> dict[str, float | None]:
    perplexity, fidelity, seconds = report["perplexity"], report["fidelity"] or {}, report["seconds"]
    average = (report["zero_shot"] or {}).get("average", {})
    return {
        "perplexity": perplexity["pruned"], "dense": perplexity["dense"], "ratio": perplexity["ratio"],
        "KL": fidelity.get("kl"), "same top-1": fidelity.get("agreement"),
        "tasks": average.get("pruned", {}).get("value"), "zeros": report["sparsity"]["achieved"],
        "prune s": seconds["prune"] + seconds["write"], "total s": seconds["total"],
        "peak GB": report["peak_memory_bytes"]["host"] / 1e9,
    }  # fmt: skip


def _protocol(report: dict[str, Any]) -> str:
    """In words, with the fingerprints that tell two apart."""
    parts = []
    if protocol := report["perplexity"]["protocol"]:
        parts.append(protocol_words(protocol))
    if zero_shot := report["zero_shot"]:
        tasks = ", ".join(f"{task['name']} {task['fingerprint'][:6]}" for task in zero_shot["tasks"])
        parts.append(f"tasks {tasks}, {zero_shot['dtype']}")
    return "; ".join(parts) or "Not evaluated"


def _machine(report: dict[str, Any]) -> str:
    hardware = report["hardware"]
    return f"{hardware.get('gpu') or hardware['cpu']}, {hardware['threads']} threads"


def _method(group: Group, row: Row) -> str:
    """What tells a line of the length plot from the others."""
    return _name(row, [name for name in group.varied if name not in ("length", "seed")]) or row.choices["metric"]


def _name(row: Row, varied: list[str]) -> str:
    shown = [(name, row.choices[name]) for name in varied if name not in _WINDOWS or row.choices[name] != "none"]
    return " ".join(f"{name}={value}" if name in _WINDOWS else value for name, value in shown)


def _beats(other: Iterable[float], point: tuple[float, float]) -> bool:
    seconds, value = other
    return seconds <= point[0] and value <= point[1] and (seconds, value) != point


def _shown(name: str, value: float | None) -> str:
    return "" if value is None else format(value, NUMBERS[name])


def _natural(part: str) -> tuple[int, int, str]:
    """Job 10 after job 9."""
    return (0, int(part), "") if part.isdigit() else (1, 0, part)
