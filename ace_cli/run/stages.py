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
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    start = time.perf_counter()
    try:
        facts = stage.run(source, partial, progress)
        stage.verify(source, partial)
    except AceError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    facts = {**facts, "seconds": time.perf_counter() - start}
    write_whole(partial / RECORD, json.dumps({"identity": digest, "facts": facts}, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    os.rename(partial, final)
    return {**facts, "made": True}


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        record = read_object(folder / RECORD)
    except AceError:
        return None
    return record if isinstance(record.get("facts"), dict) else None
