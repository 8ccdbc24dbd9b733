"""What came of a run, in a word; and what to try next where it is bad. The same on the screen and on the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """``word`` is the verdict, ``level`` its colour: good, fair or bad; "" where nothing was measured."""

    word: str
    level: str

    @property
    def short(self) -> str:
        """Where the dense model is named already."""
        return self.word.removesuffix(" than the dense model").replace("as the dense model", "as dense")


#: Perplexity ratio up to which a verdict fits; beyond the last but one the model is broken.
VERDICTS = (
    (1.02, Verdict("as good as the dense model", "good")),
    (1.15, Verdict("slightly worse than the dense model", "good")),
    (1.5, Verdict("clearly worse than the dense model", "fair")),
    (3.0, Verdict("much worse than the dense model", "bad")),
    (math.inf, Verdict("badly damaged", "bad")),
)
#: Units after whose cutting ``recover=blocks`` trains what is left.
_TRAINED = ("channel", "head", "block")
_UNKNOWN = Verdict("not measured", "")


def verdict_of(ratio: float | None) -> Verdict:
    """Of a perplexity that is ``ratio`` times the dense model's."""
    if ratio is None:
        return _UNKNOWN
    return next(verdict for most, verdict in VERDICTS if ratio <= most)


def sentence(report: Mapping[str, Any]) -> str:
    """The verdict with its numbers; ``report`` is report.json, parsed."""
    numbers, found = report["perplexity"], verdict_of(report["perplexity"]["ratio"])
    if numbers["ratio"] is None:
        return "Not measured (eval=none): how good the model still is, nobody knows."
    change = f"perplexity {numbers['dense']:.2f} -> {numbers['pruned']:.2f}, {numbers['ratio']:.2f} times"
    return f"{found.word.capitalize()}: {change}."


def advice(report: Mapping[str, Any]) -> str:
    """What is likely to give a better model with the same pattern; empty where the model is good enough."""
    if verdict_of(report["perplexity"]["ratio"]).level not in ("fair", "bad"):
        return ""
    method, calibration = report["method"], report["calibration"] or {}
    unit, rounded = method.get("unit", "weight"), method.get("quantize") not in (None, "none")
    if unit != "weight":
        if method["recover"] == "none" and unit in _TRAINED:
            return "recover=blocks calib.seq_len=128 trains what was kept, block by block"
        return "fewer units: a lower sparsity, or a higher keep"
    if method["repair"] == "none":
        return "experiment=best refits the weights that stay, from the same text"
    if method["recover"] == "none" and not rounded:
        return "recover=blocks calib.seq_len=128 trains the weights that stay, block by block"
    if calibration.get("tokens", 0) < 16_384:
        return "experiment=best_long reads more text"
    if method["recover"] == "blocks":
        return "recover=both calib.n_samples=256 trains the whole model, if it fits in memory four times"
    return "a lower sparsity"
