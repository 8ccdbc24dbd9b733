"""Which jobs a sweep's launcher is given, whichever launcher that is, so that no job can be lost in silence."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from ace_cli.cli.arguments import as_typed
from ace_cli.core import workers
from ace_cli.core.errors import AceError, first_line
from ace_cli.core.locks import locked
from ace_cli.report import sweep
from ace_cli.report.sweep import Sweep, forget, gather
from ace_cli.run.config import CONFIGURATION_ERRORS


class Launched:
    """The jobs of this command's sweep: number -> overrides, as they are launched; none for a single run."""

    def __init__(self) -> None:
        self.jobs: dict[int, Sequence[str]] = {}
        self.folder: Path | None = None
        #: Whether a sweeper chooses each job by the results of those before.
        self.search = False
        self._held = ExitStack()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Every launcher that a sweeper asks for is watched. The sweep's folder, once known, is locked meanwhile."""
        original = Plugins.instantiate_launcher

        def instantiate(plugins: Plugins, *args: Any, **kwargs: Any) -> Launcher:
            return _Watched(original(plugins, *args, **kwargs), self, kwargs["config"])

        with self._held, patch.object(Plugins, "instantiate_launcher", instantiate):
            yield

    def begin(self, config: DictConfig, overrides: Sequence[Sequence[str]], first: int) -> None:
        """Note jobs that are about to be launched. AceError where another sweep works there, or many workers would."""
        if workers.size() > 1:
            hint = "Use a launcher of Hydra's, or leave -m out."
            raise AceError("Several workers make one model, -m makes many", hint)
        if self.folder is None:
            folder = Path(str(config.hydra.sweep.dir)).absolute()
            folder.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(locked(folder))
            forget(folder)
            self.folder = folder
            self.search = not str(config.hydra.sweeper["_target_"]).endswith("BasicSweeper")
        for number, of_job in enumerate(overrides, first):
            self.jobs[number] = [as_typed(override) for override in filter_overrides(of_job)]
        typed = [dict(override.split("=", 1) for override in job) for job in self.jobs.values()]
        trials = int(config.hydra.sweeper.get("n_trials") or 0) if self.search else 0
        started = sweep.Launched(max(len(self.jobs), trials), sweep.differing(typed))
        started.write(self.folder)
        self._check_hub(started, typed)

    def _check_hub(self, started: sweep.Launched, typed: Sequence[dict[str, str]]) -> None:
        """AceError where jobs would write over each other's repository, or a search would upload all its trials."""
        names = {n: own for n, job in enumerate(typed) if (own := started.on_hub(job.get("push_to_hub"), n, job))}
        if names and self.search:
            raise AceError("push_to_hub would upload every trial of the search", "Leave it out, and push the best one.")
        twice = [name for name, count in Counter(names.values()).items() if count > 1]
        if twice:
            raise AceError(f"push_to_hub: two jobs would be called {twice[0]}", "Give push_to_hub=USER/A,USER/B,...")

    def gathered(self) -> Sweep | None:
        """What became of them; None where there are none."""
        return gather(self.folder, self.jobs) if self.folder is not None else None


class _Watched(Launcher):
    """Launches as ``launcher`` does; what breaks that one makes failed jobs, and does not end the sweep."""

    def __init__(self, launcher: Launcher, launched: Launched, config: DictConfig) -> None:
        self._launcher, self._launched, self._config = launcher, launched, config

    def setup(self, **kwargs: Any) -> None:
        self._launcher.setup(**kwargs)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        self._launched.begin(self._config, job_overrides, initial_job_idx)
        try:
            return self._launcher.launch(job_overrides, initial_job_idx)
        except CONFIGURATION_ERRORS:
            raise
        except Exception as fault:  # each launcher has errors of its own for a job that was killed
            print(f"ace-prune: The launcher stopped: {type(fault).__name__}: {first_line(fault)}", file=sys.stderr)
            _wait_for_queued()
        return [_returned(value) for value in self._perplexities(initial_job_idx, len(job_overrides))]

    def _perplexities(self, first: int, count: int) -> list[float | None]:
        done = self._launched.gathered()
        found = {job["job"]: job.get("perplexity") for job in done.jobs} if done else {}
        return [found.get(number) for number in range(first, first + count)]


def _wait_for_queued() -> None:
    """submitit gives up at the first job that was killed, while others are still in the queue or run."""
    if (submitit := sys.modules.get("submitit")) is None:
        return
    for queued in [each for each in gc.get_objects() if isinstance(each, submitit.Job)]:
        queued.wait()


def _returned(value: float | None) -> JobReturn:
    returned = JobReturn(status=JobStatus.COMPLETED)
    returned.return_value = value
    return returned
