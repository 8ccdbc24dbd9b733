"""What every training of the whole model shares: its options, the model in memory, the dense states, the result.

Shapes: N windows, B of them at once, L tokens, H hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ace_cli.recovery.base import Recovery
from ace_cli.recovery.training import training_faults, training_forwards

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor

    from ace_cli.core.stage import Progress
    from ace_cli.model.blocks import Block
    from ace_cli.model.files import Checkpoint
    from ace_cli.model.streamed import StreamedModel

#: In the folder of a training: what it needs to go on after an epoch.
STATE = "training"


@dataclass
class WholeModel(Recovery):
    """What a training of the whole model is told.

    ``epochs`` over the windows that train, in steps of ``batch`` tokens, with the learning rate ``lr`` after a tenth of
    the steps, then down a cosine to a tenth of it. ``seed`` orders the steps. A share ``held_out`` of all its windows
    trains nothing: what is kept is the epoch that is best on those.

    ``windows`` of the calibration text, held out or not: those that pruning saw, then the ones that follow. By default
    those that pruning saw are trained on, and the ones held out follow: a model looks better than it is on windows that
    weights were refitted to.

    ``spread``: the model lies on all GPUs of this machine, some blocks on each, so that it need not fit on one.
    """

    epochs: int = 2
    lr: float = 1e-3
    batch: int = 512
    held_out: float = 0.1
    seed: int = 0
    windows: int | None = None
    spread: bool = False

    in_stream = False
    whole = True
    #: Whether the learning rate of each weight is relative to its root mean square.
    relative = False
    #: Bytes that training holds for each byte of a block.
    beside = 0.0

    def faults(self) -> list[str]:
        return training_faults(self.epochs, self.lr, self.batch, self.held_out, self.seed, self.windows)

    @property
    def insists(self) -> bool:
        return self.windows is not None

    def trained_on(self, windows: int) -> tuple[int, int]:
        if self.windows is None:
            return windows, min(windows, math.ceil(windows * self.held_out / (1 - self.held_out)))
        held = min(self.windows - 1, max(1, round(self.windows * self.held_out)))
        return self.windows - held, held

    def trained_numbers(self, trained: int, shapes: Collection[tuple[int, int]]) -> int:
        """Of so many weights, in matrices of these shapes: how many numbers it trains."""
        return trained

    def disk_bytes(self, trained: int, shapes: Collection[tuple[int, int]]) -> int:
        # weight, best and two moments in float32; the next state is written before the last one goes
        return 2 * (4 + 4 + 8) * self.trained_numbers(trained, shapes)

    def forwards(self, share: float = 1.0) -> float:
        return share * training_forwards(self.epochs, self.held_out)


def loaded(pruned: Checkpoint, device: torch.device, knobs: WholeModel) -> Any:
    """The whole pruned model in float32, by transformers; on this device, or spread over all of its kind."""
    import torch

    from ace_cli.core.device import with_others
    from ace_cli.data.generation import whole_model
    from ace_cli.model.spread import spread_out

    hint = "Use recover=blocks, which needs one block at a time in memory."
    if knobs.spread:
        return spread_out(whole_model(pruned, torch.float32, "cpu", hint), with_others(device), knobs.beside)
    return whole_model(pruned, torch.float32, device, hint)


def last_states(
    dense: StreamedModel,
    windows_NL: Tensor,
    progress: Progress,
    look: Callable[[Sequence[Tensor], Sequence[Tensor]], None] | None = None,
) -> Tensor:
    """(N, L, H) after the dense model's last block, on the CPU; empty where there are no windows.

    ``look`` sees the states (B, L, H) of all batches that go into each block and come out of it.
    """
    import torch

    from ace_cli.core.memory import Trimmer

    if not len(windows_NL):
        return torch.empty(0)
    batches, trimmer = list(dense.batches(windows_NL, tokens=dense.plain_tokens)), Trimmer()
    with progress("listening to the dense model", len(dense.blocks)) as step, torch.inference_mode():
        for index in dense.one_by_one():
            before = [batch.hidden_BLH for batch in batches] if look is not None else []
            dense.advance(index, batches)
            if look is not None:
                look(before, [batch.hidden_BLH for batch in batches])
            del before
            trimmer()
            step()
    first = batches[0].hidden_BLH
    states_NLH, done = torch.empty(len(windows_NL), *first.shape[1:], dtype=first.dtype), 0
    del first
    while batches:
        hidden_BLH = batches.pop(0).hidden_BLH
        states_NLH[done : done + len(hidden_BLH)].copy_(hidden_BLH)
        done += len(hidden_BLH)
    return states_NLH


def slot_parameters(block: Block) -> set[str]:
    """The block's parameters that hold what was pruned, by their names in it."""
    paths = {id(module): path for path, module in block.module.named_modules()}
    return {".".join(filter(None, (paths[id(slot.module)], slot.leaf))) for slot in block.slots}


def write_weights(streamed: StreamedModel, pruned: Checkpoint, weights: Mapping[str, Tensor], target: Path) -> None:
    """The weight files of ``pruned`` with these parameters in place of its own, in ``target``."""
    import torch

    from ace_cli.model.files import CheckpointWriter
    from ace_cli.model.header import DTYPES

    writer = CheckpointWriter(pruned, target)
    for block in streamed.blocks:
        for name, parts in block.parts.items():
            if (weight := weights.get(f"{block.name}.{name}")) is None:
                continue
            for part in parts:
                dtype: torch.dtype = getattr(torch, DTYPES[pruned.tensors[part.key].dtype][0])
                writer.write(part.key, part.place(weight).to(dtype).cpu().contiguous())
    writer.finish()
