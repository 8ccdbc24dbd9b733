"""Measured speed in words: the table of ace-bench and of a report."""

from __future__ import annotations

from ace_cli.report.facts import Speed, SpeedFacts, Spread

#: Less is noise.
_LEAST = 1.03

SPEED_HEAD = ["model", "engine", "decode", "prefill", "first token", "resident", "files"]


def speed_rows(speed: Speed) -> list[list[str]]:
    """One for each model and engine."""
    return [
        [
            entry.model, entry.engine, f"{entry.decode.median:.1f}/s", f"{entry.prefill.median:.1f}/s",
            f"{entry.first_token.median:.3f} s", f"{entry.resident_bytes / 1e9:.2f} GB",
            f"{entry.file_bytes / 1e9:.2f} GB",
        ]
        for entry in speed.entries
    ]  # fmt: skip


def speed_lines(speed: Speed) -> list[str]:
    """What each model gains over the first, and how it was measured, a sentence each."""
    first, *others = speed.entries
    gains = [f"{entry.model} ({entry.engine}) against {first.model}: {gain(entry, first)}." for entry in others]
    where = f"{speed.threads} threads" if speed.device == "cpu" else speed.device
    return [
        *gains,
        f"Greedy, {speed.new_tokens} tokens after a prompt of {speed.prompt_tokens}, on {where}; the models in turn, "
        f"{speed.rounds} rounds: medians in tokens a second, quartiles of the ratios within each round.",
    ]


def gain(entry: SpeedFacts, baseline: SpeedFacts) -> str:
    """What is better than the first model's, or worse; "no gain" where nothing is better.

    A speed counts if three quarters of the rounds agree on it.
    """
    speeds = {"decode": entry.decode_ratio, "prefill": entry.prefill_ratio}
    sizes = {
        "memory": entry.resident_bytes / max(1, baseline.resident_bytes),
        "files": entry.file_bytes / max(1, baseline.file_bytes),
    }
    better = [f"{name} {_ratio(found)}" for name, found in speeds.items() if found.low > _LEAST]
    better += [f"{name} {share:.2f}x" for name, share in sizes.items() if share < 1 / _LEAST]
    worse = [f"slower {name} {_ratio(found)}" for name, found in speeds.items() if found.high < 1 / _LEAST]
    worse += [f"more {name} {share:.2f}x" for name, share in sizes.items() if share > _LEAST]
    return ", ".join([*(better or ["no gain"]), *worse])


def _ratio(found: Spread) -> str:
    return f"{found.median:.2f}x ({found.low:.2f}-{found.high:.2f})"
