"""What ``dry_run=true workers=N`` says a run takes, and what it takes here: CPU seconds of the first worker, by part.

python scripts/plan_check.py FOLDER --shape 405b metric=ace repair=admm sparsity=2:4
python scripts/plan_check.py FOLDER --shape deepseek_v3 metric=ace sparsity=2:4

FOLDER gets two blocks of an eighth of the model's width, random. One thread a worker: OMP_NUM_THREADS=1. CPU seconds of
the thread that computes, so that workers may share a core.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from ace_cli.core import timing, workers
from ace_cli.core.steps import NOBODY
from ace_cli.evaluation.dense import DenseCache
from ace_cli.report.terminal import Terminal
from ace_cli.run import at_scale, pipeline
from ace_cli.run.config import RunConfig, config_folder, parse, store_schemas

PART = 8
#: Parts of a forecast -> names under which a run counts them. A slot's inputs are observed while the block runs.
TOGETHER = {
    ("forward", "statistics"): ("observe", "forward", "gather"),
    ("exchanges and repairs",): ("score", "select", "refine", "repair", "mask"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="405b")
    parser.add_argument("--measured", type=Path, help=argparse.SUPPRESS)
    options, overrides = parser.parse_known_args()
    torch.set_num_threads(1)
    if options.measured is not None:
        measure(options.folder, overrides, options.measured)
        return
    if not (options.folder / "config.json").is_file():
        maker = Path(__file__).with_name("make_synthetic.py")
        made = [str(options.folder), "--shape", options.shape, "--part", str(PART), "--blocks", "2"]
        subprocess.run([sys.executable, str(maker), *made], check=True)
    print("| workers | part | forecast, s | measured, CPU s |\n|---|---|---|---|")
    for count in (1, 2):
        compare(count, forecast(options.folder, overrides, count), run(options.folder, overrides, count))


def configured(folder: Path, overrides: list[str]) -> RunConfig:
    store_schemas()
    given = [f"model.path={folder}", "calib=text", f"calib.path={folder}/pages.jsonl", "eval=none", "device=cpu",
             f"output_dir={folder}/out", "samples.prompts=[]", "html=false", "observe.windows=0", "observe.tokens=0",
             "keep_checkpoint=false"]  # fmt: skip
    with initialize_config_dir(str(config_folder().absolute()), version_base="1.3"):
        config = compose("prune", [*given, *overrides])
    return parse(config, Path(config.output_dir))


def forecast(folder: Path, overrides: list[str], count: int) -> dict[str, float]:
    config = configured(folder, [*overrides, "dry_run=true", f"workers={count}"])
    model = pipeline._open(config, torch.device("cpu"), NOBODY)
    plan, limit = pipeline._plan(config, model, None, None, Terminal(quiet=True))
    return at_scale.at_scale(config, model, plan, limit.rates, count).parts


def run(folder: Path, overrides: list[str], count: int) -> dict[str, float]:
    """Seconds by the run's own names, of the first worker; and of the whole process that took most."""
    target = folder / "measured"
    program = [__file__, str(folder), "--measured", str(target), *overrides]
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(count)] if count > 1 else []
    subprocess.run([sys.executable, *start, *program], check=True, stdout=subprocess.DEVNULL)
    found = [json.loads(target.with_suffix(f".{rank}").read_text()) for rank in range(count)]
    return {**found[0]["phases"], "whole": max(each["whole"] for each in found)}


def measure(folder: Path, overrides: list[str], target: Path) -> None:
    timing.time = SimpleNamespace(perf_counter=time.thread_time)  # type: ignore[assignment]
    group = workers.join("cpu")
    report: Any = pipeline.run(
        configured(folder, overrides), "a check of plans", Terminal(quiet=True), DenseCache(None), group
    )
    used = resource.getrusage(resource.RUSAGE_SELF)
    found = {"phases": dataclasses.asdict(report)["phases"] if report else {}, "whole": used.ru_utime + used.ru_stime}
    target.with_suffix(f".{os.environ.get('RANK', '0')}").write_text(json.dumps(found))
    workers.leave()


def compare(count: int, planned: dict[str, float], found: dict[str, float]) -> None:
    for parts, names in TOGETHER.items():
        seconds = sum(found.get(name, 0.0) for name in names)
        print(f"| {count} | {' and '.join(parts)} | {sum(planned[part] for part in parts):.1f} | {seconds:.1f} |")
    other = ", ".join(f"{name} {planned[name]:.1f}" for name in ("read", "write", "traffic"))
    whole = f"{sum(planned.values()):.1f} | {found['whole']:.1f}"
    print(f"| {count} | the whole process, imports among it ({other}) | {whole} |", flush=True)


if __name__ == "__main__":
    main()
