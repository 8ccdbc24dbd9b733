"""Runs stages: each is finished, or not there; a finished one of the same identity is not repeated."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from ace_cli import __version__
from ace_cli.core.errors import AceError
from ace_cli.core.json_reader import read_object
from ace_cli.core.own_files import check_ours, others, remove
from ace_cli.core.stage import RECORD, Progress, Stage
from ace_cli.report.facts import write_whole


def run_stage(stage: Stage, source: Path, source_digest: str, folder: Path, progress: Progress) -> dict[str, Any]:
    """Make ``folder``/NAME from ``source``, whose content ``source_digest`` stands for; the stage's facts.

    Raises AceError if something else lies there, or the result does not verify: then nothing is left of it.
    """
    final, partial = folder / stage.name, folder / f"{stage.name}.partial"
    content = {"stage": stage.name, "source": source_digest, "tool": __version__, **stage.identity()}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    record = _record(final)
    if record is not None and record.get("identity") == digest:
        return {**record["facts"], "made": False}
    if final.exists() and record is None:
        raise AceError(f"{final} exists and was not made by ace-prune.", "Choose another output_dir.")
    check_ours(final, _files(record))
    if _record(partial) is None:  # it does not say that it was begun here
        check_ours(partial, ())
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_whole(partial / RECORD, json.dumps({"identity": digest, "facts": {}}))
    start = time.perf_counter()
    try:
        facts = stage.run(source, partial, progress)
        stage.verify(source, partial)
    except AceError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    facts = {**facts, "seconds": time.perf_counter() - start}
    written = {"identity": digest, "facts": facts, "files": others(partial, ())}
    write_whole(partial / RECORD, json.dumps(written, indent=1))
    if left := remove(final, _files(record), last=RECORD):
        raise AceError(f"{final} holds {left[0]}, not written by ace-prune.", "Move it, then repeat the command.")
    os.rename(partial, final)
    return {**facts, "made": True}


def _files(record: dict[str, Any] | None) -> list[str]:
    """What was written into a finished folder."""
    found = record.get("files") if record is not None else None
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        record = read_object(folder / RECORD)
    except AceError:
        return None
    return record if isinstance(record.get("facts"), dict) else None
