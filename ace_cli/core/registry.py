"""Names on the command line -> classes. A choice is one file in its package; nothing else lists it.

Modules found here must not import torch at the top: they are imported for ``--help`` and for every configuration
error, which must answer at once.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

#: Command-line group -> package whose modules, or module that, offers its choices.
PACKAGES = {
    "metric": "ace_cli.methods.metrics",
    "allocation": "ace_cli.methods.allocation",
    "repair": "ace_cli.methods.repair",
    "quantize": "ace_cli.methods.quantize",
    "recover": "ace_cli.recovery",
    "unit": "ace_cli.pruning.units",
    "calib": "ace_cli.data.calibration",
    "eval": "ace_cli.evaluation",
    "tracker": "ace_cli.report.trackers",
}
#: What is found the same way, but is a choice of several groups at once: a text source is one of calib and of eval.
SHARED = {"source": "ace_cli.data.sources"}
_choices: dict[str, dict[str, type]] = {group: {} for group in [*PACKAGES, *SHARED]}
_brought: dict[tuple[str, str], dict[str, str]] = {}


def register(group: str, name: str, **brings: str) -> Callable[[type[T]], type[T]]:
    """Offer a dataclass as ``group=name`` on the command line; its fields become ``group.field=...``.

    ``brings``: choices of other groups that come with it where the user does not say.
    """

    def record(cls: type[T]) -> type[T]:
        if _choices[group].get(name, cls) is not cls:
            raise ValueError(f"{group}={name} is registered twice")
        _choices[group][name] = cls
        _brought[group, name] = brings
        return cls

    return record


def choices(group: str) -> dict[str, type]:
    """All choices of ``group`` by name, after importing every module of its package."""
    _import({**PACKAGES, **SHARED}[group])
    return dict(sorted(_choices[group].items()))


@functools.cache
def _import(name: str) -> None:
    package = importlib.import_module(name)
    for module in pkgutil.iter_modules(getattr(package, "__path__", [])):
        importlib.import_module(f"{name}.{module.name}")


def brought(group: str, name: str) -> dict[str, str]:
    """What a choice brings: other group -> its choice."""
    return _brought[group, name]


def name_of(group: str, choice: object) -> str:
    """The command-line name of an object made from a registered class."""
    return next(name for name, cls in _choices[group].items() if type(choice) is cls)
