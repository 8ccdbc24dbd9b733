"""One job: a single run, or one of the many of a sweep, in this process or in one that a launcher starts.

Launchers pickle ``job`` by its name, so it is a plain function; what a sweep must know of it, it leaves in files.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from ace_cli.cli.arguments import as_typed
from ace_cli.cli.ending import LOADING, lost, mend, of_model, of_system, stopping_at_once
from ace_cli.core import workers
from ace_cli.core.errors import AceError, first_line
from ace_cli.core.locks import locked
from ace_cli.core.memory import lasting
from ace_cli.report.sweep import JobRecord, launched, write_so_far
from ace_cli.run.config import CONFIGURATION_ERRORS, RunConfig, explain, parse

if TYPE_CHECKING:
    from ace_cli.report.facts import Report

BUG, WORSE = 1, 3


def prepare() -> None:
    """What libraries read from the environment when they are imported, in every process that works."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra lets errors through, to be explained here
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported: our own bar is the only one
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks for large pages: fewer faults on fresh memory


def job(config: DictConfig) -> float | None:
    """Do what the configuration says. A single run that fails ends the process with its exit code.

    One of a sweep never fails: it leaves its record, and returns the pruned model's perplexity, which a sweeper may
    minimise, or None.
    """
    prepare()
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        return _of_many(config)
    _alone(config)
    return None


def known(fault: Exception) -> AceError | None:
    """A fault that the user can mend, in one line; None for a bug."""
    if isinstance(fault, AceError):
        return fault
    if isinstance(fault, CONFIGURATION_ERRORS):
        return explain(fault)
    return of_system(fault) if isinstance(fault, OSError) else of_model(fault)


def _alone(config: DictConfig) -> None:
    """A fault ends the process here, so that Hydra does not print it its own way."""
    given = any(override.startswith("output_dir=") for override in HydraConfig.get().overrides.task)
    try:
        parsed = parse(config, Path(config.output_dir), given)
        report = _run(parsed, None)
    except workers.LostWorker as fault:
        sys.exit(lost("ace-prune", fault))
    except Exception as fault:
        if (line := known(fault)) is not None:
            sys.exit(mend("ace-prune", line))
        traceback.print_exc()
        sys.exit(BUG)
    if objection := _objection(parsed, report):
        print(f"ace-prune: {objection}", file=sys.stderr)
        workers.remember_end(WORSE)
        sys.exit(WORSE)


def _of_many(config: DictConfig) -> float | None:
    hydra_config = HydraConfig.get()
    record = JobRecord(Path(hydra_config.sweep.dir).absolute(), hydra_config.job.num, _overrides())
    with ExitStack() as held:
        try:
            record.lock[0].mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(*record.lock))
        except AceError:  # whoever works on it leaves the record
            mend("ace-prune", AceError(f"Job {record.number} is still worked on by another process"))
            return None
        record.begin()
        if (started := launched(record.folder)) is not None:
            print(started.line(record), flush=True)
        try:
            return _recorded(config, Path(hydra_config.runtime.output_dir), record)
        except KeyboardInterrupt:
            record.fail("Interrupted: repeat the command to continue.")
            raise
        finally:
            write_so_far(record.folder)


def _recorded(config: DictConfig, folder: Path, record: JobRecord) -> float | None:
    try:
        parsed = parse(config, folder)
        if (started := launched(record.folder)) is not None:
            typed = dict(override.split("=", 1) for override in record.overrides)
            parsed = dataclasses.replace(parsed, push_to_hub=started.on_hub(parsed.push_to_hub, record.number, typed))
        report = _kept(parsed) or _run(parsed, record.folder / "dense")
    except Exception as fault:
        line = known(fault)
        if line is not None:
            mend("ace-prune", line)
        else:
            traceback.print_exc()  # a bug: the other jobs go on
        record.fail(str(line or f"{type(fault).__name__}: {first_line(fault)}"))
        return None
    record.finish(report, _objection(parsed, report))
    return report.perplexity.pruned if report is not None else None


def _objection(config: RunConfig, report: Report | None) -> str | None:
    return config.gate.objection(report.perplexity.ratio) if report is not None else None


def _kept(config: RunConfig) -> Report | None:
    with lasting("ace_cli.run.finished"), stopping_at_once("ace-prune"):
        from ace_cli.run.finished import finished  # imports torch, in the end

    report = finished(config)
    if report is not None:
        print(f"Finished before, not repeated: {config.output_dir}")
    return report


def _run(config: RunConfig, shared: Path | None) -> Report | None:
    """``shared``: the folder of what other jobs measured of the dense model."""
    from ace_cli.report.terminal import Terminal

    # torch and transformers take seconds to import; help and configuration errors must not wait for them
    with (
        Terminal(quiet=workers.size() > 1).waiting(LOADING),
        lasting("ace_cli.run.pipeline"),
        stopping_at_once("ace-prune"),
    ):
        from ace_cli.core.device import choose_device
        from ace_cli.evaluation.dense import DenseCache
        from ace_cli.run.pipeline import run

    overrides = [override for override in _overrides() if not override.startswith("output_dir=")]
    if config.output_dir_given:
        overrides.append(f"output_dir={config.output_dir}")
    command = shlex.join(["ace-prune", *_config_folder(), *overrides])
    group = workers.join(choose_device(config.device).type if workers.size() > 1 else "")
    terminal = Terminal(quiet=not group.first, brief=shared is not None)
    report = run(config, command, terminal, DenseCache(shared), group)
    workers.leave()
    return report


def _config_folder() -> list[str]:
    """The user's own --config-dir: part of the command that repeats a run."""
    sources = HydraConfig.get().runtime.config_sources
    return [f"--config-dir={source.path}" for source in sources if source.provider == "command-line"]


def _overrides() -> list[str]:
    """The job's overrides as a person would type them."""
    return [as_typed(override) for override in HydraConfig.get().overrides.task]
