"""Jobs of a sweep that an earlier start of the same sweep has finished."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ace_cli import __version__
from ace_cli.core.errors import AceError
from ace_cli.core.stage import RECORD
from ace_cli.model.pruned import MANIFEST, read_manifest
from ace_cli.model.source import open_model, origin_of
from ace_cli.report import facts
from ace_cli.report.facts import Report

if TYPE_CHECKING:
    from ace_cli.run.config import RunConfig


def finished(config: RunConfig) -> Report | None:
    """The report in ``config.output_dir``, if this version made it of this configuration, model and text files.

    None if anything differs, was touched since, or is missing.
    """
    file = config.output_dir / "report.json"
    try:
        report = facts.load(file)
        if report.versions.get("ace-prune") != __version__ or report.config.get("yaml") != config.text:
            return None
        if _changed_since(config, file) or (config.keep_checkpoint and not _is_whole(config.output_dir / "checkpoint")):
            return None
        if not all((config.output_dir / stage.name / RECORD).is_file() for stage in config.stages):
            return None
        return report if _is_same_model(config, report) else None
    except (OSError, ValueError, AceError):
        return None  # not whole, or of another time: the job is simply done again, and says what is wrong


def _is_whole(checkpoint: Path) -> bool:
    return all((checkpoint / name).is_file() for name in read_manifest(checkpoint).files or [MANIFEST])


def _is_same_model(config: RunConfig, report: Report) -> bool:
    """By the stamps of the files that were named, imported or not; where they differ, by all their content."""
    if origin_of(config.model) == report.model.get("stamps"):
        return True
    now, then = open_model(config.model), report.model
    return now.fingerprint() == then.get("fingerprint") and now.digest() == then.get("digest")


def _changed_since(config: RunConfig, report: Path) -> bool:
    paths = [getattr(part, "path", None) for part in (config.calib, config.eval)]
    return any(path and Path(path).expanduser().stat().st_mtime > report.stat().st_mtime for path in paths)
