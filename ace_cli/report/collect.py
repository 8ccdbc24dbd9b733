"""Many runs side by side: their reports -> the table of sweeps and of ace-report. Unlike protocols never share one."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ace_cli.core.errors import AceError
from ace_cli.report import facts
from ace_cli.report.facts import Score
from ace_cli.report.markdown import protocol_words, table
from ace_cli.report.zero_shot import percent, task_protocol

#: Columns of numbers: name -> how it is shown; mean accuracies in per cent, with their standard error.
NUMBERS = {
    "perplexity": ".3f", "dense": ".3f", "ratio": ".3f", "KL": ".4f", "same top-1": ".3f", "tasks": "%",
    "dense tasks": "%", "zeros": ".4f", "fewer": ".4f", "prune s": ".1f", "total s": ".1f", "peak GB": ".2f",
}  # fmt: skip

#: Numbers of which the least, or the most, is the best.
_BEST = {
    **dict.fromkeys(("perplexity", "ratio", "KL", "prune s", "total s", "peak GB"), min),
    **dict.fromkeys(("same top-1", "tasks"), max),
}  # fmt: skip
#: Columns of zero-shot tasks -> the model whose mean accuracy they show.
_TASKS = {"tasks": "pruned", "dense tasks": "dense"}
#: Choices with options of their own: "metric", "metric.alpha".
_GROUPS = ("unit", "metric", "repair", "quantize", "allocation", "recover")
#: Choices about the calibration windows -> their names in report.json. A run without calibration has none of them.
_WINDOWS = {"calib": "source", "calib.n_samples": "n_samples", "calib.seq_len": "seq_len", "calib.seed": "seed"}
#: Choices by the names of their overrides, in the order of the columns; what else was typed comes last.
_ORDER = (
    "job", "experiment", "model", "unit", "metric", "repair", "quantize", "allocation", "recover", "sparsity", "scope",
    "propagate", "permute", "catch_up", "dtype", "calib",
)  # fmt: skip
#: Overrides that say how a run is measured, shown or kept, not what is done to the model.
_ASIDE = ("eval", "output_dir", "keep_checkpoint", "html", "observe", "samples", "gate", "tracker")
#: What stages call the bytes that they wrote.
_FORMS = ("packed_bytes", "quantised_bytes", "factored_bytes", "bytes")
#: Choices whose value says enough beside a picture's line.
_BARE = ("experiment", "recipe", "model", *_GROUPS, "sparsity", "calib")


@dataclass
class Row:
    """One run: its choices by name, its numbers by column (None where not measured), ``errors`` of some of them."""

    choices: dict[str, str]
    numbers: dict[str, float | None]
    errors: dict[str, float | None]
    protocol: str
    machine: str
    length: int | None
    report: str
    samples: list[dict[str, Any]]
    #: The fingerprint of the dense model; the share that is gone; bytes of the smallest form that was written.
    model: str = ""
    gone: float = 0.0
    bytes: int = 0
    #: Parameters that are neither gone nor zero.
    left: int = 0


@dataclass(frozen=True)
class Point:
    """A run in a picture. ``best``: no run of its ``pattern`` beats it in both."""

    name: str
    x: float
    y: float
    pattern: str
    best: bool


@dataclass
class Group:
    """Runs under one protocol. ``varied``: the choices in which the runs, also those of other protocols, differ."""

    protocol: str
    varied: list[str]
    rows: list[Row]

    @property
    def columns(self) -> list[str]:
        """The numbers that at least one run has."""
        return [name for name in NUMBERS if any(row.numbers[name] is not None for row in self.rows)]

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Head and lines of the table, as text."""
        words = [_without_places([row.choices.get(name, "") for row in self.rows]) for name in self.varied]
        lines = [
            [*of_row, *(_shown(name, row) for name in self.columns)]
            for *of_row, row in zip(*words, self.rows, strict=True)
        ]
        return [*self.varied, *self.columns], lines

    def best(self) -> set[tuple[int, str]]:
        """(row, column) of the best numbers; none in a column where all rows have the same."""
        found = set()
        for name in self.columns:
            values = {at: value for at, row in enumerate(self.rows) if (value := row.numbers[name]) is not None}
            if name in _BEST and len(set(values.values())) > 1:
                best = _BEST[name](values.values())
                found |= {(at, name) for at, value in values.items() if value == best}
        return found

    def lengths(self) -> dict[str, list[tuple[int, float]]]:
        """Method -> (calibration length, perplexity), a mean over seeds; empty if all have one length."""
        points: dict[str, dict[int, list[float]]] = {}
        names = [name for name in varied(self.rows) if name not in ("job", "calib.seq_len", "calib.seed")]
        for row in self.rows:
            if row.length is not None and (value := row.numbers["perplexity"]) is not None:
                method = _name(row, names) or row.choices["metric"]
                points.setdefault(method, {}).setdefault(row.length, []).append(value)
        lines = {name: sorted((x, statistics.fmean(values)) for x, values in of.items()) for name, of in points.items()}
        return lines if len({x for line in lines.values() for x, _ in line}) > 1 else {}

    def times(self) -> dict[str, list[Point]]:
        """Machine -> seconds to prune and write against perplexity."""
        machines: dict[str, list[Row]] = {}
        for row in self.rows:
            machines.setdefault(row.machine, []).append(row)
        fronts = {machine: self._points(rows, lambda row: row.numbers["prune s"]) for machine, rows in machines.items()}
        return {machine: points for machine, points in fronts.items() if len(points) > 1}

    def sizes(self) -> tuple[str, list[Point]]:
        """What is counted, and it against perplexity: gigabytes of the smallest form that was written; where all runs
        wrote as many, millions of parameters that are neither gone nor zero. Empty where these are all alike, too.
        """
        measures: dict[str, Callable[[Row], float]] = {
            "GB on disk, in the smallest form that was written": lambda row: row.bytes / 1e9,
            "million parameters that are not zero": lambda row: row.left / 1e6,
        }
        for what, measure in measures.items():
            points = self._points(self.rows, measure)
            if points and max(each.x for each in points) > 1.02 * min(each.x for each in points):
                return what, points
        return "", []

    def _points(self, rows: Sequence[Row], of: Callable[[Row], float | None]) -> list[Point]:
        names = self._method_names()
        known = [
            (row, x, y) for row in rows if (x := of(row)) is not None and (y := row.numbers["perplexity"]) is not None
        ]
        return [
            Point(
                _name(row, names) or row.choices["metric"], x, y, row.choices["sparsity"],
                not any(_beats(other[1:], (x, y)) for other in known
                        if other[0].choices["sparsity"] == row.choices["sparsity"]),
            )
            for row, x, y in known
        ]  # fmt: skip

    def methods(self, number: str) -> dict[str, dict[str, float]]:
        """Pattern -> method -> a number of its runs, a mean over seeds.

        Shares come first, from less to more that is gone, then N:M.
        """
        names = self._method_names()
        found: dict[str, dict[str, list[float]]] = {}
        for row in sorted(self.rows, key=_order):
            if (value := row.numbers[number]) is not None:
                of_pattern = found.setdefault(row.choices["sparsity"], {})
                of_pattern.setdefault(_name(row, names) or row.choices["metric"], []).append(value)
        return {of: {name: statistics.fmean(v) for name, v in methods.items()} for of, methods in found.items()}

    def _method_names(self) -> list[str]:
        """The choices that tell methods apart: not the pattern, not a seed; one alone where it decides all others."""
        names = [name for name in varied(self.rows) if name not in ("job", "sparsity", "calib.seed")]
        chosen = [[row.choices.get(name, "") for name in names] for row in self.rows]
        for name, own in zip(names, zip(*chosen, strict=True), strict=True):
            if len(set(own)) == len(set(map(tuple, chosen))):
                return [name]
        return names


def find(folders: Iterable[Path], below: bool = True) -> list[Row]:
    """Every report.json in, and ``below``, the folders, in the order of their paths. AceError where there is none."""
    found: dict[Path, Row] = {}
    for folder in folders:
        where = folder.rglob if below else folder.glob
        files = sorted(where("report.json"), key=lambda file: [_natural(part) for part in file.parts])
        if not files:
            raise AceError(f"{folder}: no report.json in it or below.", "Name folders of runs or sweeps.")
        for file in files:
            found[file.resolve()] = _read(file)
    return list(found.values())


def groups(rows: Sequence[Row], always: Sequence[str] = ()) -> list[Group]:
    """The runs by protocol, in order of appearance; a run that measured nothing has a protocol of its own.

    ``always``: choices that every table shows, if any run has them.
    """
    together: dict[str, list[Row]] = {}
    for row in rows:
        together.setdefault(row.protocol, []).append(row)
    columns = varied(rows, always)
    return [
        Group(protocol, [name for name in columns if not _place_of_all(name, of_protocol)], of_protocol)
        for protocol, of_protocol in together.items()
    ]


def varied(rows: Sequence[Row], always: Sequence[str] = ()) -> list[str]:
    """The choices in which the runs differ, and those of ``always``, in the order of the columns."""
    return [name for name in _names(rows) if name in always or _differs(name, rows)]


def _names(rows: Iterable[Row]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row.choices)
    places = {name: place for place, name in enumerate(_ORDER)}
    return sorted(names, key=lambda name: places.get(name.partition(".")[0], len(places)))


def _differs(name: str, rows: Iterable[Row]) -> bool:
    """Whether a choice tells runs apart. An option of a metric does so only between runs of this metric."""
    group = name.partition(".")[0]
    option = group in _GROUPS and group != name
    found: dict[str, set[str | None]] = {}
    for row in rows:
        found.setdefault(row.choices[group] if option else "", set()).add(row.choices.get(name))
    nothing = {None} if option or name == "scope" or name in _WINDOWS else set()  # it does not apply to all runs
    return any(len(values - nothing) > 1 for values in found.values())


def _place_of_all(name: str, rows: Sequence[Row]) -> bool:
    """Whether a choice is a path that all rows of a table share: it tells nothing in it."""
    return name.endswith(".path") and len({row.choices.get(name) for row in rows}) == 1


def _without_places(values: Sequence[str]) -> list[str]:
    """Of each path its last part; of all as many parts as tell them apart."""
    parts = [value.split("/") for value in values]
    for count in range(1, max(map(len, parts), default=1)):
        short = ["/".join(each[-count:]) for each in parts]
        if len(set(short)) == len(set(values)):
            return short
    return list(values)


def as_markdown(found: Iterable[Group]) -> str:
    """One table for each protocol; the best numbers are bold."""
    return "\n\n".join(f"## {group.protocol}\n\n{table(*_bold(group))}" for group in found)


def _bold(group: Group) -> tuple[list[str], list[list[str]]]:
    head, lines = group.cells()
    best = {(at, head.index(name)) for at, name in group.best()}
    return head, [
        [f"**{cell}**" if (at, place) in best else cell for place, cell in enumerate(line)]
        for at, line in enumerate(lines)
    ]


def as_csv(found: list[Group]) -> str:
    """All runs, all choices, all numbers; the protocol is a column."""
    stream = io.StringIO()
    names = _names(row for group in found for row in group.rows)
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["protocol", *names, *NUMBERS, "machine", "report"])
    for group in found:
        for row in group.rows:
            numbers = ["" if row.numbers[name] is None else row.numbers[name] for name in NUMBERS]
            choices = [row.choices.get(name, "") for name in names]
            writer.writerow([row.protocol, *choices, *numbers, row.machine, row.report])
    return stream.getvalue()


def as_json(found: list[Group]) -> str:
    """The same, by protocol."""
    content = [
        {"protocol": group.protocol, "varied": group.varied,
         "runs": [{"choices": row.choices, "numbers": row.numbers, "machine": row.machine, "report": row.report}
                  for row in group.rows]}
        for group in found
    ]  # fmt: skip
    return json.dumps({"schema_version": 2, "groups": content}, indent=1, allow_nan=False) + "\n"


def row(file: Path, report: Mapping[str, Any], typed: Mapping[str, str]) -> Row:
    """The run of a report.json that lies in ``file``; ``typed`` are the overrides of its command."""
    calibration = report["calibration"] or {}
    return Row(
        _choices(report, calibration, typed), _numbers(report), _errors(report), _protocol(report), _machine(report),
        calibration.get("seq_len"), str(file), report["samples"], report["model"]["fingerprint"],
        report["sparsity"]["achieved"], _bytes(report), _left(report),
    )  # fmt: skip


def _bytes(report: Mapping[str, Any]) -> int:
    """Of the smallest of what was written: the checkpoint, or what was made of it."""
    stages = [found[name] for found in report["stages"].values() for name in _FORMS if name in found]
    return int(min([report["bytes_on_disk"]["pruned"], *stages]))


def _left(report: Mapping[str, Any]) -> int:
    if size := report.get("size"):
        return int(size["parameters"]["pruned"])
    return int(report["model"]["parameters"] * (1 - report["sparsity"]["model"]))


def _read(file: Path) -> Row:
    try:
        report = dataclasses.asdict(facts.load(file))
        words = [word for word in shlex.split(report["command"]) if "=" in word and not word.startswith("-")]
        typed = dict(word.split("=", 1) for word in words)
        return row(file, report, {n: value for n, value in typed.items() if n.partition(".")[0] not in _ASIDE})
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise AceError(f"{file} is no report of this version of ace-prune.", "Leave it out.") from fault


def _choices(report: Mapping[str, Any], calibration: Mapping[str, Any], typed: Mapping[str, str]) -> dict[str, str]:
    """What was done, by the names of the overrides; and what else was typed."""
    method, path = report["method"], report["model"]["path"]
    choices = {"model": path if "model.path" in typed else typed.get("model", path)}
    for group in _GROUPS:
        choices[group] = method.get(group, "weight" if group == "unit" else "none")  # of before there was such a choice
        choices |= {f"{group}.{name}": str(value) for name, value in method.get(f"{group}_options", {}).items()}
    done = {"sparsity": "pattern", **{name: name for name in ("scope", "propagate", "permute", "dtype")}}
    choices |= {name: str(method[key]) for name, key in done.items() if method[key] is not None}
    choices["catch_up"] = str(method.get("catch_up", 0.0))
    choices |= {name: str(calibration[key]) for name, key in _WINDOWS.items() if key in calibration}
    told = {"model", "model.path", "catch_up", *done, *_WINDOWS}
    others = {n: value for n, value in typed.items() if n not in told and n.partition(".")[0] not in _GROUPS}
    return {**choices, **others}


def _numbers(report: Mapping[str, Any]) -> dict[str, float | None]:
    perplexity, fidelity, seconds = report["perplexity"], report["fidelity"] or {}, report["seconds"]
    average = (report["zero_shot"] or {}).get("average", {})
    found = {
        "perplexity": perplexity["pruned"], "dense": perplexity["dense"], "ratio": perplexity["ratio"],
        "KL": fidelity.get("kl"), "same top-1": fidelity.get("agreement"),
        **{name: average.get(model, {}).get("value") for name, model in _TASKS.items()},
        ("fewer" if report.get("size") else "zeros"): report["sparsity"]["achieved"],
        "prune s": seconds["prune"] + seconds["write"], "total s": seconds["total"],
        "peak GB": report["peak_memory_bytes"]["host"] / 1e9,
    }  # fmt: skip
    return {name: found.get(name) for name in NUMBERS}


def _errors(report: Mapping[str, Any]) -> dict[str, float | None]:
    average = (report["zero_shot"] or {}).get("average", {})
    return {name: average.get(model, {}).get("stderr") for name, model in _TASKS.items()}


def _protocol(report: Mapping[str, Any]) -> str:
    """In words, with the fingerprints that tell two apart."""
    protocol, zero_shot = report["perplexity"]["protocol"], report["zero_shot"]
    parts = [protocol_words(protocol)] if protocol else []
    parts += [task_protocol(zero_shot)] if zero_shot else []
    return "; ".join(parts) or "Not evaluated"


def _machine(report: Mapping[str, Any]) -> str:
    hardware = report["hardware"]
    return f"{hardware.get('gpu') or hardware['cpu']}, {hardware['threads']} threads"


def _order(row: Row) -> tuple[bool, float, str]:
    pattern = row.choices["sparsity"]
    return ":" in pattern, round(row.gone, 3), pattern


def _name(row: Row, names: Iterable[str]) -> str:
    """What a picture calls a run."""
    shown = [(name, value) for name in names if (value := row.choices.get(name, "none")) not in ("none", "")]
    return " ".join(value if name in _BARE else f"{name.rpartition('.')[2]}={_short(value)}" for name, value in shown)


def _short(value: str) -> str:
    """Numbers to four digits, of paths the last part."""
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value.rpartition("/")[2]


def _beats(other: Iterable[float], point: tuple[float, float]) -> bool:
    seconds, value = other
    return seconds <= point[0] and value <= point[1] and (seconds, value) != point


def _shown(name: str, row: Row) -> str:
    value = row.numbers[name]
    if value is None:
        return ""
    return percent(Score(value, row.errors[name])) if NUMBERS[name] == "%" else format(value, NUMBERS[name])


def _natural(part: str) -> tuple[int, int, str]:
    """Job 10 after job 9."""
    return (0, int(part), "") if part.isdigit() else (1, 0, part)
