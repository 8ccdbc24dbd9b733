"""report.html: one file, from report.json alone, that needs no network. Every number in it is in report.json."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from ace_cli.report import plots
from ace_cli.report.facts import Speed, SpeedFacts, Spread
from ace_cli.report.markdown import loops_line, size_words, target_words
from ace_cli.report.speed import SPEED_HEAD, speed_lines, speed_rows
from ace_cli.report.verdict import advice, verdict_of

#: Shares of zeros that differ by less look the same.
_TO_SEE = 0.005
#: What a page has before and after its picture of the runs beside it.
BEGIN, END = "<!-- runs beside this one -->", "<!-- as far as they were done -->"
#: What a number means, in plain words.
WORDS = {
    "perplexity": "How surprised the model is by text it has not seen: lower is better, 1 would be perfect.",
    "kl": "How far the pruned model's next-token probabilities are from the dense model's; 0 means the same.",
    "agreement": "How often both models find the same next token most likely.",
    "cosine": "How alike the two models' last hidden states are; 1 means the same direction.",
}


def render(report: dict[str, Any], near: str = "") -> str:
    """The page of one run; ``report`` is its report.json, parsed, ``near`` what is shown of the runs beside it."""
    template, found = environment().get_template("report.html.j2"), verdict_of(report["perplexity"]["ratio"])
    text: str = template.render(
        r=report,
        name=model_name(report["model"]["path"]),
        near=framed(near),
        errors=error_rows(report),
        method=method_words(report["method"]),
        verdict=verdict(report),
        word=found.word,
        level=found.level,
        size=size_words(report),
        target=target_words(report.get("target")),
        loops=loops_line(report),
        advice=advice(report),
        kept="keep_checkpoint: false" not in report["config"]["yaml"],
        plots=_plots(report),
        words=WORDS,
        kinds=_activation_rows(report),
        speed=_speed(report),
    )
    return text


def _speed(report: dict[str, Any]) -> dict[str, Any] | None:
    """The table of measured speed and what it says, if it was measured."""
    if not report.get("speed"):
        return None
    told: list[dict[str, Any]] = [
        {name: Spread(**value) if isinstance(value, dict) else value for name, value in entry.items()}
        for entry in report["speed"]["entries"]
    ]
    found = Speed(**{**report["speed"], "entries": [SpeedFacts(**entry) for entry in told]})
    return {"head": SPEED_HEAD, "rows": speed_rows(found), "lines": speed_lines(found)}


def verdict(report: dict[str, Any]) -> str:
    """What came of it, in one sentence."""
    share, asked = f"{report['sparsity']['achieved']:.1%}", report["sparsity"]["requested"]
    zeros = f"{share} of the pruned weights are zero ({asked})"
    if report.get("size"):
        zeros = f"{share} of the parameters are gone ({report['size']['unit']}s, {asked})"
    numbers = report["perplexity"]
    if numbers["ratio"] is None:
        return f"{zeros}; how good the model still is was not measured (eval=none)."
    change = f"perplexity went from {numbers['dense']:.2f} to {numbers['pruned']:.2f} ({numbers['ratio']:.2f} times)"
    return f"{zeros}; {change}."


def framed(near: str) -> str:
    """What is shown of the runs beside a run, with the marks by which it is found and replaced."""
    return f"{BEGIN}{near}{END}"


def model_name(path: str) -> str:
    """What a model is called: the last part of its path, without the ending of a file."""
    return Path(path).name.removesuffix(".gguf")


def method_words(method: dict[str, Any]) -> str:
    """What was done, in short: "wanda and sparsegpt"."""
    parts = [method["metric"], *(method.get(group, "none") for group in ("repair", "quantize", "recover"))]
    return " and ".join(part for part in parts if part != "none")


def error_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each kind of weight how far its outputs moved: the mean over its weights, the worst and where that is."""
    rows = []
    for kind, of_block in _by_kind_and_block(report).items():
        found = [(slot["error"], slot["name"]) for slots in of_block.values() for slot in slots if slot.get("error")]
        if found:
            worst, name = max(found)
            rows.append({"kind": kind, "mean": _mean([error for error, _ in found]), "worst": worst, "where": name})
    return rows


def kind_of(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> mlp.up_proj: what a weight is, whatever its block (and its expert)."""
    return re.split(r"\.\d+\.", name.removesuffix(".weight"))[-1]


def environment() -> Any:
    """Of the templates in this folder."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["gb"] = lambda count: f"{count / 1e9:.2f} GB"
    environment.filters["percent"] = lambda share: f"{share:.1%}".replace("%", " %")
    return environment


def _plots(report: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Section -> (title, svg)."""
    sections = {"quality": _quality(report), "cost": _cost(report), "inside": _inside(report)}
    return {
        section: [
            (title, plots.svg(f"{section}{number}", draw, height)) for number, (title, draw, height) in enumerate(of)
        ]
        for section, of in sections.items()
    }


Picture = tuple[str, plots.Draw, float]


def _quality(report: dict[str, Any]) -> list[Picture]:
    pictures: list[Picture] = []
    numbers, fidelity = report["perplexity"], report["fidelity"]
    if numbers["ratio"] is not None:
        values = [numbers["dense"], numbers["pruned"]]
        pictures.append(("Perplexity, lower is better", plots.bars(["dense", "pruned"], values, "perplexity"), 1.5))
    if numbers["ratio_by_window"]:
        draw = plots.over_windows(numbers["ratio_by_window"], numbers["ratio"], "pruned / dense")
        pictures.append(("Perplexity window by window, times the dense model's", draw, 2.4))
    if fidelity is not None:
        draw = plots.over_windows(fidelity["kl_by_window"], fidelity["kl"], "KL divergence, nats")
        pictures.append(("Distance from the dense model's predictions", draw, 2.4))
    return pictures


def _cost(report: dict[str, Any]) -> list[Picture]:
    seconds = {name: value for name, value in report["seconds"].items() if name != "total" and value >= 0.005}
    timeline = report["timeline"]
    draw = plots.memory(timeline["seconds"], timeline["bytes"], timeline["phases"])
    return [
        ("Time by phase", plots.bars(list(seconds), list(seconds.values()), "seconds"), 0.6 + 0.27 * len(seconds)),
        ("Memory over time", draw, 2.6),
    ]


def _inside(report: dict[str, Any]) -> list[Picture]:
    """Over depth: zeros, change of the outputs, activations."""
    pictures: list[Picture] = []
    table = _by_kind_and_block(report)
    blocks = len(report["blocks"])
    rows = [[_mean([slot["sparsity"] for slot in row.get(b, [])]) for b in range(blocks)] for row in table.values()]
    if rows and _uneven(rows):  # what is known of a model in another basis is known of the whole
        pictures.append(
            ("Zeros by kind of weight and block", plots.heat_map(list(table), rows), 0.8 + 0.24 * len(rows))
        )
    outputs = [block["output"] for block in report["blocks"]]
    if any(outputs):
        angles = [output and output["angle"] for output in outputs]
        pictures.append(("How far pruning turns each block's output", plots.over_depth({"": angles}, "degrees"), 2.3))
        errors = [output and output["error"] for output in outputs]
        pictures.append(("Relative error of each block's output", plots.over_depth({"": errors}, "error / size"), 2.3))
    if errors := error_rows(report):
        values = [row["mean"] for row in errors]
        draw = plots.bars([row["kind"] for row in errors], values, "error / size of the output")
        pictures.append(("Relative error of each kind of weight's own outputs", draw, 0.6 + 0.27 * len(errors)))
    return pictures + _activations(report, table)


def _activations(report: dict[str, Any], table: dict[str, dict[int, list[dict[str, Any]]]]) -> list[Picture]:
    seen = _observed(table)
    if not seen:
        return []
    pictures: list[Picture] = []
    for kind, facts in seen.items():
        norms = [fact["input_norm"] for fact in facts]
        draw = plots.band(*([norm[part] for norm in norms] for part in ("low", "median", "high", "largest")))
        pictures.append((f"Sizes of the inputs of {kind}", draw, 2.4))
    shares = {kind: [fact["above_one"] for fact in facts] for kind, facts in seen.items()}
    ratios = {kind: [fact["largest_to_median"] for fact in facts] for kind, facts in seen.items()}
    sinks = {kind: [fact["sinks"] / fact["tokens"] for fact in facts] for kind, facts in seen.items()}
    pictures.append(("Share of inputs with |x| > 1", plots.over_depth(shares, "share"), 2.6))
    pictures.append(("Largest over median input norm", plots.over_depth(ratios, "ratio", log=True), 2.6))
    pictures.append(("Share of sink tokens (10 times the median norm)", plots.over_depth(sinks, "share"), 2.6))
    return pictures


def _observed(table: dict[str, dict[int, list[dict[str, Any]]]]) -> dict[str, list[dict[str, Any]]]:
    """Kinds of weights -> activations by block; kinds that read the same input (q, k, v) stand together."""
    together: dict[str, list[dict[str, Any]]] = {}
    for kind, row in table.items():
        facts = [slot["activations"] for block in sorted(row) for slot in row[block][:1] if slot["activations"]]
        if not facts:
            continue
        twin = next((name for name, others in together.items() if others == facts), None)
        name = f"{twin}, {kind.rpartition('.')[2]}" if twin else kind
        together = {name if old == twin else old: value for old, value in together.items()}
        together[name] = facts
    return together


def _activation_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Extremes over the blocks, for the table."""
    rows = []
    for kind, facts in _observed(_by_kind_and_block(report)).items():
        rows.append(
            {
                "kind": kind,
                "above_one": max(fact["above_one"] for fact in facts),
                "largest": max(fact["largest"] for fact in facts),
                "ratio": max(fact["largest_to_median"] for fact in facts),
                "sinks": max(fact["sinks"] for fact in facts),
                "tokens": max(fact["tokens"] for fact in facts),
            }
        )
    return rows


def _by_kind_and_block(report: dict[str, Any]) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Kind of weight -> index of block -> its slots (several where there are experts)."""
    names = [block["name"] for block in report["blocks"]]
    table: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for slot in report["slots"]:
        block = next((i for i, name in enumerate(names) if f".{slot['name']}".find(f".{name}.") >= 0), None)
        if block is None:  # a name in the file that is not the module's: the block's number is all there is
            number = re.search(r"\.(\d+)\.", slot["name"])
            block = int(number[1]) if number else 0
        table.setdefault(kind_of(slot["name"]), {}).setdefault(block, []).append(slot)
    return table


def _uneven(rows: list[list[float]]) -> bool:
    """Whether there is anything to see in a picture of these shares."""
    shares = [share for row in rows for share in row if not math.isnan(share)]
    return bool(shares) and max(shares) - min(shares) > _TO_SEE


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
