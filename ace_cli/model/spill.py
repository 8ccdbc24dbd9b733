"""Hidden states on disk, for calibrations and evaluations that are larger than the memory they may take."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ace_cli.model.calls import Batch


class Spill:
    """A file without a name in ``folder``: its room is given back when the process ends, however it ends.

    Where a tensor was dropped, the next one of its size is written.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open while this object lives)
        self._end = 0
        self._free: dict[int, list[int]] = defaultdict(list)

    def put(self, tensor: Tensor) -> Stored:
        """Write ``tensor``; OSError when the disk is full."""
        raw = memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        if self._free[len(raw)]:
            start = self._free[len(raw)].pop()
        else:
            start, self._end = self._end, self._end + len(raw)
        self._file.seek(start)
        self._file.write(raw)
        return Stored(self, start, tensor)

    def get(self, start: int, nbytes: int) -> Tensor:
        """The bytes from ``start`` on, uint8 (nbytes,), on the CPU."""
        data = torch.empty(nbytes, dtype=torch.uint8)
        self._file.seek(start)
        if self._file.readinto(memoryview(data.numpy())) != nbytes:  # type: ignore[arg-type]
            raise OSError("hidden states on disk are cut off")
        return data

    def free(self, start: int, nbytes: int) -> None:
        """The room at ``start`` may be used again."""
        self._free[nbytes].append(start)


class Stored:
    """One tensor in a ``Spill``; its room is free again when nobody holds this any more."""

    def __init__(self, spill: Spill, start: int, tensor: Tensor) -> None:
        self._spill, self._start, self._nbytes = spill, start, tensor.nbytes
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device

    def get(self) -> Tensor:
        """The tensor, bit for bit, on the device it came from."""
        data = self._spill.get(self._start, self._nbytes)
        return data.view(self._dtype).reshape(self._shape).to(self._device)

    def __del__(self) -> None:
        self._spill.free(self._start, self._nbytes)


class SpilledBatch(Batch):
    """A batch whose hidden states lie on disk and are in memory only while somebody uses them."""

    def __init__(self, batch: Batch, spill: Spill) -> None:
        self._spill = spill
        super().__init__(batch.ids_BL, batch.hidden_BLH, batch.calls)

    @property
    def hidden_BLH(self) -> Tensor:
        """Read from disk at every use. Setting it leaves what a copy of this batch holds as it was."""
        return self._stored.get()

    @hidden_BLH.setter
    def hidden_BLH(self, hidden_BLH: Tensor) -> None:
        self._stored = self._spill.put(hidden_BLH)


def kept(batches: Iterable[Batch], spill: Spill | None) -> list[Batch]:
    """``batches`` as a list that can be gone through again and again.

    Their hidden states stay in memory if ``spill`` is None; otherwise each is written to ``spill`` as it arrives, so
    that no more than one batch is in memory.
    """
    return list(batches) if spill is None else [SpilledBatch(batch, spill) for batch in batches]
