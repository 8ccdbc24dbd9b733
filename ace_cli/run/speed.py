"""The speed of a run's results against the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ace_cli.core import memory
from ace_cli.core.errors import AceError
from ace_cli.evaluation.speed.engines import Subject, check_positions, no_llama_cpp, subjects
from ace_cli.evaluation.speed.measure import measure, turns
from ace_cli.evaluation.speed.options import Bench
from ace_cli.model.files import Checkpoint
from ace_cli.report.facts import Speed
from ace_cli.run.context import RunContext


def check_bench(bench: Bench, source: Checkpoint) -> None:
    """AceError if the dense model and what is made of it do not fit into memory side by side, or a text into it."""
    check_positions("bench=true: the model", source.folder, bench.context)
    needed, free = 3 * source.file_bytes, memory.free()
    if needed > free:
        raise AceError(
            f"bench=true holds up to three models in memory, {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free.",
            "Use bench=false, and ace-bench where there is more.",
        )


def measure_speed(run: RunContext, bench: Bench, pruned: Path, stages: dict[str, dict[str, Any]]) -> Speed:
    """Dense, pruned, and what the stages made, with every engine that is here."""
    found = _subjects(run, bench, pruned, stages)
    with run.terminal.progress("measuring speed", turns(found, bench)) as step:
        return measure(found, bench, run.model.device, step)


def _subjects(run: RunContext, bench: Bench, pruned: Path, stages: dict[str, dict[str, Any]]) -> list[Subject]:
    device, made = run.model.device, [Path(facts["result"]) for facts in stages.values()]
    places = {"dense": run.model.checkpoint.folder, "pruned": pruned}
    places |= {path.name: path for path in made if path.suffix != ".gguf" or not no_llama_cpp()}
    found = [each for name, path in places.items() for each in subjects(name, path, device, None, bench.context)]
    if any(each.model == "packed" for each in found):  # the same product, of the smaller files
        found = [each for each in found if each.model != "pruned" or not each.engine.startswith("packed")]
    return found
