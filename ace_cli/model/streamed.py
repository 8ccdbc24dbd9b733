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
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ace_cli.core.memory import Trimmer
from ace_cli.model.auto import other_models
from ace_cli.model.blocks import Block, find_blocks
from ace_cli.model.calls import Batch, BlockCalls, share
from ace_cli.model.completeness import check_complete
from ace_cli.model.files import Checkpoint
from ace_cli.model.mapping import Mapping
from ace_cli.model.skeleton import checked_skeleton, in_float32
from ace_cli.model.slots import SlotFilter, View
from ace_cli.model.weights import Weights, empty

#: Tokens that go through a block at once: at most BATCH_TOKENS, and so many that four activations of a block's widest
#: weight take BATCH_BYTES in float32, but 2,048 (the usual 128 x 16) in any case. Constants, so that results do not
#: depend on the memory at hand.
BATCH_TOKENS = 16384
BATCH_BYTES = 512 << 20
#: More tokens leave the caches of a CPU and make it ask for fresh pages: with 16,384, SmolLM2 took three times as long.
CPU_TOKENS = 1024


class StreamedModel:
    """A checkpoint whose blocks are run one at a time on ``device`` in ``dtype``.

    Raises AceError when the class is unknown or its blocks cannot be found; ``check_complete`` looks for weights.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, selection: SlotFilter | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self.skeleton = checked_skeleton(checkpoint, device)
        self._mapping = Mapping(self.skeleton, checkpoint)
        self._weights = Weights(
            self.skeleton, self._mapping, checkpoint, device, dtype, in_float32(checkpoint, self.skeleton, dtype)
        )
        #: Towers for images and the like, by path: neither run nor pruned.
        self.others = other_models(self.skeleton)
        self.blocks = find_blocks(self.skeleton, self._mapping, self.others, selection or SlotFilter())
        self._calls = BlockCalls(self.skeleton, self.blocks)
        inside = (*(f"{block.name}." for block in self.blocks), *(f"{path}." for path in self.others))
        inner = {id(made) for block in self.blocks for made in block.conversions}
        self._stem_conversions = [made for made in self._mapping.conversions("") if id(made) not in inner]
        self._stem = [name for name in self._weights.state() if not name.startswith(inside)]

    @property
    def unused(self) -> list[str]:
        """Tensors of the files that make no parameter of the model."""
        return self._mapping.unused

    @property
    def tied(self) -> dict[str, str]:
        """Parameters that share the tensor of another: name -> the other's."""
        return self._weights.tied

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that a parameter is computed in."""
        return self._weights.dtype_of(name)

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
                batch = self._calls.capture(ids_BL.to(self.device))
                if first is not None and first.ids_BL.shape == ids_BL.shape:
                    batch.calls = [share(call, old) for call, old in zip(batch.calls, first.calls, strict=True)]
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
            self._weights.fill(f"{block.name}.{name}", parts, tensors)
        self._weights.convert(block.conversions, tensors)
        try:
            yield
        finally:
            empty(block.module, block.module.state_dict())

    def forward(self, index: int, batch: Batch) -> Tensor:
        """Run loaded block ``index`` on the batch: hidden states (B, L, H) out. With gradients, unless they are off."""
        return self._calls.run(index, self.blocks[index], batch)

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
        return self._calls.logits(ids_BL.to(self.device), hidden_BLH)

    def whole(self, without: Collection[str] = ()) -> Any:
        """The model itself with all its weights in memory; parameters named in ``without`` stay on the meta device."""
        tied = self._weights.tied
        names = [name for name in self._weights.state() if name in tied or name not in without]
        self._weights.read(self.checkpoint, names, self._mapping.conversions(""))
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
        missing = [name for name in self._weights.state() if name not in self._mapping and name not in self.tied]
        blocks = [block.name for block in self.blocks]
        check_complete(self.checkpoint, self.skeleton, self._mapping, missing, blocks)

    @contextmanager
    def _stem_loaded(self, head: bool) -> Iterator[None]:
        """Embeddings, norms and, if asked for, the head; tied weights share one tensor."""
        output = self.skeleton.get_output_embeddings()
        skipped = {f"{name}." for name, module in self.skeleton.named_modules() if module is output and not head}
        wanted = [name for name in self._stem if not name.startswith(tuple(skipped))]
        names = list(dict.fromkeys([*wanted, *(self.tied[name] for name in wanted if name in self.tied)]))
        self._weights.read(self.checkpoint, names, self._stem_conversions)
        try:
            yield
        finally:
            empty(self.skeleton, names)
