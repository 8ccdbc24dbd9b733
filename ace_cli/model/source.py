"""``model.path`` -> a folder of safetensors: a local folder, a hub id, a GGUF file, or a file inside a Python package.

What must be converted (GGUF, ``.bin``, packed) is converted once into the cache and found there by the next run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ace_cli.core.cache import cache_folder
from ace_cli.core.errors import AceError, first_line
from ace_cli.model.bin_import import import_bin
from ace_cli.model.files import Checkpoint
from ace_cli.model.folder import INDEX, check_folder, weight_map
from ace_cli.model.gguf_import import import_gguf
from ace_cli.model.packed import PackedCheckpoint, is_packed, unpack_folder


class ImportDtype(Enum):
    """The dtype in which an imported GGUF file is stored."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@dataclass
class ModelConfig:
    """Which model. ``path``: hub id, folder, GGUF file, or ``package:NAME/FILE`` (a file inside a Python package)."""

    path: str = ""
    revision: str | None = None
    #: GGUF only. float32 holds every dequantised value exactly; choose 16 bits to halve a large import.
    import_dtype: ImportDtype = ImportDtype.float32
    #: How to get the package of a ``package:`` path, shown when it is missing.
    install: str | None = None

    def faults(self) -> list[str]:
        """What is wrong with the path as far as the local disk can tell, one line each."""
        if not self.path:
            return ["no model: give model=NAME (a card) or model.path=FOLDER, HUB_ID or FILE.gguf"]
        if self.path.startswith("package:"):
            return []
        path = Path(self.path).expanduser()
        if path.is_file() and path.suffix != ".gguf":
            return [f"model.path={self.path} is a file: give a folder, a hub id or a .gguf file"]
        if not path.exists() and not self._may_be_on_the_hub():
            return [f"model.path={self.path} does not exist: give a folder, a .gguf file or a hub id"]
        return []

    @property
    def on_hub(self) -> bool:
        """Whether ``path`` is the name of a model on the hub."""
        return self._may_be_on_the_hub() and not Path(self.path).exists()

    @property
    def name(self) -> str:
        """The model as others know it: without the place where it lies on this machine."""
        return self.path if self.on_hub or self.path.startswith("package:") else Path(self.path).name

    def _may_be_on_the_hub(self) -> bool:
        return self.path.count("/") == 1 and not self.path.startswith(("/", ".", "~")) and ".gguf" not in self.path


def open_model(config: ModelConfig) -> Checkpoint:
    """Find, fetch or import the model, and open its folder. Raises AceError when it cannot be had."""
    path = _package_file(config) if config.path.startswith("package:") else Path(config.path).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return Checkpoint(
            _cached(_gguf_key(path, config.import_dtype), lambda to: import_gguf(path, config.import_dtype.value, to))
        )
    if not path.is_dir():
        path = _download(config)
    check_folder(path)
    if is_packed(path):
        key = _key(path.name, PackedCheckpoint(path).fingerprint())
        return Checkpoint(_cached(key, lambda to: unpack_folder(path, to)))
    if (path / "config.json").is_file() and not _has_safetensors(path) and (bins := _bin_files(path)):
        return Checkpoint(_cached(_bin_key(bins), lambda to: import_bin(path, bins, to)))
    return Checkpoint(path)


def _package_file(config: ModelConfig) -> Path:
    name, _, file = config.path.removeprefix("package:").partition("/")
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        raise AceError(f"The Python package '{name}' that carries this model is not installed.", config.install or "")
    path = Path(next(iter(found.submodule_search_locations))) / file
    if not path.is_file():
        raise AceError(f"The Python package '{name}' has no file {file}.", config.install or "")
    return path


def _download(config: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.model", "*.txt", "*.jinja", "*.safetensors"]
    try:
        folder = Path(snapshot_download(config.path, revision=config.revision, allow_patterns=wanted))
        if not _has_safetensors(folder):
            folder = Path(snapshot_download(config.path, revision=config.revision, allow_patterns=[*wanted, "*.bin"]))
    except Exception as fault:  # the hub client raises a different family of errors for each layer below it
        reason = first_line(fault)
        raise AceError(
            f"model.path={config.path} is no local folder and the hub did not give it: {reason}",
            "Check the name, the network, and `hf auth login` for gated models.",
        ) from fault
    return folder


def _has_safetensors(folder: Path) -> bool:
    return (folder / INDEX).is_file() or any(folder.glob("*.safetensors"))


def _bin_files(folder: Path) -> list[Path]:
    named = sorted(set(weight_map(folder / "pytorch_model.bin.index.json").values()))
    return [folder / name for name in named] or sorted(folder.glob("pytorch_model.bin"))


def _cached(key: str, make: Callable[[Path], None]) -> Path:
    """The cached folder of this key, made in a sibling and renamed, so that it is whole or absent."""
    final = cache_folder() / "imports" / key
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=final.parent))
    try:
        make(work)
        os.rename(work, final)
    except OSError:
        if not final.is_dir():  # another run may have finished the same import first
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def _key(name: str, *facts: object) -> str:
    return f"{name}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"


def _gguf_key(path: Path, dtype: ImportDtype) -> str:
    status = path.stat()
    with open(path, "rb") as file:
        head = hashlib.sha256(file.read(1 << 20)).hexdigest()
    return _key(path.stem, head, status.st_size, status.st_mtime_ns, dtype.value)


def _bin_key(files: list[Path]) -> str:
    return _key(files[0].parent.name, *[(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files])
