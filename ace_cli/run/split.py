"""Several workers that each have calibration windows of their own: which ones, and where that cannot be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ace_cli.core.errors import AceError
from ace_cli.core.registry import name_of
from ace_cli.core.workers import Split, Workers
from ace_cli.recovery.training import training_steps

if TYPE_CHECKING:
    from ace_cli.run.config import RunConfig


def is_split(config: RunConfig, workers: int) -> bool:
    """Whether so many workers see other windows each."""
    return config.split is Split.windows and workers > 1 and config.needs_data


def own_windows(config: RunConfig, workers: Workers) -> list[int]:
    """Numbers of the windows that go through this worker's blocks: neighbours, or some of each step of a training."""
    steps = _steps(config)
    if not is_split(config, workers.size):
        return [number for step in steps for number in step]
    return [number for step in steps for number in workers.part(step)]


def most_tokens(config: RunConfig, workers: int) -> int:
    """Calibration tokens of the worker that has most of them: the last one."""
    return len(own_windows(config, Workers(workers - 1, workers))) * config.calib.length if config.needs_data else 0


def check_split(config: RunConfig, workers: int) -> None:
    """AceError where there is not a window for every worker, of all or of a step of a training."""
    if not is_split(config, workers):
        return
    windows = max(map(len, _steps(config)))
    if windows >= workers:
        return
    if windows == _count(config):
        raise AceError(
            f"split=windows: {windows} calibration windows for {workers} workers.",
            "Use more windows (calib.n_samples), fewer workers, or split=rows.",
        )
    name, needed = name_of("recover", config.recover), workers * config.calib.length
    raise AceError(
        f"split=windows: a step of recover={name} has {windows} windows for {workers} workers.",
        f"Use recover.batch={needed}, which is tokens, or split=rows.",
    )


def _count(config: RunConfig) -> int:
    return config.calib.tokens // config.calib.length


def _steps(config: RunConfig) -> list[range]:
    """Windows that are to be shared evenly, each for itself."""
    recovery = config.recover
    if recovery.acts and recovery.in_stream:
        return training_steps(_count(config), config.calib.length, recovery.batch)
    return [range(_count(config))]
