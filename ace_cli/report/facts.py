"""report.json: the facts of one run. Its names are an interface; a change of meaning raises ``SCHEMA_VERSION``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ace_cli.core.errors import AceError
from ace_cli.core.json_reader import read_object
from ace_cli.core.typed_json import typed

SCHEMA_VERSION = 2


@dataclass
class Protocol:
    """How perplexity was measured; two numbers compare only if these are equal. ``fingerprint`` is of the token ids."""

    dataset: str
    seq_len: int
    windows: int
    all_windows: bool
    tokens: int
    dtype: str
    fingerprint: str


@dataclass
class Perplexity:
    """Dense and pruned, on the same windows in the same run. ``ratio`` is the geometric mean of ``ratio_by_window``."""

    dense: float | None = None
    pruned: float | None = None
    ratio: float | None = None
    protocol: Protocol | None = None
    ratio_by_window: list[float] = field(default_factory=list)


@dataclass
class Fidelity:
    """Pruned against dense on the first evaluation windows, means over ``tokens`` next-token distributions.

    ``kl``: KL divergence dense || pruned in nats; ``agreement``: share of tokens where both find the same next token
    most likely; ``cosine``: of the hidden states after the last block. ``kl_by_window`` are the means of each window.
    """

    kl: float
    agreement: float
    cosine: float
    windows: int
    tokens: int
    kl_by_window: list[float]


@dataclass
class Sample:
    """One prompt as the dense and the pruned model write it on, greedily or ``sampled`` from the same seed.

    ``loops``: model ("dense", "pruned") -> the share of runs of four tokens that stood in its text before.
    """

    prompt: str
    sampled: bool
    dense: str
    pruned: str
    loops: dict[str, float] = field(default_factory=dict)


@dataclass
class GateFacts:
    """Whether the pruned model's perplexity ratio was allowed."""

    max_ppl_ratio: float
    passed: bool


@dataclass
class PhaseSpan:
    """Seconds since the start of the run."""

    phase: str
    start: float
    end: float


@dataclass
class Timeline:
    """Resident memory of the process over the run: seconds since its start, bytes; and when each phase ran."""

    seconds: list[float]
    bytes: list[int]
    phases: list[PhaseSpan]


@dataclass
class Sparsity:
    """Fractions of zeros: asked for, found in the pruned weights, found in the whole model.

    ``dense``: found in the same weights before they were pruned.
    Of a model that got smaller: the share of units asked for, and twice the share of its parameters that is gone.
    """

    requested: str
    achieved: float
    model: float
    dense: float = 0.0


@dataclass
class Size:
    """Of a model that got smaller. ``parameters``: "dense", "pruned"; ``stay``: weight that reads units -> how many.

    ``as_products``: its weights are written multiplied out, in the old shapes; the parameters are those of the factors.
    """

    unit: str
    parameters: dict[str, int]
    stay: dict[str, int]
    as_products: bool = False


@dataclass
class TargetFacts:
    """A size that was asked for, in bytes of weight files or in parameters; ``way``: the choice that was found for it.

    ``measured``: of the folder ``form`` as it was written.
    """

    asked: str
    of: str
    size: int
    way: str
    planned: int
    measured: int
    form: str


@dataclass
class CalibrationFacts:
    """The windows the statistics saw."""

    source: str
    n_samples: int
    seq_len: int
    seed: int
    tokens: int
    fingerprint: str


@dataclass
class Score:
    """A metric's mean over a task's items and its standard error, as lm-eval gives them (fractions, not per cent)."""

    value: float
    stderr: float | None


@dataclass
class TaskFacts:
    """A zero-shot task. ``scores``: metric -> model ("dense", "pruned") -> score.

    Scores compare only if ``fingerprint``, of every prompt and answer, is equal.
    """

    name: str
    data: str
    items: int
    all_items: bool
    shots: int
    version: str
    fingerprint: str
    scores: dict[str, dict[str, Score]]


@dataclass
class ZeroShot:
    """lm-eval's tasks, in the same run on the same items. ``average``: model -> mean accuracy over the tasks."""

    tasks: list[TaskFacts]
    average: dict[str, Score]
    limit: int | None
    dtype: str
    lm_eval: str
    seconds: dict[str, float]


@dataclass
class Spread:
    """Median and quartiles over rounds."""

    median: float
    low: float
    high: float


@dataclass
class SpeedFacts:
    """One model with one engine. Prefill and decode in tokens a second; ratios are taken within each round."""

    model: str
    engine: str
    prefill: Spread
    decode: Spread
    first_token: Spread
    prefill_ratio: Spread
    decode_ratio: Spread
    resident_bytes: int
    file_bytes: int


@dataclass
class Speed:
    """What writing takes, all ``entries`` in turn in one process; ratios are against the first."""

    prompt_tokens: int
    new_tokens: int
    rounds: int
    device: str
    threads: int
    entries: list[SpeedFacts]


@dataclass
class TextScores:
    """Perplexity by model under one protocol."""

    protocol: Protocol
    models: dict[str, float]


@dataclass
class Comparison:
    """What ace-eval measured: models side by side. A model stands only under the protocols it was measured by."""

    models: list[str]
    perplexity: list[TextScores]
    zero_shot: ZeroShot | None
    schema_version: int = SCHEMA_VERSION


@dataclass
class Report:
    """Everything that is known of a run. Seconds, bytes, and counts of weights unless a name says otherwise."""

    command: str
    created: str
    versions: dict[str, str]
    hardware: dict[str, Any]
    config: dict[str, Any]
    model: dict[str, Any]
    method: dict[str, Any]
    calibration: CalibrationFacts | None
    sparsity: Sparsity
    perplexity: Perplexity
    fidelity: Fidelity | None
    seconds: dict[str, float]
    phases: dict[str, float]
    tokens_per_second: dict[str, float]
    efficiency: dict[str, Any]
    peak_memory_bytes: dict[str, int]
    timeline: Timeline
    bytes_on_disk: dict[str, int]
    checkpoint: str
    slots: list[dict[str, Any]]
    blocks: list[dict[str, Any]]
    samples: list[Sample] = field(default_factory=list)
    gate: GateFacts | None = None
    warnings: list[str] = field(default_factory=list)
    zero_shot: ZeroShot | None = None
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    speed: Speed | None = None
    #: Of a training of the whole model: its error on held-out windows "before" and "after"; "epochs" that were kept.
    recovery: dict[str, Any] | None = None
    size: Size | None = None
    target: TargetFacts | None = None
    #: Whether transformers runs code of the checkpoint to load it.
    own_code: bool = False
    schema_version: int = SCHEMA_VERSION


def save(report: Report, file: Path) -> None:
    """Write report.json."""
    text = json.dumps(vars(report), indent=1, allow_nan=False, default=dataclasses.asdict)  # slots are no copies
    write_whole(file, text + "\n")


def load(file: Path) -> Report:
    """The report in ``file``. Raises AceError if it is none, or one of another version."""
    found = read_object(file, "Leave it out.")
    try:
        report = typed(Report, found, "it")
        if report.schema_version != SCHEMA_VERSION:
            raise ValueError(f"it has schema version {report.schema_version}")
    except ValueError as fault:
        raise AceError(f"{file} is no report of this version of ace-prune: {fault}.", "Leave it out.") from None
    return report


def write_whole(file: Path, text: str) -> None:
    """Write a text file so that it is whole or absent."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
