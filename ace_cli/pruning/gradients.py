"""Leading an error back through a block, or through the whole model, for statistics of gradients.

No gradient of a parameter is asked for: a slot's inputs and the gradient of its outputs are shown to its statistics,
window by window. Shapes: N windows in all, B windows of a batch, L tokens, H hidden size, V vocabulary, O, I of a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from ace_cli.core.errors import AceError
from ace_cli.methods.gradients import Backward, Source
from ace_cli.methods.statistics import Seen, Statistic
from ace_cli.model.calls import Batch
from ace_cli.model.slots import Slot
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.observer import hooked

#: Bytes of the logits of one backward through the whole model, in float32.
LOGITS = 64 << 20


def backward_of(wanted: Iterable[Statistic], source: Source) -> list[Backward]:
    """Those of ``wanted`` that are fed with gradients of this source."""
    found = [cast(Backward, statistic) for statistic in wanted if statistic.needs_backward]
    return [statistic for statistic in found if statistic.source is source]


def gradients_of(
    model: StreamedModel, index: int, batches: list[Batch], wanted: Iterable[Statistic], whole: Mapping[str, Seen]
) -> dict[str, Seen]:
    """Slot of loaded, dense block ``index`` of ``model`` -> its statistics of gradients, of those of ``wanted``.

    ``batches`` hold the block's inputs; ``whole``: what ``model_gradients`` found.
    """
    slots = model.blocks[index].layers
    found = _of_block(model, index, batches, slots, backward_of(wanted, Source.block))
    for slot in slots:
        if slot.name in whole:
            found.setdefault(slot.name, Seen(())).take(whole[slot.name])
    return found


def _of_block(
    model: StreamedModel, index: int, batches: list[Batch], slots: list[Slot], of_block: list[Backward]
) -> dict[str, Seen]:
    if not of_block:
        return {}
    seen = {slot.name: Seen(of_block) for slot in slots}
    generator = torch.Generator().manual_seed(of_block[0].seed + index)
    with torch.enable_grad():
        for batch in batches:
            hidden_BLH = batch.hidden_BLH.detach().requires_grad_(True)
            with hooked(slots, _listener(seen, len(batch.ids_BL)), before=False):
                out_BLH = model.forward(index, replace(batch, hidden_BLH=hidden_BLH))
            sign_BLH = torch.randint(2, out_BLH.shape, generator=generator).mul_(2).sub_(1).to(out_BLH)
            size_BL1 = out_BLH.detach().float().norm(dim=-1, keepdim=True).clamp(min=1e-12)
            torch.autograd.grad(out_BLH, hidden_BLH, sign_BLH / size_BL1.to(out_BLH.dtype))
    return seen


def model_gradients(
    model: StreamedModel,
    windows_NL: Tensor,
    wanted: Iterable[Statistic],
    on_step: Callable[[], object] = lambda: None,
) -> dict[str, Seen]:
    """Slot's name -> what it saw of ``Source.model``: the whole model, dense, is in memory meanwhile.

    ``on_step`` is called after each of ``steps_of`` steps.
    """
    of_model = backward_of(wanted, Source.model)
    names = {slot.name for block in model.blocks for slot in block.layers}
    whole = StreamedModel(model.checkpoint, model.device, model.dtype)
    slots = [slot for block in whole.blocks for slot in block.layers if slot.name in names]
    seen = {slot.name: Seen(of_model) for slot in slots}
    skeleton = whole.whole().eval()
    for parameter in skeleton.parameters():
        parameter.requires_grad_(False)
    start = skeleton.get_input_embeddings().register_forward_hook(lambda _, args, out: out.requires_grad_(True))
    try:
        for ids_BL in torch.split(windows_NL.to(model.device), _windows_at_once(model, windows_NL)):
            with torch.enable_grad(), hooked(slots, _listener(seen, len(ids_BL)), before=False):
                logits_BLV = skeleton(input_ids=ids_BL, use_cache=False).logits[:, :-1].float()
                losses_BL = torch.nn.functional.cross_entropy(
                    logits_BLV.transpose(1, 2), ids_BL[:, 1:], reduction="none"
                )
                losses_BL.mean(1).sum().backward()  # type: ignore[no-untyped-call]
            on_step()
    finally:
        start.remove()
    return seen


def steps_of(model: StreamedModel, windows_NL: Tensor) -> int:
    """How many backwards ``model_gradients`` takes."""
    return -(-len(windows_NL) // _windows_at_once(model, windows_NL))


def model_bytes(model: StreamedModel, wanted: Iterable[Statistic], length: int) -> int:
    """What ``model_gradients`` holds at once for windows of ``length`` tokens: weights, statistics, activations.

    0 where nothing of ``wanted`` is of ``Source.model``.
    """
    of_model = backward_of(wanted, Source.model)
    if not of_model:
        return 0
    width, windows = model.dtype.itemsize, torch.empty(1, length, device="meta")
    tokens = _windows_at_once(model, windows) * length
    weights = sum(entry.numel for entry in model.checkpoint.tensors.values()) * width
    shapes = [slot.shape for block in model.blocks for slot in block.layers]
    held = sum(statistic.nbytes(tokens, *shape) for statistic in of_model for shape in shapes)
    active = sum(2 * tokens * (rows + columns) * width for rows, columns in shapes)
    return weights + held + active + 5 * 4 * tokens * model.vocabulary


def _windows_at_once(model: StreamedModel, windows_NL: Tensor) -> int:
    length = windows_NL.shape[1]
    return max(1, min(model.plain_tokens, LOGITS // (4 * model.vocabulary)) // length)


def _listener(seen: dict[str, Seen], windows: int) -> Callable[[Slot, Tensor, Tensor], None]:
    """A hook: what comes back through a slot's outputs is shown, with its inputs, to its statistics."""

    def listen(slot: Slot, x: Tensor, y: Tensor) -> None:
        x_BLI = _by_window(slot, x.detach(), windows)

        def note(d: Tensor) -> None:
            d_BLO = _by_window(slot, d, windows)
            view = slot.in_module
            if view.rows is not None:
                d_BLO = d_BLO[..., view.start : view.start + view.rows]
            weight_OI = slot.weight_OI.detach()
            with torch.no_grad():
                for x_LI, d_LO in zip(x_BLI, d_BLO, strict=True):
                    for statistic in seen[slot.name]:
                        statistic.update(x_LI, d_LO, weight_OI)

        y.register_hook(note)  # type: ignore[no-untyped-call]

    return listen


def _by_window(slot: Slot, tensor: Tensor, windows: int) -> Tensor:
    """(..., C) of all tokens in order -> (B, L, C)."""
    if (tensor.numel() // tensor.shape[-1]) % windows:
        raise AceError(f"{slot.name} does not see every token.", "Choose a metric that needs no gradients.")
    return tensor.reshape(windows, -1, tensor.shape[-1])
