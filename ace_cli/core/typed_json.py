"""What JSON gave, as the dataclasses it was written from: every type is checked where the value enters."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")


def typed(kind: type[T], value: Any, where: str) -> T:
    """``value`` as an instance of ``kind``; ``where`` names it. Raises ValueError that names the part that is wrong."""
    made: T = _made(kind, value, where)
    return made


def _made(kind: Any, value: Any, where: str) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is types.UnionType:  # X | None
        return None if value is None else _made(inner[0], value, where)
    if origin is list:
        return [_made(inner[0], item, f"{where}[{i}]") for i, item in enumerate(_expect(list, value, where))]
    if origin is tuple:
        items = _expect(list, value, where)
        if len(items) != len(inner):
            raise ValueError(f"{where} has {len(items)} values, not {len(inner)}")
        return tuple(
            _made(part, item, f"{where}[{i}]") for i, (part, item) in enumerate(zip(inner, items, strict=True))
        )
    if origin is dict:
        return {name: _made(inner[1], item, f"{where}.{name}") for name, item in _expect(dict, value, where).items()}
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, _expect(dict, value, where), where)
    if kind is float and type(value) is int:
        return float(value)
    return _expect(kind, value, where)


def _dataclass(kind: Any, found: dict[str, Any], where: str) -> Any:
    hints, fields = typing.get_type_hints(kind), dataclasses.fields(kind)
    needed = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    if lost := [name for name in needed if name not in found]:
        raise ValueError(f"{where} has no {lost[0]}")
    if unknown := [name for name in found if name not in hints]:
        raise ValueError(f"{where} has a {unknown[0]}, which is not known")
    return kind(**{name: _made(hints[name], item, f"{where}.{name}") for name, item in found.items()})


def _expect(kind: Any, value: Any, where: str) -> Any:
    if type(value) is not kind:  # exactly: True is no number
        raise ValueError(f"{where} is of type {type(value).__name__}, not {kind.__name__}")
    return value
