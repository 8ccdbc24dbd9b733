"""The command line: Hydra in, exit code out. A known error is one printed line and exit code 2."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from ace_cli import __version__
from ace_cli.cli.arguments import as_typed, config_folders, for_hydra
from ace_cli.cli.ending import MEND, command, mend, of_system, stopping_at_once
from ace_cli.core.errors import AceError, BusyError, first_line
from ace_cli.core.memory import lasting
from ace_cli.evaluation.dense import DenseCache
from ace_cli.report.sweep import Sweep
from ace_cli.run.config import CONFIGURATION_ERRORS, RunConfig, config_folder, explain, parse, store_schemas

if TYPE_CHECKING:
    from ace_cli.report.facts import Report

FAILED, WORSE = 1, 3
_BRIEFLY = """\
ace-prune makes a language model sparse or smaller, and proves what it did.

  ace-prune model=smollm2 experiment=best sparsity=0.5     a first look: needs no hub and no data
  ace-prune model=FOLDER metric=ace sparsity=2:4           a model of yours, or a hub id
  ace-prune model=FOLDER sparsity=0.5 dry_run=true         what it would do, need and take
  ace-prune -m metric=wanda,varp,ace sparsity=0.5,2:4      a table

  ace-prune --help       every choice and option
  ace-eval, ace-bench, ace-report, ace-verify              judge, time, compare and check what was made"""


@command("ace-prune")
def main() -> None:
    """``ace-prune``: exits 0 when done, 1 when a job of a sweep failed, 2 for what the user can mend, 3 at the gate."""
    if sys.argv[1:] in ([], ["--version"]):
        print(f"ace-prune {__version__}" if sys.argv[1:] else _BRIEFLY)
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra lets errors through, to be explained here
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported: our own bar is the only one
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks for large pages: fewer faults on fresh memory
    sys.argv[1:] = for_hydra(sys.argv[1:])
    store_schemas()
    sweep = Sweep()
    dense_cache = DenseCache()
    faults: list[AceError] = []
    objections: list[str] = []
    bugs: list[Exception] = []
    job = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="prune")(
        lambda config: _job(config, sweep, dense_cache, faults, objections, bugs)
    )
    try:
        job()
    except Exception as fault:
        if fault in bugs or (isinstance(fault, OSError) and not isinstance(fault, CONFIGURATION_ERRORS)):
            raise
        sys.exit(_mend(explain(fault)))  # before a job begins, all that fails is the configuration
    except KeyboardInterrupt as stop:  # a run that has something to lose says what becomes of it
        jobs = (
            "Repeat the command: finished jobs are kept." if sweep.jobs else "No block was finished: nothing is kept."
        )
        sys.exit(_mend(AceError("Interrupted", str(stop) or jobs)))
    if faults and not sweep.jobs:
        sys.exit(MEND)
    if sweep.jobs:
        print("\n" + sweep.write())
        sweep.finish()
        print(f"\nSweep: {sweep.folder}")
        if sweep.failed or sweep.shared:
            sys.exit(FAILED)
    if objections:
        sys.exit(WORSE)


def _job(
    config: DictConfig, sweep: Sweep, dense_cache: DenseCache, faults: list[AceError], objections: list[str],
    bugs: list[Exception],
) -> None:  # fmt: skip
    """One job: the whole run, or one of a sweep. A fault is kept here, so that Hydra does not print it its own way."""
    hydra_config = HydraConfig.get()
    many = hydra_config.mode is RunMode.MULTIRUN
    outcome: Report | str | None
    try:
        folder = hydra_config.runtime.output_dir if many else config.output_dir
        given = many or any(o.startswith("output_dir=") for o in hydra_config.overrides.task)
        job = parse(config, Path(folder), given)
        outcome = (_kept(job) if many else None) or _run(job, dense_cache)
        if outcome is not None and (objection := job.gate.objection(outcome.perplexity.ratio)):
            objections.append(objection)
            print(f"ace-prune: {objection}", file=sys.stderr)
    except AceError as fault:
        _mend(fault)
        faults.append(fault)
        outcome = str(fault)
        if many and isinstance(fault, BusyError):  # another sweep does this job, and records it
            sweep.shared, outcome = True, None
    except CONFIGURATION_ERRORS as fault:  # values that cannot be resolved
        faults.append(explain(fault))
        _mend(faults[-1])
        outcome = str(faults[-1])
    except OSError as fault:
        faults.append(of_system(fault))
        _mend(faults[-1])
        outcome = str(faults[-1])
    except Exception as fault:
        if not many:
            bugs.append(fault)
            raise
        traceback.print_exc()  # a bug: the other jobs go on
        outcome = f"{type(fault).__name__}: {first_line(fault)}"
    if many and outcome is not None:
        sweep.folder = Path(hydra_config.sweep.dir).absolute()
        sweep.add(_overrides(), outcome)


def _kept(config: RunConfig) -> Report | None:
    with lasting(), stopping_at_once("ace-prune"):
        from ace_cli.run.finished import finished  # imports torch, in the end

    report = finished(config)
    if report is not None:
        print(f"Finished before, not repeated: {config.output_dir}")
    return report


def _run(config: RunConfig, dense_cache: DenseCache) -> Report | None:
    # torch and transformers take seconds to import; help and configuration errors must not wait for them
    with lasting(), stopping_at_once("ace-prune"):
        from ace_cli.report.terminal import Terminal
        from ace_cli.run.pipeline import run

    overrides = [override for override in _overrides() if not override.startswith("output_dir=")]
    if config.output_dir_given:
        overrides.append(f"output_dir={config.output_dir}")
    return run(config, shlex.join(["ace-prune", *config_folders(sys.argv[1:]), *overrides]), Terminal(), dense_cache)


def _overrides() -> list[str]:
    """The job's overrides as a person would type them."""
    return [as_typed(override) for override in HydraConfig.get().overrides.task]


def _mend(fault: AceError) -> int:
    return mend("ace-prune", fault)


if __name__ == "__main__":
    main()
