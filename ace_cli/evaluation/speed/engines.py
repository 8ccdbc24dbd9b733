"""What writes text with a checkpoint: transformers, its packed and its 2:4 form, llama.cpp.

An engine that cannot take a checkpoint, or is not there, says so in one line; whatever is there is measured the same
way: a prompt goes in, tokens come out one by one, greedily.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ace_cli import sparse
from ace_cli.core.errors import AceError, first_line
from ace_cli.kernels.bitmask import why_slow
from ace_cli.model.configuration import transformers_config
from ace_cli.model.files import Checkpoint
from ace_cli.model.loading import class_that_loads
from ace_cli.model.opening import open_folder
from ace_cli.model.packed import is_packed
from ace_cli.model.pruned import MANIFEST, read_manifest
from ace_cli.model.quantised import is_quantised

#: Multiples of (rows, columns) that a 2:4 product of a GPU takes, of its two libraries the larger.
_TILE = (32, 64)


class Writer(Protocol):
    """A loaded model. Token ids are below ``vocabulary``."""

    vocabulary: int

    def write(self, ids: list[int], count: int) -> tuple[float, float]:
        """Write ``count`` tokens after the prompt ``ids``: seconds to the first of them, and from there to the last."""


@dataclass(frozen=True)
class Subject:
    """A checkpoint and the engine that is to write with it."""

    model: str
    engine: str
    file_bytes: int
    load: Callable[[], Writer]


class _Transformers:
    """``generate`` of a transformers model."""

    def __init__(self, model: Any) -> None:
        self._model = model.eval()
        self.vocabulary = int(model.config.get_text_config().vocab_size)

    def write(self, ids: list[int], count: int) -> tuple[float, float]:
        prompt = torch.tensor([ids], device=self._model.device)
        watch = _Watch()
        self._model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, min_new_tokens=count,
            max_new_tokens=count, pad_token_id=0, streamer=watch,
        )  # fmt: skip
        return watch.seconds()


class _Watch:
    """A streamer of transformers: told of the prompt, then of each token once it is on the host."""

    def __init__(self) -> None:
        self._start, self._known = time.perf_counter(), list[float]()

    def put(self, value: Any) -> None:
        """The prompt, or a token."""
        self._known.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to show."""

    def seconds(self) -> tuple[float, float]:
        """To the first token, and from there to the last."""
        _, first, *others = self._known
        return first - self._start, [first, *others][-1] - first


class _LlamaCppPython:
    """llama.cpp by its package llama-cpp-python."""

    def __init__(self, file: Path, context: int) -> None:
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        self._model = Llama(str(file), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)
        self.vocabulary = int(self._model.n_vocab())

    def write(self, ids: list[int], count: int) -> tuple[float, float]:
        self._model.reset()
        start = time.perf_counter()
        tokens = self._model.generate(ids, temp=0.0)
        known = [time.perf_counter() for _ in zip(range(count), tokens, strict=False)]
        return known[0] - start, known[-1] - known[0]


class _Xllamacpp:
    """llama.cpp by its package xllamacpp, which comes built; the times are those that llama.cpp takes itself."""

    def __init__(self, file: Path, context: int) -> None:
        from gguf import GGUFReader
        from xllamacpp import CommonParams, Server

        told = GGUFReader(file)
        if told.fields["tokenizer.ggml.model"].contents() == "none":  # it would end this process
            raise AceError(f"{file} has no tokenizer, without which xllamacpp does not start.", "Leave it out.")
        params = CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(file), context, 1
        params.cpuparams.n_threads, params.verbosity = torch.get_num_threads(), 0
        self._server = Server(params)
        self.vocabulary = next(int(t.shape[-1]) for t in told.tensors if t.name == "token_embd.weight")

    def write(self, ids: list[int], count: int) -> tuple[float, float]:
        asked = {"prompt": ids, "max_tokens": count, "temperature": 0, "top_k": 1, "ignore_eos": True}
        took = self._server.handle_completions({**asked, "cache_prompt": False})["timings"]
        return took["prompt_ms"] / 1e3, took["predicted_ms"] / 1e3 * (count - 1) / took["predicted_n"]


#: Packages that run llama.cpp.
_LLAMA_CPP: dict[str, Callable[[Path, int], Writer]] = {"llama_cpp": _LlamaCppPython, "xllamacpp": _Xllamacpp}


def subjects(name: str, path: Path, device: torch.device, dtype: torch.dtype | None, context: int) -> list[Subject]:
    """Everything here that can write with the checkpoint at ``path``, called ``name``; ``context`` tokens at most.

    Raises AceError for a file that only a missing engine reads.
    """
    if path.suffix == ".gguf":
        if why := no_llama_cpp():
            raise AceError(f"{path}: {why}.", "pip install xllamacpp, or llama-cpp-python")
        return [Subject(name, "llama.cpp", path.stat().st_size, lambda: _llama_cpp(path, context))]
    checkpoint = open_folder(path)
    check_positions(name, path, context)
    dtype = dtype or sparse.stored_dtype(checkpoint)
    size, kind = checkpoint.file_bytes, str(dtype).removeprefix("torch.")
    packed = Subject(name, f"packed, {kind}", size, lambda: _Transformers(sparse.load_with_facts(path, dtype).model))
    if is_packed(path):
        return [packed]
    if is_quantised(path):
        return [Subject(name, f"quantised, {kind}", size, lambda: _Transformers(_plain(path, device, dtype)))]
    found = [Subject(name, f"transformers, {kind}", size, lambda: _Transformers(_plain(path, device, dtype)))]
    pruned = (path / MANIFEST).is_file() and bool(read_manifest(path).slots)  # of units that were cut no zeros are left
    if pruned and device.type == "cpu" and not why_slow(dtype):
        found.append(packed)
    if pruned and not no_semi_structured(device, dtype) and _is_2_of_4(checkpoint):
        found.append(Subject(name, f"2:4, {kind}", size, lambda: _Transformers(_semi_structured(path, device, dtype))))
    return found


def check_positions(name: str, path: Path, context: int) -> None:
    """AceError if the model has fewer positions than ``context``."""
    most = getattr(transformers_config(path).get_text_config(), "max_position_embeddings", None) or context
    if context > most:
        raise AceError(
            f"{name} has {most} positions, {context} were asked for.", "Use a shorter prompt, or write less."
        )


def no_llama_cpp() -> str:
    """Why llama.cpp cannot be had; empty where it can."""
    return "" if any(find_spec(package) for package in _LLAMA_CPP) else "llama.cpp is not installed"


def _llama_cpp(file: Path, context: int) -> Writer:
    engine = next(engine for package, engine in _LLAMA_CPP.items() if find_spec(package))
    try:
        return engine(file, context)
    except AceError:
        raise
    except Exception as fault:  # a damaged file fails in many layers of three libraries
        raise AceError(f"llama.cpp cannot load {file}: {first_line(fault)}.", "Is it a whole file?") from fault


def no_semi_structured(device: torch.device, dtype: torch.dtype) -> str:
    """Why torch has no 2:4 product here; empty where it has."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return "torch multiplies 2:4 weights only on NVIDIA GPUs from the A100 on"
    return "" if dtype in (torch.float16, torch.bfloat16) else "torch multiplies 2:4 weights only in 16 bits"


def _plain(path: Path, device: torch.device, dtype: torch.dtype) -> Any:
    config = transformers_config(path, experts=None)
    loads = class_that_loads(config)
    model = loads.from_pretrained(path, config=config, dtype=dtype, trust_remote_code=False)
    return model.to(device)


def _is_2_of_4(checkpoint: Checkpoint) -> bool:
    """As its manifest says; every weight is looked at again before it is converted."""
    from ace_cli.core.json_reader import read_object

    return read_object(checkpoint.folder / MANIFEST).get("pattern") == "2:4"


def _semi_structured(path: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with every linear layer that holds 2:4 in torch's form for it."""
    from torch.sparse import to_sparse_semi_structured

    model = _plain(path, device, dtype)
    for module in model.modules():
        if type(module) is nn.Linear and holds_2_of_4(module.weight):
            module.weight = nn.Parameter(to_sparse_semi_structured(module.weight.detach()), requires_grad=False)
    return model


def holds_2_of_4(weight_OI: torch.Tensor) -> bool:
    """Whether at most two of every four inputs are there, in a shape that a GPU multiplies so.

    torch converts any matrix, and multiplies by something else where this does not hold.
    """
    rows, columns = weight_OI.shape
    if rows % _TILE[0] or columns % _TILE[1]:
        return False
    return int((weight_OI.view(rows, -1, 4) != 0).sum(dim=-1).max()) <= 2
