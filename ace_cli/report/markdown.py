"""report.md and sweep.md."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any

from ace_cli.report.facts import Report, ZeroShot
from ace_cli.report.speed import SPEED_HEAD, speed_lines, speed_rows
from ace_cli.report.zero_shot import task_head, task_line, task_rows


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def gigabytes(count: float) -> str:
    """Bytes for people: "1.23 GB"."""
    return f"{count / 1e9:.2f} GB"


def perplexity_rows(report: Report) -> list[list[str]]:
    """Dense, pruned: perplexity, ratio, zeros, bytes."""
    numbers = report.perplexity
    ratio = f"{numbers.ratio:.3f}x" if numbers.ratio is not None else ""
    zeros = [f"{share:.2%}".replace("%", " %") for share in (report.sparsity.dense, report.sparsity.achieved)]
    return [
        ["dense", _number(numbers.dense), "", zeros[0], gigabytes(report.bytes_on_disk["dense"])],
        [
            "pruned", _number(numbers.pruned), ratio, zeros[1],
            gigabytes(report.bytes_on_disk["pruned"]),
        ],
    ]  # fmt: skip


def share_name(report: Report) -> str:
    """What the share in ``perplexity_rows`` is of."""
    return "zeros in pruned weights" if report.size is None else "parameters fewer"


def size_words(report: Mapping[str, Any]) -> str:
    """What the checkpoint is good for, by itself; ``report`` is report.json, parsed."""
    if report["size"] is None:
        return "Zeros are stored densely: the checkpoint loads everywhere and is neither smaller nor faster by itself."
    dense, pruned = report["size"]["parameters"]["dense"], report["size"]["parameters"]["pruned"]
    if report["size"].get("as_products"):
        return (
            f"Weights became products of thinner ones: {dense:,} -> {pruned:,} parameters as factors; the checkpoint "
            "has them multiplied out, loads everywhere and is no smaller."
        )
    what = str(report["size"]["unit"]).capitalize() + "s were cut out"
    return f"{what}: {dense:,} -> {pruned:,} parameters; the checkpoint is smaller and faster as it is."


def target_words(target: Mapping[str, Any] | None) -> str:
    """Whether the size that was asked for is met, by what was measured; empty where none was. Of report.json."""
    if target is None:
        return ""
    unit = "bytes of weights" if target["of"] == "bytes" else "parameters"
    word = "met" if target["measured"] <= target["size"] else "MISSED"
    return (
        f"{target['asked']} is {word}: {target['form']}/ has {target['measured']:,} {unit}, {target['size']:,} were "
        f"allowed; found: {target['way']}."
    )


def target_line(report: Report) -> str:
    """``target_words`` of a report."""
    return target_words(None if report.target is None else dataclasses.asdict(report.target))


def protocol_line(report: Report) -> str:
    """The perplexity protocol in one sentence."""
    protocol = report.perplexity.protocol
    if protocol is None:
        return "No evaluation (eval=none)."
    which = "all" if protocol.all_windows else "the first"
    return (
        f"Perplexity on {protocol.dataset}: {which} {protocol.windows} windows of {protocol.seq_len} tokens without "
        f"overlap, mean over windows, computed in {protocol.dtype}."
    )


def windows_line(report: Report) -> str:
    """How far the windows agree on the ratio, in one sentence; empty where there are none to compare."""
    ratios = report.perplexity.ratio_by_window
    if len(ratios) < 2:
        return ""
    error = statistics.stdev(map(math.log, ratios)) / math.sqrt(len(ratios))
    return (
        f"Window by window the ratio is {min(ratios):.3f} to {max(ratios):.3f}, {statistics.median(ratios):.3f} in the "
        f"median; standard error of the mean {error:.1%}."
    )


def recovery_line(report: Report) -> str:
    """What training gained, in a sentence for each way; empty where nothing was trained."""
    whole = _whole_line(report)
    trained = [block["recovery"] for block in report.blocks if block.get("recovery")]
    if not trained:
        return whole
    gain = 1 - math.exp(statistics.fmean(math.log(max(t["after"], 1e-30) / max(t["before"], 1e-30)) for t in trained))
    better = sum(block["epochs"] > 0 for block in trained)
    slower = sum(block.get("lowered", 0) > 0 for block in trained)
    lowered = f" In {slower} of them the learning rate was too high and was lowered." if slower else ""
    return (
        f"Trained block by block: {better} of {len(trained)} blocks got better; the error on held-out windows fell by "
        f"{gain:.0%} a block.{lowered} {whole}"
    ).rstrip()


def _whole_line(report: Report) -> str:
    """Of a training of the whole model."""
    found, told = report.recovery, report.method["recover_options"]
    if found is None:
        return ""
    what, error = "the dense model's predictions", "KL divergence"
    if told.get("loss") == "lm":
        what, error = "the text", "loss"
    line = (
        f"Trained on {what}: {error} on held-out windows {found['before']:.4f} to {found['after']:.4f} nats, the best "
        f"after {found['epochs']} epochs."
    )
    if lowered := found.get("lowered", 0):
        line += f" The learning rate was too high: it was lowered {lowered} {'time' if lowered == 1 else 'times'}."
    better = found["after"] < found["before"]
    if report.method["recover"] == "qlora_groups":
        return (
            f"{line} Weights are whole numbers of {told['bits']} bits with a scale and a zero point for "
            f"{told['group']} inputs each, stored as plain numbers; before and after are both of rounded weights."
        )
    if told.get("merge") is False:
        beside = "peft loads the adapter in adapter/ of the checkpoint; all numbers here are with it."
        return f"{line} {beside if better else 'No adapter is written.'}"
    return line


def protocol_words(protocol: Mapping[str, Any]) -> str:
    """What tells one protocol of report.json from another, with the fingerprint of its tokens."""
    return (
        f"{protocol['dataset']}, {protocol['windows']} windows of {protocol['seq_len']} tokens, {protocol['dtype']}, "
        f"tokens {protocol['fingerprint'][:8]}"
    )


def task_part(zero_shot: ZeroShot) -> str:
    """The zero-shot scores and their protocol."""
    return table(task_head(zero_shot), task_rows(zero_shot)) + "\n\n" + task_line(zero_shot)


def stage_lines(report: Report) -> list[str]:
    """What was made of the checkpoint, one sentence each."""
    return [f"{name}: {found['summary']} ({found['result']})" for name, found in report.stages.items()]


def fidelity_line(report: Report) -> str:
    """What fidelity found, in one sentence; empty where it was not measured."""
    fidelity = report.fidelity
    if fidelity is None:
        return ""
    return (
        f"Against the dense model on {fidelity.tokens:,} tokens: KL divergence {fidelity.kl:.4f} nats, the same most "
        f"likely next token for {fidelity.agreement:.1%}, cosine of the last hidden states {fidelity.cosine:.4f}."
    )


def samples_part(report: Report) -> str:
    """Prompts and how both models write them on."""
    rows = [
        ["drawn" if sample.sampled else "greedy", *map(_cell, (sample.prompt, sample.dense, sample.pruned))]
        for sample in report.samples
    ]
    shown = table(["", "prompt", "dense", "pruned"], rows)
    loops = loops_line({"samples": [dataclasses.asdict(sample) for sample in report.samples]})
    return "\n\n".join(part for part in ("## Samples", shown, loops) if part)


def loops_line(report: Mapping[str, Any]) -> str:
    """How much the samples repeat themselves, in one sentence; empty where nobody counted.

    ``report`` is report.json, parsed.
    """
    counted = [sample for sample in report["samples"] if sample.get("loops")]
    if not counted:
        return ""

    def mean(model: str, sampled: bool) -> str:
        shares = [sample["loops"][model] for sample in counted if sample["sampled"] is sampled]
        return f"{statistics.fmean(shares):.0%}".replace("%", " %") if shares else "none"

    return (
        f"Loops: of all runs of four tokens in the samples, {mean('dense', False)} (dense) and "
        f"{mean('pruned', False)} (pruned) had stood there before when written greedily, {mean('dense', True)} and "
        f"{mean('pruned', True)} when drawn."
    )


def _cell(text: str) -> str:
    """Text that cannot break a table."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def render(report: Report) -> str:
    """report.md."""
    seconds = [[name, f"{value:.2f}"] for name, value in report.seconds.items()]
    phases = [[name, f"{value:.2f}"] for name, value in report.phases.items()]
    memory = [[name, gigabytes(value)] for name, value in report.peak_memory_bytes.items()]
    slots = [
        [
            slot["name"],
            f"{slot['shape'][0]} x {slot['shape'][1]}",
            slot["pattern"],
            f"{slot['sparsity']:.4f}",
            f"{slot['seconds']:.3f}",
        ]
        for slot in report.slots
    ]
    blocks = [[block["name"], f"{block['seconds']:.3f}"] for block in report.blocks]
    parts = [
        f"# {report.method['metric']} {report.sparsity.requested}: {report.model['path']}",
        f"```\n{report.command}\n```",
        table(["model", "perplexity", "ratio", share_name(report), "on disk"], perplexity_rows(report)),
        protocol_line(report),
        windows_line(report),
        recovery_line(report),
        fidelity_line(report),
        task_part(report.zero_shot) if report.zero_shot else "",
        *([table(SPEED_HEAD, speed_rows(report.speed)), *speed_lines(report.speed)] if report.speed else []),
        size_words(dataclasses.asdict(dataclasses.replace(report, slots=[], blocks=[]))),
        *stage_lines(report),
        target_line(report),
        _calibration_line(report),
        "## Warnings\n\n" + "\n".join(f"- {warning}" for warning in report.warnings) if report.warnings else "",
        samples_part(report) if report.samples else "",
        "## Time\n\n"
        + table(["", "seconds"], seconds)
        + "\n\nInside prune and write:\n\n"
        + table(["", "seconds"], phases),
        f"{report.tokens_per_second['prune']:,.0f} calibration tokens a second through all blocks."
        if report.tokens_per_second
        else "",
        _efficiency(report.efficiency),
        "## Peak memory\n\n" + table(["", "resident"], memory),
        "## Versions and machine\n\n"
        + table(["", ""], [[k, str(v)] for k, v in (report.versions | report.hardware).items()]),
        "## Configuration\n\n```yaml\n" + report.config["yaml"].strip() + "\n```",
        "## Blocks\n\n" + table(["block", "seconds"], blocks),
        "## Pruned weights\n\n" + table(["weight", "shape", "pattern", "zeros", "seconds"], slots),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _calibration_line(report: Report) -> str:
    calibration = report.calibration
    if calibration is None:
        return "No calibration: the metric looks at weights alone."
    return (
        f"Calibration: {calibration.n_samples} windows of {calibration.seq_len} tokens from {calibration.source}, "
        f"{calibration.tokens:,} tokens through the model, seed {calibration.seed}, "
        f"fingerprint {calibration.fingerprint[:12]}."
    )


def _efficiency(found: dict[str, Any]) -> str:
    if not found:
        return ""
    rates, parts = found["rates"], found["parts_seconds"]
    rows = [
        ["one forward", f"{found['flops'] / 1e9:,.1f} GFLOP", f"{rates['matmul'] / 1e9:,.1f} GFLOP/s", "compute"],
        ["reading", gigabytes(found["bytes_read"]), f"{gigabytes(rates['read'])}/s", "read"],
        ["writing", gigabytes(found["bytes_written"]), f"{gigabytes(rates['write'])}/s", "write"],
        ["through memory", gigabytes(found["bytes_read"] + found["bytes_written"]), f"{gigabytes(rates['memory'])}/s",
         "memory"],
        ["the method's own products, about", f"{found['method_flops'] / 1e9:,.1f} GFLOP", "", "method"],
    ]  # fmt: skip
    return (
        f"## Limit\n\nPruned and written in {found['measured_seconds']:.2f} s; this machine's limit is "
        f"{found['limit_seconds']:.2f} s ({found['efficiency']:.0%} of it reached): the longer of one forward and of "
        f"reading and writing the file.{_doubts(found)}\n\n"
        + table(["", "amount", "measured rate", "seconds"], [[*row[:3], f"{parts[row[3]]:.3f}"] for row in rows])
    )


def _doubts(found: dict[str, Any]) -> str:
    """What the rates were not, if the probe was wrong about them."""
    probed, rates = found["probed"], found["rates"]
    raised = [name for name in ("matmul", "read", "write", "memory") if rates[name] > probed[name] * (1 + 1e-9)]
    busy = f" The machine was busy when they were probed, by a factor of {probed['spread']:.1f}."
    return (busy if probed["spread"] > 1.5 else "") + (
        f" Of {', '.join(raised)} the run itself showed more than the probe before it: that counts." if raised else ""
    )


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
