"""A model run block by block from its files.

The model is built without weights; its *stem* (everything outside the decoder blocks) and one block at a time are
filled from the files. The model's own code makes the inputs of every block and turns the last block's output into
logits, so no family needs code of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ace_cli.core.errors import AceError, first_line
from ace_cli.core.memory import Trimmer, off_the_heap
from ace_cli.core.torch_api import lacks_memory, own_buffers, own_parameters
from ace_cli.model.auto import LargeOnMeta, auto_class, decoder_of, other_models
from ace_cli.model.completeness import check_complete
from ace_cli.model.configuration import check_config, not_understood, transformers_config
from ace_cli.model.experts import Experts
from ace_cli.model.files import Checkpoint
from ace_cli.model.loading import shape
from ace_cli.model.mapping import Conversion, Mapping
from ace_cli.model.slots import Left, Part, Slot, SlotFilter, View, find_slots
from ace_cli.model.ties import resolved, same_values
from ace_cli.model.transformers_api import block_classes, kept_in_float32, tied_weights

#: Tokens that go through a block at once: at most BATCH_TOKENS, and so many that four activations of a block's widest
#: weight take BATCH_BYTES in float32, but 2,048 (the usual 128 x 16) in any case. Constants, so that results do not
#: depend on the memory at hand.
BATCH_TOKENS = 16384
BATCH_BYTES = 512 << 20
#: More tokens leave the caches of a CPU and make it ask for fresh pages: with 16,384, SmolLM2 took three times as long.
CPU_TOKENS = 1024

#: Where the decoder blocks are, of classes whose annotations do not tell: class of the model -> path of the list.
BLOCKS = {"BioGptForCausalLM": "biogpt.layers"}


@dataclass
class Block:
    """A decoder block. ``parts``: parameter name inside the block -> the tensors of the files that make it.

    ``slots`` are pruned, ``left`` is not (name in the files -> why); ``experts`` are the layers whose slots no module
    shows.
    """

    name: str
    module: nn.Module
    parts: dict[str, list[Part]]
    conversions: list[Conversion] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    left: dict[str, Left] = field(default_factory=dict)
    experts: list[Experts] = field(default_factory=list)

    @property
    def files(self) -> list[str]:
        """The block's tensors in the files, each once."""
        plain = [part.key for parts in self.parts.values() for part in parts]
        return list(dict.fromkeys([*plain, *(key for made in self.conversions for key in made.keys)]))

    def watching(self, names: Container[str]) -> Block:
        """The same block, of whose weights only those of these names are slots."""
        experts = [replace(each, slots=[slot for slot in each.slots if slot.name in names]) for each in self.experts]
        slots = [slot for slot in self.slots if slot.name in names]
        return replace(self, slots=slots, experts=[each for each in experts if each.slots])

    @property
    def layers(self) -> list[Slot]:
        """The slots whose module is called with their input."""
        return [slot for slot in self.slots if slot.in_module.index is None]


@dataclass
class Call:
    """How the model calls one block, but for the hidden states (argument 0 or ``hidden_states``)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Batch:
    """Token windows (B, L) with the hidden states (B, L, H) that go into the next block and every block's call."""

    ids_BL: Tensor
    hidden_BLH: Tensor
    calls: list[Call]


class StreamedModel:
    """A checkpoint whose blocks are run one at a time on ``device`` in ``dtype``.

    Raises AceError when the class is unknown or its blocks cannot be found; ``faults`` tells of missing weights.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, selection: SlotFilter | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self.skeleton = _build_skeleton(checkpoint)
        self._mapping = Mapping(self.skeleton, checkpoint)
        self._in_float32 = _kept_in_float32(checkpoint, self.skeleton, dtype)
        #: Towers for images and the like, by path: neither run nor pruned.
        self.others = other_models(self.skeleton)
        self.blocks = self._find_blocks(selection or SlotFilter())
        inside = (*(f"{block.name}." for block in self.blocks), *(f"{path}." for path in self.others))
        inner = {id(made) for block in self.blocks for made in block.conversions}
        self._stem_conversions = [made for made in self._mapping.conversions("") if id(made) not in inner]
        self._stem = [name for name in self._state() if not name.startswith(inside)]
        self._returned = 0  # values in the tuple that a block returns; 0 if it returns the hidden states alone
        #: Parameters that share the tensor of another: name -> the other's.
        self.tied = resolved(tied_weights(self.skeleton), self._mapping, self._alike)
        _move_buffers(self.skeleton, device)

    @property
    def unused(self) -> list[str]:
        """Tensors of the files that make no parameter of the model."""
        return self._mapping.unused

    @property
    def batch_tokens(self) -> int:
        """Tokens that go through a block at once."""
        widest = max((max(slot.shape) for slot in self.blocks[0].slots), default=1)
        return min(BATCH_TOKENS, max(2048, BATCH_BYTES // (16 * widest)))

    def reading(self, checkpoint: Checkpoint) -> StreamedModel:
        """The same model with its weights read from another checkpoint of the same names."""
        other = copy.copy(self)
        other.checkpoint = checkpoint
        return other

    def watching(self, names: Container[str]) -> StreamedModel:
        """The same model, of whose weights only those of these names are slots."""
        other = copy.copy(self)
        other.blocks = [block.watching(names) for block in self.blocks]
        return other

    def beside(self, index: int) -> StreamedModel:
        """The same model with a copy of loaded block ``index``, which stays as it is whatever becomes of this one."""
        other, block = copy.copy(self), self.blocks[index]
        module = copy.deepcopy(block.module)
        paths = {inner: path for path, inner in block.module.named_modules()}
        slots = [replace(slot, module=module.get_submodule(paths[slot.module])) for slot in block.slots]
        other.blocks = [*self.blocks]
        other.blocks[index] = replace(block, module=module, slots=slots, experts=[])
        return other

    @property
    def plain_tokens(self) -> int:
        """Tokens that go through a block at once where nobody observes them together: few, on a CPU."""
        return CPU_TOKENS if self.device.type == "cpu" else self.batch_tokens

    def windows_at_once(self, length: int, tokens: int | None = None) -> int:
        """How many windows of so many tokens make a batch of about ``tokens``, ``batch_tokens`` if not said."""
        return max(1, (tokens or self.batch_tokens) // length)

    def batches(self, windows_NL: Tensor, again: int = 0, tokens: int | None = None) -> Iterator[Batch]:
        """Split windows (N, L) into batches, embed them and capture how each block is called.

        A batch is of about ``tokens`` tokens, ``batch_tokens`` if not said; the first ``again`` windows come once more,
        as a last batch of their own.
        """
        pieces = torch.split(windows_NL, self.windows_at_once(windows_NL.shape[1], tokens))
        return self.embedded((*pieces, windows_NL[:again]) if again else pieces)

    def embedded(self, batches: Iterable[Tensor]) -> Iterator[Batch]:
        """Batches of any shapes, each token ids (B, L), ready for block 0."""
        first: Batch | None = None
        with self._stem_loaded(head=False):
            for ids_BL in batches:
                batch = self._capture(ids_BL.to(self.device))
                if first is not None and first.ids_BL.shape == ids_BL.shape:
                    batch.calls = [_share(call, old) for call, old in zip(batch.calls, first.calls, strict=True)]
                first = first or batch
                yield batch

    def read(self, block: Block) -> dict[str, Tensor]:
        """The block's tensors by their names in the files, as stored, on the CPU. May run on another thread.

        For a CUDA device in pinned memory, from where copies do not wait.
        """
        tensors = {key: self.checkpoint.read(key) for key in block.files}
        if self.device.type == "cuda":
            tensors = {key: tensor.pin_memory() for key, tensor in tensors.items()}
        return tensors

    @contextmanager
    def loaded(self, block: Block, tensors: dict[str, Tensor] | None = None) -> Iterator[None]:
        """The block's weights are in memory inside this context; ``tensors`` is what ``read`` gave, if it was called.

        Empties ``tensors``: weights converted to the compute dtype are not kept twice.
        """
        tensors = tensors if tensors is not None else self.read(block)
        for name, parts in block.parts.items():
            self._fill(f"{block.name}.{name}", parts, tensors)
        self._convert(block.conversions, tensors)
        try:
            yield
        finally:
            _empty(block.module, block.module.state_dict())

    def forward(self, index: int, batch: Batch) -> Tensor:
        """Run loaded block ``index`` on the batch: hidden states (B, L, H) out. With gradients, unless they are off."""
        call = batch.calls[index]
        if call.args:
            out = self.blocks[index].module(batch.hidden_BLH, *call.args[1:], **call.kwargs)
        else:
            out = self.blocks[index].module(**{**call.kwargs, "hidden_states": batch.hidden_BLH})
        self._returned = len(out) if isinstance(out, tuple) else 0
        hidden_BLH: Tensor = out[0] if isinstance(out, tuple) else out
        return hidden_BLH

    def advance(self, index: int, batches: Iterable[Batch]) -> None:
        """Replace the hidden states of ``batches`` by the outputs of loaded block ``index``."""
        for batch in batches:
            batch.hidden_BLH = self.forward(index, batch)

    def one_by_one(self, blocks: int | None = None) -> Iterator[int]:
        """The numbers of the first ``blocks`` blocks, all if not said; each is loaded until the next one is asked for.

        Meanwhile the next block is read, on a thread of its own: two blocks are in memory.
        """
        wanted = self.blocks[:blocks]
        with ThreadPoolExecutor(1) as reader:
            ahead = [reader.submit(self.read, block) for block in wanted[:1]]
            for index, block in enumerate(wanted):
                tensors = ahead.pop().result()
                ahead += [reader.submit(self.read, following) for following in wanted[index + 1 : index + 2]]
                with self.loaded(block, tensors):
                    del tensors
                    yield index

    def run(self, batches: list[Batch], on_block: Callable[[int], None] = lambda _: None) -> None:
        """Take ``batches`` through all blocks, each read once; ``on_block`` is called with the index of each."""
        trimmer = Trimmer()
        with torch.inference_mode():
            for index in self.one_by_one():
                self.advance(index, batches)
                trimmer()
                on_block(index)

    @contextmanager
    def head_loaded(self) -> Iterator[None]:
        """``logits`` may be called inside this context."""
        with self._stem_loaded(head=True):
            yield

    def logits(self, ids_BL: Tensor, hidden_BLH: Tensor) -> Tensor:
        """The model's own tail: hidden states after the last block (B, L, H) -> logits (B, L, V)."""
        last = len(self.blocks) - 1

        def replace(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            return hidden_BLH if index == last else _hidden(args, kwargs)

        with self._blocks_replaced(replace, self._returned), torch.inference_mode():
            logits: Tensor = self.skeleton(input_ids=ids_BL.to(self.device), use_cache=False).logits
        return logits

    def whole(self, without: Collection[str] = ()) -> Any:
        """The model itself with all its weights in memory; parameters named in ``without`` stay on the meta device."""
        for name in self._state():
            if name not in self.tied and name not in without and (parts := self._mapping.parts(name)):
                self._fill(name, parts, {part.key: self.checkpoint.read(part.key) for part in parts})
        for conversion in self._mapping.conversions(""):
            self._convert([conversion], {key: self.checkpoint.read(key) for key in conversion.keys})
        for name, source in self.tied.items():
            _assign(self.skeleton, name, self._state()[source])
        return self.skeleton

    def stored_as(self, name: str) -> str | None:
        """The file tensor that is the parameter ``name``, as it stands; None where it is put together."""
        parts = self._mapping.parts(name)
        return parts[0].key if len(parts) == 1 and parts[0].place == View() else None

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding: token ids are smaller."""
        rows: int = self.skeleton.get_input_embeddings().weight.shape[0]
        return rows

    def check_complete(self) -> None:
        """AceError if the files do not hold what the model needs."""
        missing = [name for name in self._state() if name not in self._mapping and name not in self.tied]
        blocks = [block.name for block in self.blocks]
        check_complete(self.checkpoint, self.skeleton, self._mapping, missing, blocks)

    # --- finding the parts -------------------------------------------------------------------------------------

    def _alike(self, one: str, other: str) -> bool:
        """Whether two tied parameters that are both stored are one; those put together from parts are as declared."""
        keys = [self._mapping.keys(name) for name in (one, other)]
        if any(len(found) != 1 for found in keys):
            return True
        return same_values(self.checkpoint, keys[0][0], keys[1][0], self.dtype_of(other))

    def _state(self) -> dict[str, Tensor]:
        return dict(self.skeleton.state_dict(keep_vars=True))

    def _find_blocks(self, selection: SlotFilter) -> list[Block]:
        kind, names = type(self.skeleton).__name__, block_classes(self.skeleton)
        outside = tuple(f"{path}." for path in self.others)
        lists = [
            (name, module)
            for name, module in self.skeleton.named_modules()
            if isinstance(module, nn.ModuleList)
            and not name.startswith(outside)
            and (_all_in(module, names) if kind not in BLOCKS else name == BLOCKS[kind])
        ]
        if len(lists) != 1:
            raise AceError(
                f"{kind}: expected one list of decoder blocks of class {', '.join(sorted(names)) or '(none named)'}, "
                f"found {', '.join(name for name, _ in lists) or 'none'}.",
                f"Give {kind} a row in BLOCKS of ace_cli/model/streamed.py. Lists in it: {_lists(self.skeleton)}.",
            )
        list_name, modules = lists[0]
        blocks = [self._block(f"{list_name}.{index}", module, selection) for index, module in enumerate(modules)]
        selection.check(name for block in blocks for name in (*(slot.name for slot in block.slots), *block.left))
        return blocks

    def _block(self, name: str, module: nn.Module, selection: SlotFilter) -> Block:
        parts = {inner: stored for inner in module.state_dict() if (stored := self._mapping.parts(f"{name}.{inner}"))}
        found = find_slots(module, parts, selection)
        stacked = [slot for slot in found.slots if slot.in_module.index is not None]
        experts = [
            Experts(holder, [slot for slot in stacked if slot.module is holder])
            for holder in dict.fromkeys(slot.module for slot in stacked)
        ]
        return Block(name, module, parts, self._mapping.conversions(f"{name}."), found.slots, found.left, experts)

    # --- filling and emptying ----------------------------------------------------------------------------------

    def _fill(self, name: str, parts: list[Part], tensors: dict[str, Tensor]) -> None:
        """Put a parameter together; empties ``tensors`` of what it takes."""
        if parts[0].place == View():
            _assign(self.skeleton, name, self._cast(name, tensors.pop(parts[0].key)))
            return
        shape = self.skeleton.get_parameter(name).shape
        whole = torch.empty(shape, dtype=self.dtype_of(name), device=self.device)
        for part in parts:
            part.place(whole).copy_(tensors.pop(part.key), non_blocking=True)
        _assign(self.skeleton, name, whole)

    def _convert(self, conversions: list[Conversion], tensors: dict[str, Tensor]) -> None:
        for conversion in conversions:
            for name, tensor in conversion.run(self.skeleton, tensors).items():
                _assign(self.skeleton, name, self._cast(name, tensor))

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self.device, non_blocking=True)
        return tensor.to(self.dtype_of(name)) if tensor.is_floating_point() else tensor

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that a parameter is computed in."""
        return torch.float32 if self._in_float32(name) else self.dtype

    @contextmanager
    def _stem_loaded(self, head: bool) -> Iterator[None]:
        """Embeddings, norms and, if asked for, the head; tied weights share one tensor."""
        output = self.skeleton.get_output_embeddings()
        skipped = {f"{name}." for name, module in self.skeleton.named_modules() if module is output and not head}
        wanted = [name for name in self._stem if not name.startswith(tuple(skipped))]
        names = list(dict.fromkeys([*wanted, *(self.tied[name] for name in wanted if name in self.tied)]))
        for name in names:
            if name in self._mapping and name not in self.tied:
                parts = self._mapping.parts(name)
                if parts:
                    self._fill(name, parts, {part.key: self.checkpoint.read(part.key) for part in parts})
        for conversion in self._stem_conversions:
            self._convert([conversion], {key: self.checkpoint.read(key) for key in conversion.keys})
        state = self._state()
        for name in names:
            if name in self.tied:
                _assign(self.skeleton, name, state[self.tied[name]])
        try:
            yield
        finally:
            _empty(self.skeleton, names)

    # --- using the model's own code around the blocks -------------------------------------------------------------

    def _capture(self, ids_BL: Tensor) -> Batch:
        """Run the model with every block replaced by a recorder: no block is computed.

        How many values a block returns is found by trying. Raises AceError where that is not all that blocks tell the
        model, or each other: then what one block is given depends on another, and it cannot be run by itself.
        """
        kind, why = type(self.skeleton).__name__, ""
        for returned in dict.fromkeys((self._returned, 0, 3, 2)):
            try:
                batch = self._recorded(ids_BL, returned)
            except _NotAlone as fault:
                raise AceError(f"{kind} cannot be run block by block: {fault}.", "Choose another model.") from None
            except Exception as fault:  # whatever the model's code makes of a value too many or too few
                if lacks_memory(fault):
                    raise
                why = why or first_line(fault)
                continue
            self._returned = returned
            return batch
        raise AceError(f"{kind} cannot be run block by block: {why}.", "Choose another model.")

    def _recorded(self, ids_BL: Tensor, returned: int) -> Batch:
        calls: list[Call] = []
        hidden: list[Tensor] = []  # what went into each block, and so came out of it

        def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            hidden_BLH = _hidden(args, kwargs)
            if hidden_BLH.dim() != 3:
                raise ValueError(f"the hidden states of block {index} have {hidden_BLH.dim()} axes")
            if index != len(calls):
                raise _NotAlone(f"block {index} runs as number {len(calls)}")
            if hidden and hidden_BLH is not hidden[-1] and not torch.equal(hidden_BLH, hidden[-1]):
                raise _NotAlone(f"the model computes between blocks {index - 1} and {index}")
            if any(isinstance(value, _Beside) for value in (*args, *kwargs.values())):
                raise _NotAlone(f"block {index} reads more of the one before than hidden states")
            hidden.append(hidden_BLH)
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            calls.append(Call((None, *args[1:]) if args else (), rest))
            return hidden_BLH

        with self._blocks_replaced(record, returned), torch.no_grad():  # not in inference mode: blocks may be trained
            decoder_of(self.skeleton)(input_ids=ids_BL, use_cache=False)
        if len(calls) != len(self.blocks):
            raise _NotAlone(f"{len(calls)} of its {len(self.blocks)} blocks run")
        return Batch(ids_BL, hidden[0], calls)

    @contextmanager
    def _blocks_replaced(self, function: Any, returned: int) -> Iterator[None]:
        def stand_in(index: int) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                out = function(index, args, kwargs)
                return (out, *(_Beside() for _ in range(returned - 1))) if returned else out

            return forward

        for index, block in enumerate(self.blocks):
            block.module.forward = stand_in(index)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.module.forward


class _Beside:
    """Stands for what a block returns after the hidden states."""


class _NotAlone(Exception):
    """A block cannot be run by itself."""


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _build_skeleton(checkpoint: Checkpoint) -> Any:
    """The model without weights; its buffers (rotary tables, embedding scales) are computed for real."""
    if method := _quantisation(checkpoint):
        raise AceError(f"{checkpoint.folder} is quantised ({method}).", "Prune the 16-bit original, then quantise.")
    check_config(checkpoint.folder, checkpoint.tensors)
    # in float32, or tables of positions lose their digits
    return skeleton_of(checkpoint).eval()


def skeleton_of(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Any:
    """The model that transformers builds from the folder's config.json for ``dtype``, its parameters on meta.

    Layers of widths of their own get them. Raises AceError for a configuration that its class cannot follow.
    """
    from accelerate import init_empty_weights

    config = transformers_config(checkpoint.folder)
    try:
        with off_the_heap(), init_empty_weights(include_buffers=False), LargeOnMeta(len(checkpoint.tensors)):
            model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
            shape(model, config)
            return model
    except Exception as fault:  # a damaged config.json fails in as many ways as there are model classes
        raise not_understood(checkpoint.folder, fault) from fault


def _kept_in_float32(checkpoint: Checkpoint, skeleton: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """Which parameters and stored buffers are in float32 when transformers loads the model in ``dtype``.

    Those that the class names (routers, say), and those that it makes so whatever is asked for.
    """
    if dtype == torch.float32:
        return lambda _: False
    named = kept_in_float32(skeleton, dtype)
    with torch.device("meta"):  # a second model, but of names alone: the first one was made in float32
        made = {
            name for name, value in skeleton_of(checkpoint, dtype).state_dict().items() if value.dtype == torch.float32
        }
    return lambda name: name in made or named(name)


def _quantisation(checkpoint: Checkpoint) -> str | None:
    """How the weights are quantised, by what the configuration says or the tensors are called."""
    config = checkpoint.config()
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            if isinstance(entry := part.get(key), dict):
                return str(entry.get("quant_method", "unknown method"))
    packed = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax", ".SCB", "_blocks")
    return next((f"it holds {name}" for name in checkpoint.tensors if name.endswith(packed)), None)


def _all_in(modules: nn.ModuleList, names: set[str]) -> bool:
    return len(modules) > 0 and {type(module).__name__ for module in modules} <= names


def _lists(skeleton: nn.Module) -> str:
    found = [
        f"{name} of {len(module)} {type(module[0]).__name__}"
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    return ", ".join(found[:4]) or "none"


def _move_buffers(root: nn.Module, device: torch.device) -> None:
    for module in root.modules():
        buffers = own_buffers(module)
        for name, buffer in buffers.items():
            if buffer is not None and not buffer.is_meta:
                buffers[name] = buffer.to(device)


def _assign(root: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = root.get_submodule(path)
    if leaf in own_buffers(module):
        own_buffers(module)[leaf] = tensor
    else:
        own_parameters(module)[leaf] = nn.Parameter(tensor, requires_grad=False)


def _empty(root: nn.Module, names: Any) -> None:
    state = dict(root.state_dict(keep_vars=True))
    for name in names:
        _assign(root, name, torch.empty_like(state[name], device="meta"))


def _share(call: Call, old: Call) -> Call:
    """``call`` with the tensors that equal ``old``'s replaced by them: masks and rotary tables are kept once."""
    kwargs = {name: _shared(value, old.kwargs[name]) for name, value in call.kwargs.items()}
    return Call(tuple(_shared(new, old_) for new, old_ in zip(call.args, old.args, strict=True)), kwargs)


def _shared(new: Any, old: Any) -> Any:
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        return old if new.shape == old.shape and torch.equal(new, old) else new
    if isinstance(new, tuple) and isinstance(old, tuple) and len(new) == len(old):
        return tuple(_shared(a, b) for a, b in zip(new, old, strict=True))
    return new
