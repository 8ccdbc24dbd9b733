"""Which sparsity, width or number of bits meets a target of size: found before anything is planned.

The size of every choice is counted from shapes, headers of files included, and only of those that halving the range
asks for.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

from ace_cli.core import registry
from ace_cli.core.errors import AceError
from ace_cli.export.factors import factored_entries
from ace_cli.export.packed import packed_file_bytes
from ace_cli.export.quantised import Quantised, stored_entries
from ace_cli.kernels.bitmask import ROOM
from ace_cli.methods.patterns import Ratio
from ace_cli.model.files import file_bytes
from ace_cli.model.header import DTYPES, TensorEntry
from ace_cli.model.slots import Slot
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.cutting import Cutting
from ace_cli.run.config import RunConfig
from ace_cli.run.low_rank import ranks_of
from ace_cli.run.quantised import check_grid, slots_of
from ace_cli.run.slice import slicer_of
from ace_cli.run.target import Target

#: Sparsities of weights and of products are tried in steps of a thousandth.
_STEPS = 1000


@dataclass(frozen=True)
class Way:
    """A choice: in ``words`` of the command line, the ``config`` that makes it, its ``size`` in what is targeted.

    ``exists``: whether the model's configuration can say it.
    """

    words: str
    config: RunConfig
    size: Callable[[], int]
    exists: Callable[[], bool] = lambda: True


def met(config: RunConfig, model: StreamedModel) -> RunConfig:
    """The configuration with the choice that loses least of those that meet its target; as it is without one.

    Raises AceError with the range that can be reached where none does.
    """
    target = config.target
    if target is None:
        return config
    ways = list(_ways(config, model, target))
    found = bisect_left(ways, -target.size, key=lambda way: -way.size())
    best = next((way for way in ways[found:] if way.exists()), None)
    dense = model.checkpoint.file_bytes if target.in_bytes else _parameters(model.checkpoint.tensors.values())
    if best is None or target.size >= dense:
        raise AceError(
            f"{target.asked} cannot be met: the model has {_said(target, dense)}, {_reach(ways, target)}.",
            "Choose a target in this range, or another unit, pack or quantize.",
        )
    return dataclasses.replace(best.config, target=dataclasses.replace(target, way=best.words, planned=best.size()))


def told(target: Target) -> str:
    """For the plan: "target_gb=0.4 is met by sparsity=0.62: 0.399 GB in packed/"."""
    return f"{target.asked} is met by {target.way}: {_said(target, target.planned)} in {target.form}/"


def _reach(ways: list[Way], target: Target) -> str:
    """The least and the most that can be made of it."""
    ends = [next((way for way in some if way.exists()), None) for some in (reversed(ways), ways)]
    least, most = (f"{_said(target, way.size())} ({way.words})" if way else "nothing" for way in ends)
    return f"{target.form}/ can have {least} to {most}"


def _said(target: Target, size: int) -> str:
    return f"{size / 1e9:.4g} GB" if target.in_bytes else f"{size / 1e6:,.4g} M parameters"


# --- the choices of each family, from the largest result to the smallest ---------------------------------------------


def _ways(config: RunConfig, model: StreamedModel, target: Target) -> Iterable[Way]:
    if config.unit.cuts:
        return _cuts(config, model, target)
    if config.unit.slices:
        return _slices(config, model, target)
    if config.unit.ranks:
        return _ranks(config, model, target)
    return _bits(config, model) if config.quantize.of_target else _packed(config, model)


def _pruning(config: RunConfig, share: Fraction) -> RunConfig | None:
    """The same at another sparsity; None where the allocation has nothing to move there."""
    assert isinstance(config.pattern, Ratio)
    pattern = dataclasses.replace(config.pattern, p=share)
    return None if config.allocation.refusal(pattern) else dataclasses.replace(config, pattern=pattern)


def _way(config: RunConfig, size: Callable[[], int], **more: Any) -> Way:
    return Way(f"sparsity={config.pattern}", config, size, **more)


def _cuts(config: RunConfig, model: StreamedModel, target: Target) -> Iterator[Way]:
    """Every number of units that all blocks can keep."""
    cutting, multiple = config.unit.cutting(model, registry.name_of("unit", config.unit)), config.unit.multiple
    shares = {Fraction(all_ - keep, all_) for all_ in cutting.stay.values() for keep in range(multiple, all_, multiple)}
    for share in sorted(shares):
        try:
            cutting.ask(share, None)
        except AceError:  # blocks of another width would keep none, or all
            continue
        if tried := _pruning(config, share):
            yield _way(
                tried, partial(_cut_size, cutting, share, target), exists=partial(_is_said, cutting, share, config)
            )


def _cut_size(cutting: Cutting, share: Fraction, target: Target) -> int:
    cutting.ask(share, None)
    return _counted(cutting.entries(), target)


def _is_said(cutting: Cutting, share: Fraction, config: RunConfig) -> bool:
    cutting.ask(share, None)
    return config.unit.uneven or cutting.changes() is not None


def _slices(config: RunConfig, model: StreamedModel, target: Target) -> Iterator[Way]:
    """Every width of the residual stream."""
    slicer = slicer_of(dataclasses.replace(config, pattern=Ratio(Fraction(0))), model)

    def size(width: int) -> int:
        slicer.width = width
        return _counted(slicer.entries(), target)

    multiple = config.unit.multiple
    for width in reversed(range(multiple, slicer.hidden, multiple)):
        if tried := _pruning(config, Fraction(slicer.hidden - width, slicer.hidden)):
            yield _way(tried, partial(size, width))


def _ranks(config: RunConfig, model: StreamedModel, target: Target) -> Iterator[Way]:
    slots, tensors = slots_of(model), model.checkpoint.tensors

    def size(pattern: Ratio) -> int:
        ranks = {slot.key: ranks_of(slot.shape, pattern) for slot in slots}
        counted = _counted(factored_entries(tensors, ranks), target)
        if not config.allocation.surveys:
            return counted
        # ranks of their own are rounded down from other numbers, which have the same sum
        kept = {slot.key: _kept(slot, pattern) - ranks[slot.key] * sum(slot.shape) for slot in slots}
        return counted + sum(
            more * (DTYPES[tensors[key].dtype][1] if target.in_bytes else 1) for key, more in kept.items()
        )

    for step in range(1, _STEPS):
        if tried := _pruning(config, Fraction(step, _STEPS)):
            yield _way(tried, partial(size, tried.pattern))  # type: ignore[arg-type]


def _packed(config: RunConfig, model: StreamedModel) -> Iterator[Way]:
    """From the sparsity on at which masks take less than the zeros did."""
    slots, tensors = slots_of(model), model.checkpoint.tensors
    if config.quantize.acts:
        check_grid(config.quantize, model)
    grids = dict.fromkeys((slot.key for slot in slots), config.quantize.grid()) if config.quantize.acts else {}

    def size(pattern: Ratio) -> int:
        nonzeros = {slot.key: tensors[slot.key].numel for slot in slots}
        for slot in slots:
            nonzeros[slot.key] -= pattern.pruned(*slot.shape)
        # shares of their own leave as many values, but for a few, and round the room behind them otherwise
        return packed_file_bytes(tensors, nonzeros, grids) + config.allocation.surveys * len(slots) * ROOM

    for step in range(_STEPS // (8 if grids else 16) + 1, _STEPS):
        if tried := _pruning(config, Fraction(step, _STEPS)):
            yield _way(tried, partial(size, tried.pattern))  # type: ignore[arg-type]


def _bits(config: RunConfig, model: StreamedModel) -> Iterator[Way]:
    options = vars(config.quantize)
    kinds = [kind for kind in registry.choices("quantize").values() if kind.acts and not kind.of_target]  # type: ignore[attr-defined]
    check_grid(config.quantize, model)
    keys = [slot.key for slot in slots_of(model)]
    for quantize in sorted((kind(**options) for kind in kinds), key=lambda each: -each.bits):
        entries = stored_entries(model.checkpoint.tensors, keys, quantize.grid())
        stages = tuple(
            Quantised(quantize.bits, quantize.group) if isinstance(stage, Quantised) else stage
            for stage in config.stages
        )
        words = f"quantize={registry.name_of('quantize', quantize)}"
        yield Way(words, dataclasses.replace(config, quantize=quantize, stages=stages), partial(file_bytes, entries))


def _kept(slot: Slot, pattern: Ratio) -> int:
    rows, columns = slot.shape
    return rows * columns - pattern.pruned(rows, columns)


def _counted(entries: dict[str, TensorEntry], target: Target) -> int:
    return file_bytes(entries) if target.in_bytes else _parameters(entries.values())


def _parameters(entries: Iterable[TensorEntry]) -> int:
    return sum(entry.numel for entry in entries)
