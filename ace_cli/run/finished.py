"""Jobs of a sweep that an earlier start of the same sweep has finished."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ace_cli import __version__
from ace_cli.core.errors import AceError
from ace_cli.core.json_reader import read_object
from ace_cli.core.stage import RECORD
from ace_cli.model.files import Checkpoint
from ace_cli.model.pruned import MANIFEST
from ace_cli.report.facts import SCHEMA_VERSION, Report

if TYPE_CHECKING:
    from ace_cli.run.config import RunConfig


def finished(config: RunConfig) -> Report | None:
    """The report in ``config.output_dir``, if this version made it of this configuration, model and text files.

    None if anything differs, was touched since, or is missing.
    """
    file = config.output_dir / "report.json"
    try:
        content = read_object(file)
        if content["schema_version"] != SCHEMA_VERSION or content["versions"]["ace-prune"] != __version__:
            return None
        if content["config"]["yaml"] != config.text or _changed_since(config, file):
            return None
        if config.keep_checkpoint and not (Path(content["checkpoint"]) / MANIFEST).is_file():
            return None
        if not all((config.output_dir / stage.name / RECORD).is_file() for stage in config.stages):
            return None
        if Checkpoint(Path(content["model"]["folder"])).fingerprint() != content["model"]["fingerprint"]:
            return None
        return read_report(content)
    except (AceError, OSError, ValueError, KeyError, TypeError):
        return None  # not whole, or of another time: the job is simply done again


def read_report(content: dict[str, Any]) -> Report:
    """What report.json holds, typed. KeyError, TypeError or ValueError if it is of another kind, or of another time."""
    if content["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"it is of schema {content['schema_version']}, this version reads {SCHEMA_VERSION}")
    return cast(Report, _built(Report, content))


def _changed_since(config: RunConfig, report: Path) -> bool:
    paths = [getattr(part, "path", None) for part in (config.calib, config.eval)]
    return any(path and Path(path).expanduser().stat().st_mtime > report.stat().st_mtime for path in paths)


def _built(kind: Any, value: Any) -> Any:
    """What ``dataclasses.asdict`` made of a ``kind``, made into one again."""
    if typing.get_origin(kind) is types.UnionType:
        return None if value is None else _built(typing.get_args(kind)[0], value)
    if typing.get_origin(kind) is list:
        return [_built(typing.get_args(kind)[0], item) for item in value]
    if typing.get_origin(kind) is dict:
        return {name: _built(typing.get_args(kind)[1], item) for name, item in value.items()}
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return cast("type", kind)(**{name: _built(hints[name], item) for name, item in value.items()})
    return value
