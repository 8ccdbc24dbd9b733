"""Where models come from: folders, GGUF files, packages, .bin files; the hub only as far as it is absent."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import load, make, weights

from ace_cli.core.cache import cache_folder
from ace_cli.core.errors import AceError
from ace_cli.core.steps import Steps
from ace_cli.model import source
from ace_cli.model.files import Checkpoint
from ace_cli.model.source import ImportDtype, ModelConfig, open_model
from ace_cli.model.streamed import StreamedModel

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ACE_PRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_folder_is_taken_as_it_is(llama: Path, own_cache: Path) -> None:
    assert open_model(ModelConfig(path=str(llama))).folder == llama
    assert not own_cache.exists()


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("ACE_PRUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "ace-prune"


# --- .bin ------------------------------------------------------------------------------------------------------------


def as_bin(folder: Path, shards: int = 1) -> dict[str, torch.Tensor]:
    """Turn a safetensors folder into a pytorch_model.bin folder with tied tensors that share memory."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return state
    names, weight_map = sorted(state), {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        torch.save({name: state[name] for name in names[number::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[number::shards], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return state


@pytest.mark.parametrize("shards", [1, 3])
def test_bin_files_are_imported_once(
    own_llama: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    state = as_bin(own_llama, shards)
    checkpoint = open_model(ModelConfig(path=str(own_llama)))
    assert own_cache in checkpoint.folder.parents
    assert weights(checkpoint.folder).keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights(checkpoint.folder).items())
    load(checkpoint.folder)
    assert (checkpoint.folder / "tokenizer.json").is_file()

    def never(*arguments: object) -> None:
        raise AssertionError("imported twice")

    monkeypatch.setattr(source, "import_bin", never)
    assert open_model(ModelConfig(path=str(own_llama))).folder == checkpoint.folder


def test_a_changed_bin_file_is_imported_anew(own_llama: Path) -> None:
    state = as_bin(own_llama)
    first = open_model(ModelConfig(path=str(own_llama))).folder
    torch.save({name: tensor + 1 for name, tensor in state.items()} | {"extra": torch.zeros(3)},
               own_llama / "pytorch_model.bin")  # fmt: skip
    assert open_model(ModelConfig(path=str(own_llama))).folder != first


def test_a_bin_file_that_would_run_code_is_refused(own_llama: Path, own_cache: Path, tmp_path: Path) -> None:
    (own_llama / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "evil",))

    torch.save({"weight": Evil()}, own_llama / "pytorch_model.bin")
    with pytest.raises(AceError, match=r"cannot be read safely: it asks for getattr, which is no tensor") as caught:
        open_model(ModelConfig(path=str(own_llama)))
    assert str(caught.value).isprintable()
    assert "weights_only" not in str(caught.value), "torch's own words say how to run it"
    assert not (tmp_path / "evil").exists()
    assert not list((own_cache / "imports").iterdir()), "a failed import left something in the cache"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "holds a list, where tensors by name"),
        (5, "holds a number"),
        (torch.zeros(3), "holds a Tensor"),
        ({"a": 1}, "a is a number, no tensor"),
        ({"state_dict": {"a": torch.zeros(2)}}, "state_dict is a dictionary, no tensor"),
        ({1: torch.zeros(2)}, "it holds a number 1, where the name"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "a is no plain tensor"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "a is stored as torch.complex64"),
        ({"a": torch.zeros(1).expand(10**12)}, "a has more values than the file stores"),
    ],
    ids=str,
)
def test_a_bin_file_of_anything_but_tensors_by_name(
    own_llama: Path, own_cache: Path, content: object, words: str
) -> None:
    (own_llama / "model.safetensors").unlink()
    torch.save(content, own_llama / "pytorch_model.bin")
    with pytest.raises(AceError) as caught:
        open_model(ModelConfig(path=str(own_llama)))
    assert words in str(caught.value)
    assert not list((own_cache / "imports").iterdir())


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_bin_folder_whose_other_files_changed_is_imported_anew(own_llama: Path, name: str) -> None:
    as_bin(own_llama)
    first = open_model(ModelConfig(path=str(own_llama)))
    text = (own_llama / name).read_text() + " "
    (own_llama / name).write_text(text)
    second = open_model(ModelConfig(path=str(own_llama)))
    assert (second.folder / name).read_text() == text
    assert second.origin != first.origin
    (own_llama / "README.md").write_text("decides nothing")
    assert open_model(ModelConfig(path=str(own_llama))).folder == second.folder


def test_a_damaged_import_is_made_again(own_llama: Path) -> None:
    state = as_bin(own_llama)
    folder = open_model(ModelConfig(path=str(own_llama))).folder
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-5])
    assert weights(open_model(ModelConfig(path=str(own_llama))).folder).keys() == state.keys()
    (folder / "tokenizer.json").unlink()
    assert (open_model(ModelConfig(path=str(own_llama))).folder / "tokenizer.json").is_file()


def test_a_file_that_changes_while_it_is_imported(
    own_llama: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_bin(own_llama)
    made = source.import_bin

    def changing(*arguments: Any) -> None:
        made(*arguments)
        (own_llama / "config.json").write_text("{}")

    monkeypatch.setattr(source, "import_bin", changing)
    with pytest.raises(AceError, match=r"config\.json was changed"):
        open_model(ModelConfig(path=str(own_llama)))
    assert not list((own_cache / "imports").iterdir())


def test_what_a_killed_import_left_goes_with_the_next_one(own_llama: Path, own_cache: Path) -> None:
    """Not what another process is making just now, and nothing that no import makes."""
    fcntl = pytest.importorskip("fcntl")
    as_bin(own_llama)
    left, busy, other = (own_cache / "imports" / name for name in (f"m-{'0' * 16}.abc_12", f"m-{'1' * 16}.xyz", "mine"))
    for folder in (left, busy, other):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text("large")
    opened = os.open(busy, os.O_RDONLY)
    fcntl.flock(opened, fcntl.LOCK_EX)
    open_model(ModelConfig(path=str(own_llama)))
    assert [folder.exists() for folder in (left, busy, other)] == [False, True, True]
    os.close(opened)


def test_an_import_of_files_that_are_no_more_goes_with_the_next_one(
    own_llama: Path, own_cache: Path, tmp_path: Path
) -> None:
    """After a day without use: a run may still read it. What can be found again stays, however old."""
    as_bin(own_llama)
    kept, moved, young = (shutil.copytree(own_llama, tmp_path / name) for name in ("kept", "moved", "young"))
    imports = {folder: open_model(ModelConfig(path=str(folder))).folder for folder in (own_llama, kept, moved, young)}
    for folder in (own_llama, kept, moved):
        os.utime(imports[folder] / ".import.json", (0, 0))
    for folder in (own_llama, young):
        (folder / "pytorch_model.bin").touch()
    moved.rename(tmp_path / "elsewhere")
    (other := own_cache / "imports" / f"mine-{'0' * 16}").mkdir()
    again = open_model(ModelConfig(path=str(own_llama))).folder
    assert {folder.name: imports[folder].exists() for folder in imports} == {
        "own_llama": False, "kept": True, "moved": False, "young": True
    }  # fmt: skip
    assert again.exists() and other.exists()


def test_using_an_import_makes_it_young(own_llama: Path) -> None:
    as_bin(own_llama)
    record = open_model(ModelConfig(path=str(own_llama))).folder / ".import.json"
    os.utime(record, (0, 0))
    open_model(ModelConfig(path=str(own_llama)))
    assert record.stat().st_mtime > 0


# --- GGUF ------------------------------------------------------------------------------------------------------------


#: transformers reads no other size of heads, or of experts, from files of these.
HEAD_SIZES = {"qwen3": 128, "qwen3moe": 128}
EXPERT_SIZE = {"moe_intermediate_size": 768}


def write_gguf(folder: Path, architecture: str, state: dict[str, torch.Tensor]) -> Path:
    """``state`` of a tiny model as a GGUF file, tensors as they are, with a tokenizer of whole words."""
    import gguf

    writer = gguf.GGUFWriter(str(folder / "tiny.gguf"), architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(32 if architecture.endswith("moe") else 96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_key_length(HEAD_SIZES.get(architecture, 16))
    writer.add_vocab_size(128)
    if architecture.endswith("moe"):
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
    tokens = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, 128))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 128)
    writer.add_token_types([2, 3, 3] + [1] * 125)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for name, tensor in stacked(state).items():
        writer.add_tensor(gguf_name(architecture, name), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "tiny.gguf"


def stacked(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One tensor for all experts of a layer, as GGUF has it."""
    groups: dict[str, list[torch.Tensor]] = {}
    for name, tensor in state.items():
        groups.setdefault(re.sub(r"experts\.\d+", "experts", name), []).append(tensor)
    return {name: torch.stack(found) if "experts." in name else found[0] for name, found in groups.items()}


def gguf_name(architecture: str, name: str) -> str:
    """gguf's own table of names."""
    import gguf

    kind = next(kind for kind, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture)
    found = gguf.get_tensor_name_map(kind, 2).get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return str(found)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as GGUF."""
    folder = tmp_path_factory.mktemp("gguf")
    return write_gguf(folder, "llama", weights(make(folder / "source", "llama")))


#: Families whose GGUF tensors are those of the checkpoint as they stand: model_type -> architecture.
GGUF_FAMILIES = {
    "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "phi3": "phi3", "starcoder2": "starcoder2",
    "stablelm": "stablelm",
}  # fmt: skip


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_gguf_of_other_families(tmp_path: Path, family: str) -> None:
    architecture = GGUF_FAMILIES[family]
    state = weights(make(tmp_path / "source", family, head_dim=HEAD_SIZES.get(architecture, 16), **EXPERT_SIZE))
    imported = open_model(ModelConfig(path=str(write_gguf(tmp_path, architecture, state)))).folder
    stored = weights(imported)
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], state[name]) for name in state)
    slots = [slot for b in StreamedModel(Checkpoint(imported), CPU, torch.float32).blocks for slot in b.slots]
    assert len(slots) >= 8


def test_gguf_files_are_imported_once(gguf_file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []

    class Heard(Steps):
        def of(self, total: int) -> None:
            heard.append(total)

        def __call__(self) -> None:
            heard.append(1)

    checkpoint = open_model(ModelConfig(path=str(gguf_file)), Heard())
    assert heard == [heard[0], *[1] * heard[0]], "every tensor is a step"
    assert heard[0] >= len(checkpoint.tensors)
    assert own_cache in checkpoint.folder.parents
    original = weights(gguf_file.parent / "source")
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        assert torch.equal(weights(checkpoint.folder)[name], original[name]), name
    assert "quantization_config" not in checkpoint.config()

    def never(*arguments: object) -> None:
        raise AssertionError("imported twice")

    monkeypatch.setattr(source, "import_gguf", never)
    assert open_model(ModelConfig(path=str(gguf_file))).folder == checkpoint.folder


def test_the_import_dtype_is_part_of_the_cache_s_key(gguf_file: Path) -> None:
    half = open_model(ModelConfig(path=str(gguf_file), import_dtype=ImportDtype.bfloat16))
    assert {tensor.dtype for tensor in weights(half.folder).values()} == {torch.bfloat16}
    whole = open_model(ModelConfig(path=str(gguf_file)))
    assert whole.folder != half.folder


@pytest.mark.parametrize("keep", [0, 3, 200, 5000])
def test_a_truncated_gguf_file(gguf_file: Path, tmp_path: Path, own_cache: Path, keep: int) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf_file.read_bytes()[:keep])
    with pytest.raises(AceError, match="cannot be imported") as caught:
        open_model(ModelConfig(path=str(broken)))
    assert "\n" not in str(caught.value)
    assert not list((own_cache / "imports").glob("broken*"))


def test_a_truncated_gguf_file_says_so(gguf_file: Path, tmp_path: Path) -> None:
    whole = gguf_file.read_bytes()
    for keep, words in (
        (2, "it ends at byte 2, inside its header"),
        (200, "inside its header"),
        (len(whole) - 40, "its tensors end at byte"),
    ):
        (tmp_path / "broken.gguf").write_bytes(whole[:keep])
        with pytest.raises(AceError, match=words):
            open_model(ModelConfig(path=str(tmp_path / "broken.gguf")))


def test_one_file_of_a_split_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    add = gguf.GGUFWriter.add_vocab_size

    def split(self: gguf.GGUFWriter, size: int) -> None:
        add(self, size)
        self.add_uint16("split.count", 2)

    monkeypatch.setattr(gguf.GGUFWriter, "add_vocab_size", split)
    state = weights(make(tmp_path / "source", "llama"))
    first = write_gguf(tmp_path, "llama", {name: tensor for name, tensor in state.items() if "layers.1" not in name})
    with pytest.raises(AceError, match="one of 2 files"):
        open_model(ModelConfig(path=str(first)))


@pytest.mark.parametrize("lost", ["layers.1.", "layers.1.mlp.up_proj", "model.norm", "embed_tokens"])
def test_a_gguf_file_that_lacks_tensors_is_refused(tmp_path: Path, own_cache: Path, lost: str) -> None:
    """transformers would fill them with random numbers."""
    state = weights(make(tmp_path / "source", "llama"))
    file = write_gguf(tmp_path, "llama", {name: tensor for name, tensor in state.items() if lost not in name})
    with pytest.raises(AceError, match=r"counts 2 blocks, it holds 1" if lost == "layers.1." else "lacks .*" + lost):
        open_model(ModelConfig(path=str(file)))
    assert not list((own_cache / "imports").iterdir())


def test_what_lies_beside_a_gguf_file_does_not_matter(gguf_file: Path, tmp_path: Path) -> None:
    expected = weights(open_model(ModelConfig(path=str(gguf_file))).folder)
    shutil.copy(gguf_file, tmp_path / "other.gguf")
    for name in ("adapter_config.json", "config.json", "generation_config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text('{"model_type": "gpt2", "auto_map": {"AutoTokenizer": ["x.T", "x.T"]}}')
    found = weights(open_model(ModelConfig(path=str(tmp_path / "other.gguf"))).folder)
    assert found.keys() == expected.keys()


# --- packages and the hub --------------------------------------------------------------------------------------------


def test_a_file_inside_a_package(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "tiny_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    shutil.copy(gguf_file, package / "tiny.gguf")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert open_model(ModelConfig(path="package:tiny_package/tiny.gguf")).tensors
    assert "tiny_package" not in sys.modules
    with pytest.raises(AceError, match=r"no file other\.gguf"):
        open_model(ModelConfig(path="package:tiny_package/other.gguf"))


def test_a_package_that_is_not_installed_says_how_to_get_it() -> None:
    with pytest.raises(AceError, match="not installed") as caught:
        open_model(ModelConfig(path="package:no_such_package_1/x.gguf", install="Run: pip install it"))
    assert "Run: pip install it" in str(caught.value)


def test_no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(AceError, match="nobody/nothing") as caught:
        open_model(ModelConfig(path="nobody/nothing"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "expected"),
    [("", "no model"), ("/no/such/folder", "does not exist"), ("./x", "does not exist"),
     ("models/x.gguf", "does not exist"),
     (__file__, "is a file"), ("org/name", None), ("package:a/b", None), (".", None)],
)  # fmt: skip
def test_path_faults_the_local_disk_can_tell(path: str, expected: str | None) -> None:
    faults = ModelConfig(path=path).faults()
    assert (expected is None) == (faults == [])
    assert all(expected is not None and expected in fault for fault in faults)
