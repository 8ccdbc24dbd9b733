"""``model.path`` -> a folder of safetensors: a local folder, a hub id, a GGUF file, or a file inside a Python package.

What must be converted (GGUF, ``.bin``, packed) is converted once into the cache and found there by the next run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from ace_cli.core.errors import AceError, first_line
from ace_cli.core.steps import NOBODY, Steps
from ace_cli.model.bin_import import import_bin
from ace_cli.model.files import Checkpoint, Stamps, stamps_of
from ace_cli.model.folder import INDEX, check_folder, is_document, other_files, weight_map
from ace_cli.model.gguf_import import import_gguf
from ace_cli.model.imports import imported
from ace_cli.model.packed import is_packed, unpack_folder
from ace_cli.model.quantised import dequantise_folder, is_quantised


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


@dataclass
class Found:
    """Where a model is. ``files`` decide the import that ``make`` does; none where nothing is to be imported."""

    path: Path
    files: dict[str, Path] = field(default_factory=dict)
    options: str = ""
    make: Callable[[Path, Steps], None] | None = None


def open_model(config: ModelConfig, steps: Steps = NOBODY) -> Checkpoint:
    """Find, fetch or import the model, and open its folder. Raises AceError when it cannot be had.

    ``steps`` hears how far an import is.
    """
    found = _found(config)
    make = found.make
    if make is None:
        return Checkpoint(found.path)
    origin = stamps_of(found.files)
    checkpoint = Checkpoint(imported(found.path.stem, found.files, found.options, lambda to: make(to, steps)))
    checkpoint.origin = origin
    return checkpoint


def origin_of(config: ModelConfig) -> Stamps:
    """What ``open_model(config).origin`` would be, without an import. Raises AceError where there is no such model."""
    found = _found(config)
    return stamps_of(found.files) if found.make is not None else Checkpoint(found.path).origin


def _found(config: ModelConfig) -> Found:
    path = _package_file(config) if config.path.startswith("package:") else Path(config.path).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        dtype = config.import_dtype.value
        return Found(path, {path.name: path}, dtype, lambda to, steps: import_gguf(path, dtype, to, steps))
    if not path.is_dir():
        path = _download(config)
    check_folder(path)
    if is_packed(path) or is_quantised(path):
        files = {file.name: file for file in path.iterdir() if file.is_file()}
        kind, restore = ("packed", unpack_folder) if is_packed(path) else ("quantised", dequantise_folder)
        return Found(path, files, kind, lambda to, steps: restore(path, to, steps))
    if (path / "config.json").is_file() and not _has_safetensors(path) and (bins := _bin_files(path)):
        names = [*(file.name for file in bins), *(name for name in other_files(path) if not is_document(name))]
        files = {name: path / name for name in names}
        return Found(path, files, "bin", lambda to, steps: import_bin(path, bins, to, steps))
    return Found(path)


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
