"""What the plan says: the choices that differ from the defaults, in the words of the command line, and the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

from ace_cli.core import registry, workers
from ace_cli.methods.patterns import Ratio
from ace_cli.report.markdown import gigabytes
from ace_cli.run.assemble import calibration_line, method_line
from ace_cli.run.config import RunConfig, Schema
from ace_cli.run.machine_limit import Limit
from ace_cli.run.plan import Plan
from ace_cli.run.split import is_split

#: Choices that are always named: what a run is about.
_ALWAYS = ("metric", "calib")
#: Choices that are plain where nothing is said.
_PLAIN = {"unit": "weight", "allocation": "uniform", "repair": "none", "recover": "none", "tracker": "none"}
#: Options of the whole that change the result.
_OPTIONS = ("keep", "propagate", "permute", "catch_up", "include", "exclude", "split", "device", "dtype")


def chosen(config: RunConfig) -> str:
    """The model, and what is asked for, as one would type it: options at their defaults are left out."""
    words = [Path(config.model.name).name, f"sparsity={config.pattern}" if config.keep is None else ""]
    for group in ("unit", "metric", "allocation", "repair", "recover", "calib", "eval", "tracker"):
        choice = getattr(config, group)
        name, options = registry.name_of(group, choice), _changed(choice)
        if group == "calib" and not config.needs_data:
            continue
        if group in _ALWAYS or options or name != _PLAIN.get(group):
            words += [f"{group}={name}", *(f"{group}.{option}={_short(value)}" for option, value in options)]
    defaults = Schema()
    if isinstance(config.pattern, Ratio) and config.pattern.scope != config.metric.default_scope:
        words.append(f"scope={config.pattern.scope.value}")
    for name in _OPTIONS:
        value = getattr(config, name)
        if value not in (getattr(defaults, name), ()):
            words.append(f"{name}={_short(value)}")
    words += [stage.name for stage in config.stages]
    return " ".join(word for word in words if word)


def details(config: RunConfig, plan: Plan, limit: Limit, takes: str) -> dict[str, str]:
    """Everything else that is known before work begins; ``takes``: how long pruning will be."""
    device = f", {gigabytes(plan.device_bytes)} on the device" if plan.device_bytes else ""
    rows = {
        "model": plan.architecture,
        "from": plan.model,
        "method": method_line(config),
        "calibration": calibration_line(config) if config.needs_data else "none needed",
        "prunes": f"{plan.pruned_weights / 1e6:,.1f} of {plan.slot_weights / 1e6:,.1f} M weights in "
        f"{len(plan.shapes)} matrices ({plan.coverage:.1%} of the blocks' weights)",
        **({"rounds": plan.rounds} if plan.rounds else {}),
        "computes": f"on {plan.device} in {plan.dtype}",
        "needs": f"{gigabytes(plan.host_bytes)} memory{device}, {gigabytes(plan.disk_bytes)} disk",
        "takes": f"{takes} to prune and write; the limit here is {limit.seconds:,.1f} s",
    }
    if is_split(config, count := config.workers or workers.size()):
        rows["windows"] = (
            f"each of {count} workers has its own, {plan.tokens // config.calib.length} at most: sums, and so bytes, "
            "depend on how many workers there are"
        )
    if plan.cut:
        rows.pop("prunes")
        rows["cuts"] = _cut_line(plan)
    if limit.rates.busy:
        rows["machine"] = f"busy: the same product took up to {limit.rates.spread:.1f} times as long"
    if plan.copied:
        rows["copies"] = "; ".join(plan.copied)
    if plan.spills(plan.tokens):
        rows["keeps"] = f"hidden states on disk, to stay within {gigabytes(plan.budget_bytes)} of memory"
    if plan.left_dense:
        rows["stays dense"] = ", ".join(plan.left_dense)
    return rows


def _changed(choice: Any) -> Iterable[tuple[str, Any]]:
    """The options of a choice that are not as they would be if nobody said anything."""
    plain = type(choice)()
    return [
        (each.name, value)
        for each in dataclasses.fields(choice)
        if (value := getattr(choice, each.name)) != getattr(plain, each.name)
    ]


def _short(value: Any) -> str:
    """As typed; of a path the last part."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_short, value))}]" if len(value) != 1 else _short(value[0])
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    text = str(value)
    return Path(text).name if "/" in text else text


def _cut_line(plan: Plan) -> str:
    before, after, share = plan.parameters, plan.parameters_left, 1 - plan.parameters_left / plan.parameters
    return (
        f"{plan.cut}: {before / 1e6:,.1f} -> {after / 1e6:,.1f} M parameters ({share:.1%} fewer), "
        f"{gigabytes(plan.bytes_source)} -> {gigabytes(plan.bytes_left)}"
        + (f"; text is written about {plan.bytes_source / plan.bytes_left:.2f}x as fast" if plan.speeds else "")
    )
