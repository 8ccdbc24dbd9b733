"""``ace-prune --help``: every choice and option, by what one wants, with the comments of ``configs/prune.yaml``."""

from __future__ import annotations

import dataclasses
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from ace_cli.core import registry
from ace_cli.core.errors import AceError, did_you_mean
from ace_cli.run.config import SETTINGS, config_folder, offered

BRIEFLY = """\
ace-prune makes a language model sparse or smaller, and proves what it did.

  ace-prune model=smollm2 experiment=best sparsity=0.5   a first look, offline
  ace-prune model=FOLDER metric=ace sparsity=2:4         yours, or a hub id
  ace-prune model=FOLDER sparsity=0.5 dry_run=true       what it would need
  ace-prune -m metric=wanda,varp,ace sparsity=0.5,2:4    a table

  ace-prune --help                                       every choice and option
  ace-eval, ace-bench, ace-report, ace-verify            judge, time, compare"""
_END = """\
--help NAME      the choices of a group and their options, as in --help metric
--cfg job        the whole configuration of a command, without running it
--multirun, -m   every combination of values that commas separate
--config-dir D   a folder of your own with experiment/, preset/ and model/
--completion S   completion for bash, zsh or fish: eval "$(...)" (... | source)
--version

Exit codes: 0 done, 1 a job of a sweep failed or a bug, 2 something to mend in
the command, the files or the machine, 3 worse than gate.max_ppl_ratio allows."""
#: Title -> the options below it.
SECTIONS = {
    "Which model": ("model", "device", "dtype", "memory_gb"),
    "A recipe": ("preset", "recipe", "experiment"),
    "What goes": (
        "sparsity", "metric", "unit", "keep", "target_gb", "target_params", "allocation", "scope", "permute",
        "propagate", "include", "exclude", "quantize",
    ),
    "What wins quality back": ("repair", "catch_up", "recover"),
    "Which text": ("calib", "eval"),
    "What is made beside the checkpoint": (
        "pack", "export", "bench", "samples", "html", "observe", "tracker", "push_to_hub",
    ),
    "The run": ("output_dir", "keep_checkpoint", "gate", "dry_run", "split", "workers", "hardware", "verbose"),
}  # fmt: skip
_LINE = re.compile(r"^(?:  - )?(?P<name>\w+): (?P<value>.*?)\s+# (?P<words>.+)$")
_INDENT = 18


def show(names: Sequence[str]) -> str:
    """The help; of the groups ``names`` in full. AceError for what is no group."""
    if names:
        return "\n\n".join(map(_group, names))
    comments = comments_of(config_folder() / "prune.yaml")
    parts = [
        BRIEFLY.partition("\n  ace-prune --help")[0].rstrip(),
        "Options are given as NAME=VALUE; [...] is the default.",
    ]
    for title, options in SECTIONS.items():
        parts.append("\n".join([title, *(line for name in options for line in _option(name, *comments[name]))]))
    return "\n\n".join([*parts, _END])


def comments_of(file: Path) -> dict[str, tuple[str, str]]:
    """Option -> (default, comment), of every line that has one."""
    found = map(_LINE.match, file.read_text(encoding="utf-8").splitlines())
    return {each["name"]: (each["value"].strip('"'), each["words"]) for each in found if each}


def _option(name: str, default: str, words: str) -> Iterator[str]:
    groups = (*registry.PACKAGES, "model", "preset", "recipe", "experiment")
    yield from _wrapped(name, words if name in groups or default == "{}" else f"{words} [{default}]")
    if name in groups:
        names = [f"[{each}]" if each == default else each for each in offered(name)]
        yield from _wrapped("", ", ".join(names))
    elif name in SETTINGS:
        yield from _wrapped("", ", ".join(_options(name, SETTINGS[name])))


def _group(name: str) -> str:
    """Every choice of a group, what it is and what options it has."""
    if name in SETTINGS:
        return "\n".join(_options(name, SETTINGS[name]))
    if name in ("model", "preset", "recipe", "experiment"):
        lines = [line for each in offered(name) for line in _wrapped(f"{name}={each}", _first_comment(name, each))]
        return "\n".join(lines)
    if name not in registry.PACKAGES:
        raise AceError(f"--help {name}: there is no such group", did_you_mean(name, registry.PACKAGES))
    lines = []
    for choice, cls in registry.choices(name).items():
        lines += _wrapped(f"{name}={choice}", " ".join((cls.__doc__ or "").split("\n\n")[0].split()))
        if options := list(_options(name, cls)):
            lines += _wrapped("", ", ".join(options))
    return "\n".join(lines)


def _options(group: str, cls: type) -> Iterator[str]:
    """ "metric.alpha=0.5" of every field."""
    plain = cls()
    for each in dataclasses.fields(cls):
        yield f"{group}.{each.name}={_typed(getattr(plain, each.name))}"


def _typed(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_typed, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _first_comment(group: str, name: str) -> str:
    """What a file of ``configs/`` says of itself at its head."""
    lines = (config_folder() / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    head = [line[2:].strip() for line in lines[:3] if line.startswith("# ") and "@package" not in line]
    return " ".join(head).partition(". ")[0]


def _wrapped(name: str, words: str) -> list[str]:
    width = max(40, min(shutil.get_terminal_size((80, 24)).columns, 110))
    first = f"  {name}".ljust(_INDENT)
    if name and not first.endswith(" "):
        first += " "
    return textwrap.wrap(
        words, width, initial_indent=first, subsequent_indent=" " * _INDENT, break_long_words=False,
        break_on_hyphens=False,
    ) or [first.rstrip()]  # fmt: skip
