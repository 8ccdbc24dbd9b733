"""Whether two modules are the same but for some numbers: what a changed configuration must not change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def differs(old: nn.Module, new: nn.Module, numbers: Mapping[int, int]) -> str:
    """The first setting in which they differ, ``numbers`` (old -> new) apart; empty if there is none."""
    others = dict(new.named_modules())
    for path, module in old.named_modules():
        other = others.pop(path, None)
        if type(other) is not type(module):
            return path or "class"
        for name, value in vars(module).items():
            mine, its = _plain(value), _plain(vars(other).get(name))
            if mine != its and (type(value) is not int or numbers.get(value) != its):
                return f"{path}.{name}".lstrip(".")
    return "" if not others else next(iter(others))


def _plain(value: Any) -> Any:
    """A value that can be compared; what is no number, word or list of such counts as equal to all of its kind."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(each, (bool, int, float, str)) for each in value):
        return list(value)
    return type(value).__name__
