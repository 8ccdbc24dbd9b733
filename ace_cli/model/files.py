"""Safetensors folders: checked when opened, read and written one tensor at a time.

Plain reads and writes at known offsets, not memory maps: pages of a map count as resident memory and a truncated file
under a map ends the process.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from ace_cli.core import memory
from ace_cli.core.errors import AceError, TransientError
from ace_cli.model import disk
from ace_cli.model.configuration import read_config
from ace_cli.model.folder import INDEX, check_folder, is_document, other_files, weight_map
from ace_cli.model.header import DTYPES, TensorEntry, read_header

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 5_000_000_000  # decimal gigabytes, as transformers' max_shard_size="5GB"
_COPY_BYTES = 16 << 20
#: File -> size, time of its last change, time of its status' last change, number on the disk; empty if it is gone.
Stamps = dict[str, list[int]]


class Checkpoint:
    """A folder with config.json and safetensors files. Opening reads only headers, and checks them against the files.

    Raises AceError if the folder, a shard or a tensor is missing, or a file is shorter than its header says.
    """

    #: A LoRA adapter that is added to what is read.
    adapter: Path | None = None

    def __init__(self, folder: Path, bare: bool = False) -> None:
        """``bare``: weights alone will do, and may still be written."""
        self.folder = folder
        self._bare = bare
        if not bare and folder.is_dir():
            check_folder(folder)
        if not bare and not (folder / "config.json").is_file():
            raise AceError(
                f"{folder} has no config.json.", "Give a Hugging Face model folder, a hub id or a GGUF file."
            )
        self._fingerprint: tuple[Stamps, str] | None = None
        #: Tensor -> the hash of its stored bytes, of every one that was read or copied.
        self.digests: dict[str, str] = {}
        self._small = {} if bare else {name: folder / name for name in _deciding(folder)}
        self._shard_files = self._shards()
        #: The files as they are when this is opened: see ``check_unchanged``.
        self.stamps = self._stamps()
        #: Of the files that were named, where these here were imported from them.
        self.origin = self.stamps
        self._contents = {name: _hash_of(file) for name, file in self._small.items()}
        self._headers = {file: read_header(file) for file in self._shard_files}
        self.tensors = {entry.name: entry for entries in self._headers.values() for entry in entries}
        self._check_index()

    def config(self) -> dict[str, Any]:
        """config.json as it stands."""
        return read_config(self.folder)

    def read(self, name: str) -> Tensor:
        """The tensor ``name`` in its stored dtype, on the CPU, in memory of its own.

        Raises TransientError if it is not what it was when this was opened, or when it was read before.
        """
        with self.opened(name) as read:
            flat = read(0, self.tensors[name].numel)
        self.note(name, hash_of_tensor(flat))
        return flat.reshape(self.tensors[name].shape)

    def note(self, name: str, digest: str) -> None:
        """The stored bytes of ``name`` have just been read, and have this hash.

        Raises TransientError if they had another one before; or, where they are read for the first time, if their file
        was written since it was opened.
        """
        file = self.tensors[name].file
        if not self._bare and name not in self.digests and stamps_of({"": file})[""][:2] != self.stamps[file.name][:2]:
            raise _changed(file)
        if self.digests.setdefault(name, digest) != digest:
            raise _changed(file)

    def differing(self, digests: Mapping[str, str]) -> str | None:
        """Reads anew: the first tensor whose stored bytes do not have the hash that ``digests`` says, or None."""
        return next((name for name, digest in digests.items() if self._read_digest(name) != digest), None)

    def digest(self) -> str:
        """sha256 over the name and all bytes of every tensor; reads those that were not read yet."""
        known = {name: self.digests.get(name) or self._read_digest(name) for name in sorted(self.tensors)}
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def check_unchanged(self) -> None:
        """TransientError if a file that decides the result is not what it was when this was opened.

        Where size, times and place on the disk are the same, so is the content; where not, it is read and compared.
        """
        now = self._stamps()
        touched = {name for name in now if now[name] != self.stamps.get(name)}
        for name in touched & self._small.keys():
            if _hash_of(self._small[name]) != self._contents[name]:
                raise _changed(self._small[name])
        for file in (file for file in self._shard_files if file.name in touched):
            try:
                same = read_header(file) == self._headers[file]
            except (AceError, OSError):
                same = False
            mine = {entry.name for entry in self._headers[file]}
            if not same or self.differing({name: h for name, h in self.digests.items() if name in mine}):
                raise _changed(file)
        self.stamps = now

    @contextmanager
    def opened(self, name: str) -> Iterator[Callable[[int, int], Tensor]]:
        """``read(first, count)`` gives so many elements of the tensor ``name``, flat; on any thread."""
        import torch

        entry = self.tensors[name]
        if entry.dtype not in DTYPES:
            raise AceError(f"{entry.file.name}: {name} is stored as {entry.dtype}.", "Give a 16- or 32-bit checkpoint.")
        kind, width = DTYPES[entry.dtype]

        def read(first: int, count: int) -> Tensor:
            try:
                data = file.read(entry.start + first * width, count * width)
            except EOFError:
                raise TransientError(f"{entry.file} ended while reading {name}.", "Fetch the file again.") from None
            if data.storage_offset() % width:  # a header may end anywhere
                data = data.clone()
            return data.view(getattr(torch, kind))

        with closing(disk.Reader(entry.file, self.around_cache)) as file:
            yield read

    @cached_property
    def around_cache(self) -> bool:
        """Whether files of this size are read and written around the page cache: two of them would fill half of it."""
        return self.nbytes > memory.free() / 4

    def fingerprint(self) -> str:
        """sha256 over configuration, tokenizer, names, shapes, dtypes, and the first and last bytes of every tensor.

        The same for equal files wherever they lie. Read again only when a file was touched since it was last asked for.
        """
        stamps = self._stamps()
        if self._fingerprint is None or self._fingerprint[0] != stamps:
            self._fingerprint = stamps, self._read_fingerprint()
        return self._fingerprint[1]

    @property
    def key(self) -> str:
        """What stands for these files in this process: another one as soon as one of them is touched."""
        return f"{self.fingerprint()} {self._stamps()}"

    def _stamps(self) -> Stamps:
        return stamps_of({**self._small, **{file.name: file for file in self._shard_files}})

    def _read_digest(self, name: str) -> str | None:
        """None if there is no such tensor, or its file has ended."""
        if name not in self.tensors:
            return None
        found = xxhash.xxh3_64()
        try:
            for piece in self.pieces(name):
                found.update(piece)
        except TransientError:
            return None
        return found.hexdigest()

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes of the tensor ``name``, some megabytes at a time."""
        import torch

        entry = self.tensors[name]
        if entry.dtype not in DTYPES:
            yield from self._raw_pieces(entry)
            return
        step = _COPY_BYTES // DTYPES[entry.dtype][1]
        with self.opened(name) as read:
            for first in range(0, entry.numel, step):
                yield memoryview(read(first, min(step, entry.numel - first)).view(torch.uint8).numpy())  # type: ignore[arg-type]

    def _raw_pieces(self, entry: TensorEntry) -> Iterator[memoryview]:
        with closing(disk.Reader(entry.file, self.around_cache)) as file:
            for first in range(0, entry.nbytes, _COPY_BYTES):
                try:
                    piece = file.read(entry.start + first, min(_COPY_BYTES, entry.nbytes - first))
                except EOFError:
                    raise TransientError(f"{entry.file} ended while reading {entry.name}.", "Fetch it again.") from None
                yield memoryview(piece.numpy())  # type: ignore[arg-type]

    def _read_fingerprint(self) -> str:
        small = {name: _hash_of(file) for name, file in self._small.items()}
        digest = hashlib.sha256(json.dumps(small, sort_keys=True).encode())
        for entry in sorted(self.tensors.values(), key=lambda e: (str(e.file), e.start)):
            digest.update(f"{entry.name} {entry.dtype} {entry.shape}".encode())
            with open(entry.file, "rb") as file:
                file.seek(entry.start)
                digest.update(file.read(min(256, entry.nbytes)))
                file.seek(entry.start + max(0, entry.nbytes - 256))
                digest.update(file.read(min(256, entry.nbytes)))
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of the weight files on disk."""
        return sum(file.stat().st_size for file in {entry.file for entry in self.tensors.values()})

    def _shards(self) -> list[Path]:
        """model.safetensors alone if it is there, else what the index names, else every safetensors file."""
        if (self.folder / "model.safetensors").is_file():
            return [self.folder / "model.safetensors"]
        shards = [self.folder / name for name in sorted(set(weight_map(self.folder / INDEX).values()))]
        shards = shards or sorted(self.folder.glob("*.safetensors"))
        if not shards:
            raise AceError(f"{self.folder} has no *.safetensors file.", "Is the download complete?")
        return shards

    def _check_index(self) -> None:
        if not (self.folder / "model.safetensors").is_file() and (
            lost := set(weight_map(self.folder / INDEX)) - set(self.tensors)
        ):
            raise AceError(f"{self.folder}: no shard holds {sorted(lost)[0]}.", "Fetch the files again.")


class CheckpointWriter:
    """Writes a copy of a checkpoint with some tensors replaced, in any order, into ``folder``.

    Tensors keep their names and dtypes, and their shapes unless ``entries`` has others; shards hold at most 5 GB.
    Memory is one tensor. A folder begun by an earlier writer of the same source is continued: its files are left as
    they are.

    Every method takes names of the source. Where a tensor gets another name, or none, ``moved`` says so: that may
    become known while others are already written.
    """

    def __init__(self, source: Checkpoint, folder: Path, entries: Mapping[str, TensorEntry] | None = None) -> None:
        self.source = source
        self.entries = source.tensors if entries is None else entries
        self.folder = folder
        #: Tensors of the source that are still to be written.
        self.left = set(source.tensors)
        #: Tensor of the source -> its name in the new files, empty if it is gone; its own where nothing is said.
        self.moved: dict[str, str] = {}
        #: Tensor of the new files -> the hash of the bytes that were written for it.
        self.digests: dict[str, str] = {}
        #: False if a file had to be begun: whatever an earlier writer put there is gone.
        self.continued = True
        self._place: dict[str, tuple[Path, int]] = {}
        for file, shard in shard_plan(self.entries).items():
            self._begin(folder / file, shard)

    def name_of(self, name: str) -> str:
        """What a tensor of the source is called in the new files; empty if it is gone."""
        return self.moved.get(name, name)

    def write(self, name: str, tensor: Tensor) -> None:
        """Store ``tensor`` (on the CPU, in the stored dtype) in the place of ``name``."""
        import torch

        new = self.name_of(name)
        raw = memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        if len(raw) != self.entries[new].nbytes:
            raise ValueError(f"{name}: {len(raw)} bytes to store, room for {self.entries[new].nbytes}")
        disk.write(*self._place[new], raw, self.source.around_cache)
        self.digests[new] = xxhash.xxh3_64_hexdigest(raw)
        self.left.discard(name)

    def copy(self, names: Iterable[str]) -> None:
        """Copy the stored bytes of ``names`` as they are, without decoding; nothing of those that are gone."""
        for name in names:
            new = self.name_of(name)
            self.left.discard(name)
            if not new:
                continue
            if self.source.tensors[name].nbytes != self.entries[new].nbytes:
                raise ValueError(f"{name}: to be stored smaller than it is")
            target, start = self._place[new]
            found = xxhash.xxh3_64()
            for piece in self.source.pieces(name):
                disk.write(target, start, piece, self.source.around_cache)
                found.update(piece)
                start += len(piece)
            self.digests[new] = found.hexdigest()
            self.source.note(name, self.digests[new])

    def sync(self, names: Iterable[str]) -> None:
        """Force the files that hold ``names`` to disk."""
        self._sync({self._place[new][0] for name in names if (new := self.name_of(name))})

    def _sync(self, files: Iterable[Path]) -> None:
        for file in files:
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())

    def finish(self) -> None:
        """Copy what was not written, then force everything to disk."""
        self.copy(sorted(self.left))
        self._sync({file for file, _ in self._place.values()})

    def _begin(self, file: Path, entries: list[TensorEntry]) -> None:
        start = _start(entries)
        size = len(start)
        for entry in entries:
            self._place[entry.name] = (file, size)
            size += entry.nbytes
        if not _begun(file, start, size):
            self.continued = False
            _reserve(file, start, size)


class NoWriter(CheckpointWriter):
    """Writes nothing: another process does."""

    def __init__(self, source: Checkpoint) -> None:
        self.source, self.entries = source, source.tensors
        self.left, self.moved, self.digests, self.continued = set(), {}, {}, True

    def write(self, name: str, tensor: Tensor) -> None:
        """Nothing."""

    def copy(self, names: Iterable[str]) -> None:
        """Nothing."""

    def sync(self, names: Iterable[str]) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


def _start(entries: Iterable[TensorEntry]) -> bytes:
    """What a file of these tensors begins with. Data starts at a page, from where it can go straight to disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % disk.PAGE)
    return len(text).to_bytes(8, "little") + text


def file_bytes(tensors: Mapping[str, TensorEntry]) -> int:
    """Bytes of the weight files that a writer makes of these tensors."""
    return sum(
        len(_start(entries)) + sum(entry.nbytes for entry in entries) for entries in shard_plan(tensors).values()
    )


def _begun(file: Path, start: bytes, size: int) -> bool:
    """Whether ``file`` is there with this header and size."""
    if not file.is_file() or file.stat().st_size != size:
        return False
    with open(file, "rb") as stream:
        return stream.read(len(start)) == start


def _reserve(file: Path, start: bytes, size: int) -> None:
    """A file that begins with ``start`` and has ``size`` bytes, its room on the disk taken now if the system can."""
    with open(file, "wb") as stream:
        stream.write(start)
        stream.flush()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, size)
        stream.truncate(size)


def shard_plan(tensors: Mapping[str, TensorEntry]) -> dict[str, list[TensorEntry]]:
    """File name -> its tensors; in the source's order, a new shard where 5 GB would be passed."""
    shards: list[list[TensorEntry]] = [[]]
    for entry in sorted(tensors.values(), key=lambda e: (str(e.file), e.start)):
        if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def stamps_of(files: Mapping[str, Path]) -> Stamps:
    """What becomes another one when a file is written or replaced: size, times of change, place on the disk."""
    found: Stamps = {}
    for name, file in files.items():
        try:
            status = file.stat()
        except OSError:  # it is gone
            found[name] = []
            continue
        found[name] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    return found


def hash_of_tensor(tensor: Tensor) -> str:
    """xxh3 of the bytes of a tensor on the CPU: of a gigabyte in a tenth of a second."""
    import torch

    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return str(xxhash.xxh3_64_hexdigest(memoryview(raw)))  # type: ignore[arg-type]


def _deciding(folder: Path) -> list[str]:
    """The files that are no weights and decide what a model does."""
    return [name for name in (*other_files(folder), INDEX) if not is_document(name) and (folder / name).is_file()]


def _hash_of(file: Path) -> str:
    """Of a small file; empty if it cannot be read."""
    try:
        return str(xxhash.xxh3_64_hexdigest(file.read_bytes()))
    except OSError:
        return ""


def _changed(file: Path) -> TransientError:
    return TransientError(
        f"{file} was changed while the run was reading it: the result would be of two models.",
        "Leave the model's files alone, then repeat the command.",
    )


def write_index(tensors: Mapping[str, TensorEntry], folder: Path) -> None:
    """The index that several shards of ``tensors`` need; none for one file."""
    plan = shard_plan(tensors)
    if len(plan) > 1:
        index = {
            "metadata": {"total_size": sum(entry.nbytes for entry in tensors.values())},
            "weight_map": {entry.name: file for file, entries in plan.items() for entry in entries},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
