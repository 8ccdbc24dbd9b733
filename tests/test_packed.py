from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import add_tokenizer, edit, make, weights
from transformers import AutoModelForCausalLM

from ace_cli.core.errors import AceError
from ace_cli.export import packed as export
from ace_cli.export.packed import pack_folder
from ace_cli.kernels import bitmask
from ace_cli.kernels.bitmask import Bitmask, bits_of, pack, packed_bytes, unpack, with_scales
from ace_cli.methods.grids import SMALLEST_HALF, Grid
from ace_cli.model import files
from ace_cli.model.packed import PACKED, PackedCheckpoint, unpack_folder
from ace_cli.model.pruned import Violation, verify
from ace_cli.model.source import ModelConfig, open_model

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (5, 64), (3, 13), (7, 130), (40, 200), (65, 96)]


def random_matrix(rows: int, columns: int, dtype: torch.dtype, zeros: float = 0.6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    drop = torch.rand(rows, columns, generator=generator) < zeros
    return torch.randn(rows, columns, generator=generator).to(dtype).masked_fill_(drop, 0)


def slowly_packed(weight: torch.Tensor) -> tuple[list[list[int]], list[int]]:
    """Bytes of the mask's rows and bits of the values, one weight at a time."""
    rows, values = [], []
    for row in bits_of(weight).tolist():
        line = [0] * (8 * -(-len(row) // 64))
        for column, value in enumerate(row):
            if value:
                line[column // 8] |= 1 << column % 8
                values.append(value)
        rows.append(line)
    return rows, values


@pytest.fixture(params=["compiled", "without a compiler"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without a compiler":
        monkeypatch.setattr(bitmask, "_library", lambda: None)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packs_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random_matrix(*shape, dtype)
    weight.view(-1)[:3] = torch.tensor([-0.0, float("nan"), float("-inf")], dtype=dtype)[: weight.numel()]
    packed = pack(weight)
    mask, values = slowly_packed(weight)
    assert packed.mask.tolist() == mask
    assert bits_of(packed.values)[: len(values)].tolist() == values
    assert packed.values[len(values) :].count_nonzero() == 0
    assert packed.mask.nbytes + packed.values.nbytes == packed_bytes(shape, len(values), dtype.itemsize)
    assert torch.equal(bits_of(unpack(packed)), bits_of(weight))
    room = torch.ones(weight.numel() + 9, dtype=dtype)
    assert torch.equal(bits_of(unpack(packed, room)), bits_of(weight))
    assert room[weight.numel() :].tolist() == [1] * 9


def rounded(rows: int, columns: int, group: int | None, dtype: torch.dtype) -> tuple[torch.Tensor, Bitmask]:
    """A sparse matrix on a grid of 8 bits, and its codes packed."""
    grid = Grid(8, group, SMALLEST_HALF)
    weight = random_matrix(rows, columns, torch.float32)
    values = grid.rounded(weight, grid.scales(weight)).to(dtype)
    scales = grid.scales_of(values)
    return values, with_scales(pack(grid.codes(values, scales)), scales.bfloat16(), dtype)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [16, 24, 32, 64, 96, 128, None], ids=str)
def test_codes_unpack_to_the_weights_they_stand_for(group: int | None, dtype: torch.dtype) -> None:
    values, packed = rounded(37, 96 if group is None else 2 * group, group, dtype)
    assert packed.values.dtype == torch.int8 and packed.dtype == dtype
    assert torch.equal(bits_of(unpack(packed)), bits_of(values))
    assert torch.equal(unpack(packed.rows(30, 40)), values[30:])
    assert packed.compiled == (group not in (24, 96))


def test_scales_that_do_not_fit_are_refused() -> None:
    codes = pack(torch.ones(4, 64, dtype=torch.int8))
    for other, scales in (
        (codes, torch.ones(4, 5)),
        (codes, torch.ones(3, 4)),
        (pack(torch.ones(4, 64)), torch.ones(4, 4)),
    ):
        with pytest.raises(ValueError, match="do not fit a 4 x 64 matrix"):
            with_scales(other, scales.bfloat16(), torch.float32)


def test_half_of_bfloat16_takes_nine_sixteenths() -> None:
    weight = torch.ones(256, 1024, dtype=torch.bfloat16)
    weight[:, ::2] = 0
    packed = pack(weight)
    assert packed.nbytes / weight.nbytes == pytest.approx(0.5625, abs=5e-3)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    packed = pack(random_matrix(4, 70, torch.bfloat16))
    with pytest.raises(ValueError, match="no 4 x 70 matrix"):
        bitmask.from_parts((4, 70), packed.mask, packed.values[:-1])
    with pytest.raises(ValueError, match="no 4 x 70 matrix"):
        bitmask.from_parts((4, 70), packed.mask | 1, packed.values)
    with pytest.raises(ValueError, match="no 5 x 70 matrix"):
        bitmask.from_parts((5, 70), packed.mask, packed.values)


# --- folders ------------------------------------------------------------------------------------------------------


def make_sparse(folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
    """A tiny model whose matrices inside the blocks are 60 % zero."""
    make(folder, family, dtype)
    for name, tensor in weights(folder).items():
        if tensor.dim() >= 2 and ".layers." in name:
            edit(folder, name, lambda weight: random_matrix(*weight.shape, weight.dtype))
    return folder


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    return make_sparse(tmp_path / "plain")


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)) for name, tensor in one.items()
    )


@pytest.mark.parametrize("zstd", [False, True], ids=["plain", "zstd"])
def test_a_folder_is_packed_and_unpacked_exactly(sparse: Path, tmp_path: Path, zstd: bool) -> None:
    if zstd:
        pytest.importorskip("zstandard")
    (sparse / "README.md").write_text("the model's own card")
    facts = pack_folder(sparse, tmp_path / "packed", zstd)
    unpack_folder(tmp_path / "packed", tmp_path / "again")
    assert same_bits(weights(sparse), weights(tmp_path / "again"))
    assert {file.name for file in sparse.iterdir()} == {file.name for file in (tmp_path / "again").iterdir()}
    assert (tmp_path / "again" / "README.md").read_text() == "the model's own card"
    assert facts["matrices"] == 14
    assert facts["packed_matrix_bytes"] < (0.45 if zstd else 0.50) * facts["dense_matrix_bytes"]
    assert facts["packed_bytes"] == sum(file.stat().st_size for file in (tmp_path / "packed").glob("*.safetensors"))
    assert facts["dense_bytes"] == (sparse / "model.safetensors").stat().st_size
    assert not list(tmp_path.glob("*.partial"))


def test_experts_and_other_dtypes_are_packed_too(tmp_path: Path) -> None:
    source = make(tmp_path / "plain", "gpt_oss", torch.float32)
    name = next(name for name, tensor in weights(source).items() if tensor.dim() == 3)
    edit(source, name, lambda weight: weight.masked_fill(torch.rand(weight.shape) < 0.7, 0))
    assert pack_folder(source, tmp_path / "packed")["matrices"] == 1
    unpack_folder(tmp_path / "packed", tmp_path / "again")
    assert same_bits(weights(source), weights(tmp_path / "again"))


def test_other_loaders_refuse_a_packed_folder(sparse: Path, tmp_path: Path) -> None:
    pack_folder(sparse, tmp_path / "packed")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_our_own_commands_take_a_packed_model(sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACE_PRUNE_CACHE", str(tmp_path / "cache"))
    pack_folder(sparse, tmp_path / "packed")
    opened = open_model(ModelConfig(str(tmp_path / "packed")))
    assert same_bits(weights(opened.folder), weights(sparse))
    assert open_model(ModelConfig(str(tmp_path / "packed"))).folder == opened.folder


def test_several_files_are_packed_each(sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SHARD_BYTES", 40_000)
    shards = len(files.shard_plan(files.Checkpoint(sparse).tensors))
    assert shards > 2
    pack_folder(sparse, tmp_path / "packed")
    assert len(list((tmp_path / "packed").glob("packed-*-of-*.safetensors"))) == shards
    unpack_folder(tmp_path / "packed", tmp_path / "again")
    assert same_bits(weights(sparse), weights(tmp_path / "again"))


def test_a_packed_folder_is_replaced(sparse: Path, tmp_path: Path) -> None:
    pack_folder(sparse, tmp_path / "packed")
    edit(sparse, "model.layers.0.mlp.up_proj.weight", lambda weight: weight * 2)
    pack_folder(sparse, tmp_path / "packed")
    unpack_folder(tmp_path / "packed", tmp_path / "again")
    assert same_bits(weights(sparse), weights(tmp_path / "again"))


def test_what_cannot_be_packed_is_refused_in_one_line(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(AceError, match="was not made by packing"):
        pack_folder(sparse, tmp_path / "mine")
    pack_folder(sparse, tmp_path / "packed")
    with pytest.raises(AceError, match="is packed already"):
        pack_folder(tmp_path / "packed", tmp_path / "twice")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(AceError, match="of disk"):
        pack_folder(sparse, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_does_not_read_back_is_not_published(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bitmask, "pack", lambda weight: pack(weight * 2))
    with pytest.raises(AceError, match="did not read back"):
        pack_folder(sparse, tmp_path / "packed")
    assert not list(tmp_path.glob("packed*"))


def test_damage_is_named(sparse: Path, tmp_path: Path) -> None:
    pack_folder(sparse, tmp_path / "packed")
    told = json.loads((tmp_path / "packed" / PACKED).read_text())
    (tmp_path / "packed" / PACKED).write_text(json.dumps({**told, "format": "ace-bitmask-9"}))
    with pytest.raises(AceError, match="packed as ace-bitmask-9"):
        PackedCheckpoint(tmp_path / "packed")
    lost = {**told["tensors"], "another": {"dtype": "F32", "shape": [2], "packed": False}}
    (tmp_path / "packed" / PACKED).write_text(json.dumps({**told, "tensors": lost}))
    with pytest.raises(AceError, match="no file holds another"):
        PackedCheckpoint(tmp_path / "packed")
    (tmp_path / "packed" / PACKED).write_text(json.dumps(told))
    name = "model.layers.0.mlp.up_proj.weight"
    entry = PackedCheckpoint(tmp_path / "packed").stored[f"{name}.bitmask"]
    with open(entry.file, "r+b") as stream:
        stream.seek(entry.start)
        stream.write(b"\xff" * 400)
    with pytest.raises(AceError, match=f"{name} is damaged"):
        PackedCheckpoint(tmp_path / "packed").bitmask(name)


def test_ace_verify_knows_packed_folders(llama: Path, tmp_path: Path, prune_here: Any) -> None:
    report = prune_here(llama, tmp_path / "out", "sparsity=2:4", "metric=magnitude")
    pack_folder(Path(report.checkpoint), tmp_path / "packed")
    assert verify(tmp_path / "packed") == 14
    name = "model.layers.0.mlp.up_proj.weight"
    packed = PackedCheckpoint(tmp_path / "packed")
    line = packed.bitmask(name).mask[0].clone()
    line[0], line[1] = 0b11111111, 0  # as many values, elsewhere
    entry = packed.stored[f"{name}.bitmask"]
    with open(entry.file, "r+b") as stream:
        stream.seek(entry.start)
        stream.write(bytes(line.tolist()))
    with pytest.raises(Violation, match=name):
        verify(tmp_path / "packed")


# --- as a part of a run -------------------------------------------------------------------------------------------


def test_a_run_packs_its_checkpoint(llama: Path, tmp_path: Path, prune_here: Any) -> None:
    report = prune_here(llama, tmp_path / "out", "metric=magnitude", "pack=true")
    packed = report.stages["packed"]
    assert packed["made"]
    assert packed["matrices"] == 14
    assert packed["summary"] in (tmp_path / "out" / "report.md").read_text()
    unpack_folder(tmp_path / "out" / "packed", tmp_path / "again")
    assert same_bits(weights(tmp_path / "out" / "checkpoint"), weights(tmp_path / "again"))
    assert not (tmp_path / "again" / "stage.json").exists()


@pytest.mark.parametrize("zstd", [False, True], ids=["plain", "zstd"])
def test_a_run_packs_codes_of_what_it_rounded(tmp_path: Path, prune_here: Any, zstd: bool) -> None:
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    if zstd:
        pytest.importorskip("zstandard")
    source, out = add_tokenizer(make(tmp_path / "model", "llama", torch.bfloat16)), tmp_path / "out"
    options = ["metric=magnitude", "quantize=int8", "quantize.group=32", "quantize.rounding=nearest"]
    report = prune_here(source, out, *options, f"pack={'zstd' if zstd else 'true'}")
    facts, packed = report.stages["packed"], PackedCheckpoint(out / "packed")
    assert facts["matrices"] == facts["of_codes"] == 14
    assert "codes of 8 bits" in facts["summary"]
    # one bit of mask, four of codes at a half, and sixteen for 32 inputs; room behind each of the small matrices
    assert facts["packed_matrix_bytes"] < (1 if zstd else 0.40) * facts["dense_matrix_bytes"]
    assert all(packed.bitmask(name).values.dtype == torch.int8 for name in packed.tensors if packed.holds_codes(name))
    unpack_folder(out / "packed", tmp_path / "again")
    assert same_bits(weights(out / "checkpoint"), weights(tmp_path / "again"))
    assert verify(out / "packed") == 14


def test_a_run_that_is_stopped_while_packing_goes_on_there(
    llama: Path, tmp_path: Path, prune_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    write = export._write_shard
    monkeypatch.setattr(export, "_write_shard", stopped)
    with pytest.raises(KeyboardInterrupt):
        prune_here(llama, tmp_path / "out", "metric=magnitude", "pack=true")
    assert not (tmp_path / "out" / "packed").exists()
    weight_file = tmp_path / "out" / "checkpoint" / "model.safetensors"
    before = weight_file.stat().st_mtime_ns
    monkeypatch.setattr(export, "_write_shard", write)
    report = prune_here(llama, tmp_path / "out", "metric=magnitude", "pack=true")
    assert weight_file.stat().st_mtime_ns == before
    assert report.stages["packed"]["made"]
    assert not list((tmp_path / "out").glob("*.partial"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["pack=gzip"], "pack=gzip: must be true, false or zstd"),
        (["pack=true", "sparsity=0.05"], "pack: at sparsity=0.05 a bit mask takes more than the zeros did"),
        (["pack=true", "sparsity=0.1", "quantize=int8"], "pack: at sparsity=0.1 a bit mask takes more"),
    ],
)
def test_what_packing_cannot_do_is_said_before_work(options: list[str], words: str, configure: Any) -> None:
    with pytest.raises(AceError, match=words):
        configure("model=custom", f"model.path={Path(__file__).parent}", *options)


def test_zstd_without_its_library_is_said_before_work(
    llama: Path, tmp_path: Path, prune_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(AceError, match="pip install zstandard"):
        prune_here(llama, tmp_path / "out", "metric=magnitude", "pack=zstd")
    assert not (tmp_path / "out").exists()
