"""How fast checkpoints write, dense against pruned: in turn, round after round, so that a busy machine slows all alike.

Ratios are taken within each round; medians and quartiles over the rounds are told.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ace_cli.core import memory
from ace_cli.core.errors import AceError
from ace_cli.evaluation.speed.engines import Subject, Writer
from ace_cli.evaluation.speed.options import Bench
from ace_cli.report.facts import Speed, SpeedFacts, Spread


@dataclass
class _Times:
    """Of one model, a number for each round."""

    resident: int
    first: list[float]
    decode: list[float]


def measure(
    subjects: Sequence[Subject], bench: Bench, device: torch.device, step: Callable[[], None] = lambda: None
) -> Speed:
    """All models are in memory at once. The first is what the others are compared with.

    ``step`` is called after each model's turn, ``turns`` times. Raises AceError where they do not fit into memory.
    """
    _check_memory(subjects, device)
    _warm_up()
    writers, times = [], []
    for subject in subjects:
        writer, resident = _loaded(subject, bench, device)
        writers.append(writer)
        times.append(_Times(resident, [], []))
        step()
    for _ in range(bench.rounds):
        for writer, found in zip(writers, times, strict=True):
            first, decode = _turn(writer, bench)
            found.first.append(first)
            found.decode.append((bench.new - 1) / decode)
            step()
    entries = [_entry(subject, found, times[0], bench) for subject, found in zip(subjects, times, strict=True)]
    return Speed(bench.prompt, bench.new, bench.rounds, str(device), torch.get_num_threads(), entries)


def turns(subjects: Sequence[Subject], bench: Bench) -> int:
    """How often ``measure`` calls ``step``."""
    return len(subjects) * (bench.rounds + 1)


def _check_memory(subjects: Sequence[Subject], device: torch.device) -> None:
    needed = sum(subject.file_bytes for subject in subjects)
    free: int = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory.free()
    if needed > free:
        raise AceError(
            f"{len(subjects)} models side by side need {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free.",
            "Give fewer models.",
        )


def _warm_up() -> None:
    """A toy model writes two tokens: what libraries load when they are first used is no model's memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    toy = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                       num_attention_heads=1, num_key_value_heads=1))  # fmt: skip
    toy.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=2, min_new_tokens=2, pad_token_id=0)


def _loaded(subject: Subject, bench: Bench, device: torch.device) -> tuple[Writer, int]:
    """The model after a first turn that does not count, and the bytes that it keeps."""
    memory.trim()
    before = _held(device)
    writer = subject.load()
    _turn(writer, bench)
    memory.trim()
    return writer, max(0, _held(device) - before)


def _held(device: torch.device) -> int:
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else memory.resident()


def _turn(writer: Writer, bench: Bench) -> tuple[float, float]:
    """Seconds to the first token, and from there to the last."""
    ids = [index * 7919 % (writer.vocabulary - 3) + 3 for index in range(bench.prompt)]  # any text, but no end of one
    return writer.write(ids, bench.new)


def _entry(subject: Subject, found: _Times, baseline: _Times, bench: Bench) -> SpeedFacts:
    pairs = zip(baseline.first, found.first, strict=True)
    return SpeedFacts(
        model=subject.model,
        engine=subject.engine,
        prefill=spread([bench.prompt / seconds for seconds in found.first]),
        decode=spread(found.decode),
        first_token=spread(found.first),
        prefill_ratio=spread([theirs / ours for theirs, ours in pairs]),
        decode_ratio=spread([ours / theirs for theirs, ours in zip(baseline.decode, found.decode, strict=True)]),
        resident_bytes=found.resident,
        file_bytes=subject.file_bytes,
    )


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return Spread(middle, low, high)
