"""Training the whole pruned model, between pruning and publishing: if interrupted, it is continued; none is lost."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from ace_cli.core.json_reader import read_object
from ace_cli.model.files import Checkpoint
from ace_cli.model.pruned import MANIFEST, RECOVERED
from ace_cli.recovery.base import RecoveryFacts
from ace_cli.report.facts import write_whole
from ace_cli.run.context import RunContext
from ace_cli.run.journal import TRAINED, Work


def recover_checkpoint(run: RunContext, work: Work) -> RecoveryFacts:
    """Replace the weight files of the finished ``checkpoint.partial`` by trained ones; what the training did.

    Trained files go to ``checkpoint.training``, with the state of the training after every epoch. When all are there, a
    file says so, and one after the other is renamed into ``checkpoint.partial``. The other workers ``help_training``.
    """
    before, done = recorded(work), work.training / TRAINED
    run.workers.done(_blocks_done(run))
    if run.workers.from_first(lambda: before is None and not done.is_file()):
        work.training.mkdir(exist_ok=True)
        write_whole(done, json.dumps(dataclasses.asdict(_train(run, work))))
    if before is not None:
        return before
    weights = {entry.file.name for entry in Checkpoint(work.partial).tensors.values()}
    for name in (*sorted(weights), *run.config.recover.files):  # none where nothing got better
        if (work.training / name).exists():
            (work.partial / name).parent.mkdir(exist_ok=True)
            _move(work.training / name, work.partial / name)
    return RecoveryFacts(**read_object(done))


def help_training(run: RunContext, work: Work) -> None:
    """What a worker does that is not the first one, when that one is in ``recover_checkpoint``."""
    run.workers.await_first(_blocks_done(run))
    if run.workers.from_first(lambda: False):
        _train(run, work)


def _train(run: RunContext, work: Work) -> RecoveryFacts:
    texts, pruned, progress = run.texts, Checkpoint(work.partial), run.terminal.progress
    assert texts.training_NL is not None and texts.held_NL is not None
    return run.config.recover.recover_model(
        run.model, pruned, texts.training_NL, texts.held_NL, work.training, progress, run.workers
    )


def _blocks_done(run: RunContext) -> str:
    return f"blocks of {run.folder}"


def _move(file: Path, target: Path) -> None:
    file.replace(target)


def recorded(work: Work) -> RecoveryFacts | None:
    """What ``checkpoint.partial`` says of its training; None if it is not trained yet."""
    if not (work.partial / MANIFEST).is_file():
        return None
    entry = read_object(work.partial / MANIFEST).get(RECOVERED)
    return RecoveryFacts(**entry) if isinstance(entry, dict) else None


def forget_training(work: Work) -> None:
    """``checkpoint.partial`` says itself that it is trained: the rest is not needed."""
    shutil.rmtree(work.training, ignore_errors=True)
