"""The names in the files and the parameters of the module: transformers' own renaming and conversion rules, applied.

Where a rule only stacks and joins (one tensor per expert -> one parameter for all), every file tensor has its place in
the parameter, so that it can be pruned and written back by itself. Any other rule is run as transformers runs it; what
it makes can be computed with but not pruned.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ace_cli.model.files import Checkpoint
from ace_cli.model.slots import Part, View
from ace_cli.model.transformers_api import in_loading_order, only_stacks, rules_of


@dataclass
class Conversion:
    """A rule without places: ``keys`` of the files make the parameters ``names``, the first of which it goes by."""

    rule: Any
    sources: dict[str, list[str]]
    name: str

    @property
    def keys(self) -> list[str]:
        """The file tensors it takes."""
        return [key for keys in self.sources.values() for key in keys]

    def run(self, skeleton: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameter name -> tensor, as transformers' loader makes it; empties ``tensors`` of what it takes."""
        rule = copy.deepcopy(self.rule)
        for pattern, keys in self.sources.items():
            for key in keys:
                rule.add_tensor(self.name, key, pattern, tensors.pop(key))
        made = rule.convert(self.name, model=skeleton, config=skeleton.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class Mapping:
    """Which file tensors make which parameter of ``skeleton``. ``unused``: file tensors that make none."""

    def __init__(self, skeleton: Any, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._parts: dict[str, list[Part]] = {}
        self._made: dict[str, Conversion] = {}
        self.unused: list[str] = []
        state = skeleton.state_dict()
        rules = rules_of(skeleton)
        by_pattern = {pattern: rule for rule in rules.converters for pattern in rule.source_patterns}
        sources: dict[str, dict[str, list[str]]] = {}
        for key in in_loading_order(checkpoint.tensors):
            name, pattern = rules.name_of(key, state)
            if name not in state:
                self.unused.append(key)
            elif pattern is None:
                self._parts[name] = [Part(key)]
            else:
                sources.setdefault(name, {}).setdefault(pattern, []).append(key)
        for name, found in sources.items():
            self._add(name, by_pattern[next(iter(found))], found, skeleton)

    def __contains__(self, name: str) -> bool:
        return name in self._parts or name in self._made

    def parts(self, name: str) -> list[Part]:
        """The file tensors of a parameter, each with its place in it; none if a conversion makes it."""
        return self._parts.get(name, [])

    def keys(self, name: str) -> list[str]:
        """The file tensors that a parameter is made of; none if it has none."""
        made = self._made.get(name)
        return made.keys if made else [part.key for part in self.parts(name)]

    def conversions(self, prefix: str) -> list[Conversion]:
        """The conversions that make parameters whose names begin so, each once."""
        found = {id(made): made for name, made in self._made.items() if name.startswith(prefix)}
        return list(found.values())

    def misfits(self, state: dict[str, Tensor]) -> list[str]:
        """Where what is stored does not fill the parameters, one line each."""
        faults = []
        for name, parts in self._parts.items():
            for part in parts:
                found, wanted = self._checkpoint.tensors[part.key].shape, part.place.shape_in(state[name])
                if found != wanted:
                    faults.append(f"{part.key} is {found} in the file, {wanted} in the model")
            stored = sum(self._checkpoint.tensors[part.key].numel for part in parts)
            if not faults and stored != state[name].numel():
                faults.append(f"{name} has {state[name].numel():,} weights, the files hold {stored:,} of them")
        return faults

    def _add(self, name: str, rule: Any, sources: dict[str, list[str]], skeleton: Any) -> None:
        import torch

        if parts := self._stacked(rule, sources):
            self._parts[name] = parts
            return
        conversion = Conversion(rule, sources, name)
        shapes = {key: self._checkpoint.tensors[key].shape for key in conversion.keys}
        empty = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        self._made |= dict.fromkeys(conversion.run(skeleton, empty), conversion)

    def _stacked(self, rule: Any, sources: dict[str, list[str]]) -> list[Part]:
        """One file tensor per expert, joined along their first axis; none if the rule does anything else."""
        if not only_stacks(rule):
            return []
        parts, start = [], 0
        for pattern in rule.source_patterns:
            keys = sources.get(pattern, [])
            rows = self._checkpoint.tensors[keys[0]].shape[0] if keys else 0
            joined = rows if len(rule.source_patterns) > 1 else None
            parts += [Part(key, View(expert, False, start, joined)) for expert, key in enumerate(keys)]
            start += rows
        return parts
