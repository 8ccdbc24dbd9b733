"""``export=gguf``: the pruned checkpoint as one GGUF file, for llama.cpp and what is built on it.

As stored it is exact. Of the quantised types only those are offered whose grids hold 0: pruned weights stay pruned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ace_cli import __version__
from ace_cli.core.errors import AceError
from ace_cli.core.stage import Progress, Stage
from ace_cli.export.gguf_families import (
    Family,
    NoForm,
    family_of,
    frequency_factors,
    keys_of,
    laid_out,
    uneven_family,
    uneven_keys,
)
from ace_cli.export.gguf_tokenizer import vocabulary_of
from ace_cli.model.configuration import transformers_config
from ace_cli.model.files import Checkpoint

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType
    from numpy.typing import NDArray

#: Types that may be asked for. Matrices of them, everything else in float32.
KINDS = ("stored", "f32", "bf16", "f16", "q8_0", "q5_0", "q4_0")
#: Why others may not.
_REFUSED = {
    "q4_1": "its grids do not hold 0, so pruned weights would come back",
    "q5_1": "its grids do not hold 0, so pruned weights would come back",
}
FILE = "model.gguf"
_STORED = {"BF16": "BF16", "F16": "F16"}
#: Matrices that lose most where they are coarse: at least eight bits.
_FINE = ("token_embd.weight", "output.weight")


def fault(kind: str) -> str:
    """What is wrong with the type ``kind``; empty if nothing is."""
    if kind in KINDS:
        return ""
    hint = "llama.cpp's llama-quantize makes it of a file that export=gguf:f16 wrote" if "_k" in kind else "unknown"
    return f"export=gguf:{kind}: {_REFUSED.get(kind, hint)}. There are {', '.join(KINDS)}"


@dataclass(frozen=True)
class Gguf(Stage):
    """One GGUF file whose matrices are of the type ``kind``; "stored": as the checkpoint has them.

    ``uneven``: blocks may differ in width, once the source has been cut.
    """

    name: ClassVar[str] = "gguf"
    kind: str = "stored"
    uneven: bool = False

    def identity(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def refusal(self, source: Path) -> str | None:
        try:
            found = _Source(source, self.kind)
            if self.uneven:
                uneven_family(found.config)
        except NoForm as reason:
            return f"export=gguf: {source} cannot be exported, GGUF has no form for {reason}."
        return None

    def disk_bytes(self, source_bytes: int) -> int:
        return 2 * source_bytes if self.kind == "f32" else source_bytes

    def run(self, source: Path, target: Path, progress: Progress) -> dict[str, Any]:
        found = _Source(source, self.kind)
        with progress("writing GGUF", len(found.names)) as step:
            found.write(target / FILE, step)
        return {
            "file": FILE,
            "kind": self.kind,
            "architecture": found.family.arch,
            "tensors": len(found.names),
            "bytes": (target / FILE).stat().st_size,
            "source_bytes": found.checkpoint.file_bytes,
            "in_f16": [name for name in found.names if found.falls_back(name)],
        }

    def summary(self, facts: dict[str, Any]) -> str:
        kept = (
            f"; {len(facts['in_f16'])} matrices in f16, their rows being no multiple of 32" if facts["in_f16"] else ""
        )
        return (
            f"{facts['architecture']}, {facts['kind']}, {facts['bytes'] / 1e9:.2f} GB, "
            f"{facts['bytes'] / facts['source_bytes']:.3f} of the dense files{kept}"
        )

    def verify(self, source: Path, target: Path) -> None:
        from gguf import GGUFReader, dequantize

        found = _Source(source, self.kind)
        written = {tensor.name: tensor for tensor in GGUFReader(target / FILE).tensors}
        for name, value, kind in found.tensors():
            tensor = written.pop(name, None)
            if tensor is None or tensor.tensor_type != kind or tensor.data.tobytes() != _encoded(value, kind).tobytes():
                raise AceError(f"{name} did not read back from {target / FILE} as written.", "Is the disk sound?")
            if value.ndim > 1 and dequantize(tensor.data, kind)[value == 0].any():
                raise AceError(f"{name}: pruned weights are not zero in {kind.name}.", "Use export=gguf:f16.")
        if written:
            raise AceError(f"{target / FILE} holds {next(iter(written))}, which was not written.", "Export it again.")


class _Source:
    """A checkpoint seen as a GGUF file. Raises NoForm where it cannot be one."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.checkpoint, self.kind = Checkpoint(folder), kind
        self.config = transformers_config(folder)
        uneven = _differ_in_width(self.config)
        self.family: Family = uneven_family(self.config) if uneven else family_of(self.config)
        self.keys = keys_of(self.config, self.family)
        self.names = self._names()
        if uneven:
            self.keys |= uneven_keys(self.config, {n: self.checkpoint.tensors[k].shape for n, k in self.names.items()})
        self.vocabulary = vocabulary_of(folder, self.config.vocab_size)

    def _head_is_tied(self) -> bool:
        """Whether a stored head is the embedding once more; one of other values counts, whatever config.json says."""
        import torch

        from ace_cli.model.ties import same_values

        embedding = next((name for name in self.checkpoint.tensors if name.endswith("embed_tokens.weight")), None)
        if embedding is None or not self.config.tie_word_embeddings:
            return False
        return same_values(self.checkpoint, "lm_head.weight", embedding, torch.float32)

    def _names(self) -> dict[str, str]:
        """Name in GGUF -> name in the checkpoint."""
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

        arch: MODEL_ARCH = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == self.family.arch)
        known = get_tensor_name_map(arch, self.config.num_hidden_layers)
        found = {}
        for name in self.checkpoint.tensors:
            if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and self._head_is_tied()):
                continue  # computed; the embedding itself
            called = known.get_name(name, try_suffixes=(".weight", ".bias"))
            if called is None:
                raise NoForm(f"the tensor {name}")
            found[called] = name
        return found

    def falls_back(self, name: str) -> bool:
        """Whether a matrix cannot be quantised as it was asked: rows are cut into blocks of 32."""
        shape = self.checkpoint.tensors[self.names[name]].shape
        return self.kind.startswith("q") and len(shape) > 1 and shape[-1] % 32 != 0

    def kind_of(self, name: str) -> GGMLQuantizationType:
        """How the tensor is stored in the file."""
        from gguf import GGMLQuantizationType

        entry = self.checkpoint.tensors[self.names[name]]
        kind = _STORED.get(entry.dtype, "F32") if self.kind == "stored" else self.kind.upper()
        if len(entry.shape) == 1:
            kind = "F32"
        elif self.falls_back(name):
            kind = "F16"
        elif name in _FINE and kind in ("Q4_0", "Q5_0"):
            kind = "Q8_0"
        return GGMLQuantizationType[kind]

    def tensors(self) -> Iterator[tuple[str, NDArray[Any], GGMLQuantizationType]]:
        """Name, values in float32 as they lie in the file, and what they are stored as; one at a time."""
        import numpy
        from gguf import GGMLQuantizationType

        if (factors := frequency_factors(self.config)) is not None:
            yield "rope_freqs.weight", numpy.array(factors, numpy.float32), GGMLQuantizationType.F32
        for called, name in self.names.items():
            value = laid_out(called, self.checkpoint.read(name), self.config, self.family)
            yield called, value.float().contiguous().numpy(), self.kind_of(called)

    def write(self, file: Path, step: Any) -> None:
        """The whole file. Memory is one tensor."""
        import numpy
        from gguf import GGUFWriter, quant_shape_to_byte_shape

        writer = GGUFWriter(file, self.family.arch)
        self._describe(writer)
        shapes = {name: self.checkpoint.tensors[key].shape for name, key in self.names.items()}
        kinds = {name: self.kind_of(name) for name in self.names}
        if (factors := frequency_factors(self.config)) is not None:
            writer.add_tensor_info("rope_freqs.weight", (len(factors),), numpy.dtype(numpy.float32), 4 * len(factors))
        for name, shape in shapes.items():
            stored = quant_shape_to_byte_shape(shape, kinds[name])
            writer.add_tensor_info(name, stored, numpy.dtype(numpy.uint8), int(numpy.prod(stored)), kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, value, kind in self.tensors():
            writer.write_tensor_data(_encoded(value, kind))
            if name in shapes:
                step()
        writer.close()

    def _describe(self, writer: Any) -> None:
        from gguf import LlamaFileType

        names = {"stored": "", "f32": "ALL_F32"}
        kind = self.kind if self.kind != "stored" else self.kind_of("token_embd.weight").name.lower()
        writer.add_name(f"{self.config.model_type} pruned")
        writer.add_string("general.quantized_by", f"ace-prune {__version__}")
        writer.add_file_type(LlamaFileType[names.get(kind) or f"MOSTLY_{kind.upper()}"])
        writer.add_quantization_version(2)
        for key, value in self.keys.items():
            add = {
                int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array,
            }[type(value)]  # fmt: skip
            add(f"{self.family.arch}.{key}", value)
        self.vocabulary.add_to(writer, self.checkpoint.folder)


def _differ_in_width(config: Any) -> bool:
    """Whether blocks do. Raises NoForm where the stream between them is another one than the class has."""
    from ace_cli.model.sliced import SHORTCUTS
    from ace_cli.model.uneven import shapes_of

    shapes = shapes_of(config)
    if shapes and SHORTCUTS in config.pruning:
        raise NoForm("a residual stream that changes its basis between the blocks")
    return bool(shapes)


def _encoded(value: NDArray[Any], kind: GGMLQuantizationType) -> NDArray[Any]:
    """float32 values as the bytes of the file."""
    import numpy
    from gguf import quantize

    return quantize(numpy.ascontiguousarray(value), kind)  # type: ignore[no-any-return]
