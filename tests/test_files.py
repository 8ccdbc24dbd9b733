"""Reading, checking, writing, sharding of safetensors folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import edit, load, make, weights

from ace_cli.core.errors import AceError
from ace_cli.model import disk, files
from ace_cli.model.files import Checkpoint, CheckpointWriter, write_index
from ace_cli.model.folder import INDEX, copy_other_files

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool]  # fmt: skip


@pytest.fixture(params=[False, True], ids=["through the cache", "around it"])
def cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if memory were too small for files of any size, or large enough."""
    monkeypatch.setattr(files.memory, "free", lambda: 0 if request.param else 1 << 40)


@pytest.fixture
def mixed(tmp_path: Path, cache: None) -> Path:
    """One tensor of every dtype, an empty one and a scalar."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors = {str(dtype).removeprefix("torch."): torch.arange(6).view(2, 3).to(dtype) for dtype in DTYPES}
    tensors |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_reads_every_dtype_as_safetensors_does(mixed: Path) -> None:
    checkpoint, expected = Checkpoint(mixed), load_file(mixed / "model.safetensors")
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        got = checkpoint.read(name)
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(got, tensor)
        assert checkpoint.tensors[name].numel == tensor.numel()
    assert checkpoint.nbytes == sum(tensor.numel() * tensor.itemsize for tensor in expected.values())


def test_what_is_read_is_the_callers_own(mixed: Path) -> None:
    checkpoint = Checkpoint(mixed)
    checkpoint.read("float32").fill_(7)
    assert torch.equal(checkpoint.read("float32"), load_file(mixed / "model.safetensors")["float32"])


def written(source: Path, out: Path, **changes: torch.Tensor) -> Path:
    out.mkdir()
    checkpoint = Checkpoint(source)
    writer = CheckpointWriter(checkpoint, out)
    for name, tensor in changes.items():
        writer.write(name, tensor)
    writer.finish()
    write_index(checkpoint.tensors, out)
    copy_other_files(source, out)
    return out


def test_a_copy_without_changes_has_the_same_tensors(mixed: Path, tmp_path: Path) -> None:
    before, after = weights(mixed), weights(written(mixed, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_written_tensors_replace_the_stored_ones(mixed: Path, tmp_path: Path) -> None:
    new = torch.tensor([[1.5, -2, 0], [3, 4, 0.25]])
    transposed = new.half().T.contiguous().T  # not contiguous
    before, after = (
        weights(mixed),
        weights(written(mixed, tmp_path / "out", bfloat16=new.bfloat16(), float16=transposed)),
    )
    for name in ("bfloat16", "float16"):
        assert after.pop(name).float().equal(new)
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_a_tensor_of_another_size_never_overwrites_its_neighbour(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises((ValueError, AssertionError, AceError)):
        written(mixed, tmp_path / "out", bfloat16=torch.ones(2, 3, dtype=torch.float32))


def test_data_starts_at_a_page(mixed: Path, tmp_path: Path) -> None:
    file = written(mixed, tmp_path / "out") / "model.safetensors"
    assert (8 + int.from_bytes(file.read_bytes()[:8], "little")) % disk.PAGE == 0


@pytest.mark.parametrize("limit", [20_000, 60_000, 1])
def test_several_shards_load_like_one(tmp_path: Path, cache: None, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Limits of about a block, of several tensors, and of less than any tensor."""
    source = make(tmp_path / "model", "llama")
    monkeypatch.setattr(files, "SHARD_BYTES", limit)
    out = written(source, tmp_path / "out")
    index = json.loads((out / INDEX).read_text())
    shards = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(shards) > 1
    assert shards == sorted(set(index["weight_map"].values()))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert index["metadata"]["total_size"] == Checkpoint(source).nbytes == Checkpoint(out).nbytes
    for shard in shards:
        sizes = [tensor.numel() * tensor.itemsize for tensor in load_file(out / shard).values()]
        assert sum(sizes) <= limit or len(sizes) == 1
    ids = torch.arange(3, 12)[None]
    with torch.inference_mode():
        assert torch.equal(load(out)(ids).logits, load(source)(ids).logits)


def test_shards_are_read_again_and_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(tmp_path / "model", "llama")
    monkeypatch.setattr(files, "SHARD_BYTES", 20_000)
    sharded = written(source, tmp_path / "sharded")
    monkeypatch.undo()
    joined = written(sharded, tmp_path / "joined")
    assert [file.name for file in joined.glob("*.safetensors*")] == ["model.safetensors"]
    before, after = weights(source), weights(joined)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_other_files_come_along_and_weights_do_not(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "sub").mkdir(parents=True)
    out.mkdir()
    kept = ["config.json", "tokenizer.json", "chat_template.jinja", "LICENSE", "generation_config.json"]
    left = ["model.safetensors", "pytorch_model.bin", INDEX, "weights.gguf", ".gitattributes"]
    for name in kept + left:
        (source / name).write_text("{}")
    copy_other_files(source, out)
    assert sorted(file.name for file in out.iterdir()) == sorted(kept)


def test_the_fingerprint_changes_with_the_weights_and_only_with_them(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a", "llama"), make(tmp_path / "b", "llama")
    assert Checkpoint(first).fingerprint() == Checkpoint(second).fingerprint()
    assert Checkpoint(make(tmp_path / "c", "llama", seed=1)).fingerprint() != Checkpoint(first).fingerprint()


def test_the_fingerprint_is_read_once_and_again_when_a_file_changed(
    own_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(own_llama)
    first = checkpoint.fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "_read_fingerprint", lambda _: pytest.fail("read again"))
        assert checkpoint.fingerprint() == first
    edit(own_llama, "model.layers.0.mlp.up_proj.weight", lambda weight: weight.neg())
    second = checkpoint.fingerprint()
    assert second != first
    (own_llama / "config.json").write_text((own_llama / "config.json").read_text() + " ")
    assert checkpoint.fingerprint() not in (first, second)


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_files_are_found_when_opened(mixed: Path, keep: int) -> None:
    file = mixed / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(AceError, match="not a whole safetensors file") as caught:
        Checkpoint(mixed)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "header", [b"[]", b"{", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b"\xff\xfe",
     b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}']
)  # fmt: skip
def test_nonsense_headers_are_found_when_opened(mixed: Path, header: bytes) -> None:
    (mixed / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(AceError, match="not a whole safetensors file"):
        Checkpoint(mixed)


def test_a_shape_that_contradicts_its_bytes_is_found_when_opened(mixed: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,8]}}'
    (mixed / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(AceError, match=r"model\.safetensors"):
        Checkpoint(mixed)


def test_missing_parts_are_named(mixed: Path, tmp_path: Path) -> None:
    (mixed / "model.safetensors").rename(mixed / "model-00001-of-00002.safetensors")
    weight_map = {"float32": "model-00001-of-00002.safetensors", "lost": "model-00002-of-00002.safetensors"}
    (mixed / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(AceError, match=r"model-00002-of-00002\.safetensors"):
        Checkpoint(mixed)
    (mixed / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weight_map, weight_map["float32"])}))
    with pytest.raises(AceError, match="lost"):
        Checkpoint(mixed)
    (mixed / INDEX).write_text("{")
    with pytest.raises(AceError, match="JSON"):
        Checkpoint(mixed)


def test_folders_that_are_no_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(AceError, match=r"config\.json"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AceError, match="safetensors"):
        Checkpoint(tmp_path)
