"""What makes hundreds of small runs quick, in tests and in the programs that they start: in place once it is imported.

No pytest here: the server that forks programs holds it, with all that a run would import or read first.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401
import xxhash
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

import ace_cli.cli.prune
import ace_cli.run.pipeline  # noqa: F401
from ace_cli.data.generation import sample_windows
from ace_cli.data.sources import self_written
from ace_cli.model.files import Checkpoint
from ace_cli.run import machine_limit as limit
from ace_cli.run.config import store_schemas

with suppress(ImportError):
    import numba  # noqa: F401

store_schemas()


def once(measure: Callable[..., float]) -> Callable[..., float]:
    """Rates are needed, not exact ones: what was measured first stays so for all tests of this process."""
    found: list[float] = []

    @functools.wraps(measure)
    def remembered(*arguments: Any) -> float:
        if not found:
            found.append(measure(*arguments))
        return found[0]

    return remembered


limit._PROBE_SECONDS, limit._PIECE = 0.005, 1 << 20
for _name in ("_matmul", "_memory", "_fresh", "_prune"):
    setattr(limit, _name, once(getattr(limit, _name)))
# Hydra copies all that it was ever told for each composition, and once more what it reads of it.
ConfigStore.__deepcopy__ = lambda store, memo: store  # type: ignore[attr-defined]


def remembered(compose: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    """Hydra composes a sweep of two jobs six times, a tenth of a second each: what it was asked before is copied.

    But for files of a test's own, which another one may write anew.
    """
    known: dict[tuple[Any, ...], DictConfig] = {}

    @functools.wraps(compose)
    def again(loader: ConfigLoaderImpl, config_name: str, overrides: list[str], *more: Any, **named: Any) -> DictConfig:
        places = tuple((place.provider, place.path) for place in loader.get_search_path().get_path())
        key = (places, config_name, *overrides, more, *named.items())
        if any("searchpath" in override for override in overrides) or "command-line" in dict(places):
            return compose(loader, config_name, overrides, *more, **named)
        if key not in known:
            known[key] = compose(loader, config_name, overrides, *more, **named)
        if len(known) > 16:  # they are large, and asked for again soon or never
            del known[next(iter(known))]
        found = copy.deepcopy(known[key])
        found.hydra.runtime.cwd = str(Path.cwd())
        return found

    return again


ConfigLoaderImpl._load_configuration_impl = remembered(ConfigLoaderImpl._load_configuration_impl)


def sampled(checkpoint: Checkpoint, *asked: Any) -> torch.Tensor:
    """What a model writes, for windows of ``calib=self``: once for the same files and the same wish."""
    files = [checkpoint.folder / "config.json", *sorted({entry.file for entry in checkpoint.tensors.values()})]
    key = (*(xxhash.xxh3_128_digest(file.read_bytes()) for file in files), checkpoint.adapter, *asked[:5])
    if key not in _sampled:
        _sampled[key] = sample_windows(checkpoint, *asked)
    return _sampled[key].clone()


_sampled: dict[tuple[Any, ...], torch.Tensor] = {}
self_written.sample_windows = sampled
