"""What comes from outside is checked where it enters: JSON, headers, indexes, folders, configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ace_cli.core.errors import AceError, first_line
from ace_cli.core.json_reader import parse_object, read_object
from ace_cli.model.files import Checkpoint
from ace_cli.model.folder import INDEX, TEMPLATES, copy_other_files, weight_map
from ace_cli.model.header import read_header
from ace_cli.model.source import ModelConfig, open_model


def refusal(action: Any, *arguments: Any) -> str:
    """The one line with which ``action`` refuses."""
    with pytest.raises(AceError) as caught:
        action(*arguments)
    assert str(caught.value).isprintable()
    return str(caught.value)


# --- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[]", "a list"), (b"5", "a number"), (b"1e3", "a number"), (b"null", "null"), (b"true", "true or false"),
        (b'"x"', "a string"), (b"", "JSON"), (b"{", "JSON"), (b"\xff\xfe\x00", "JSON"),
        (b'{"a":' * 100_000, "too deeply"), (b"[" * 100_000, "too deeply"), (b"[" * 200 + b"]" * 200, "a list"),
        (b'{"a":' + b"[" * 200 + b"]" * 200 + b"}", "too deeply"), (b'{"a":' + b"1" * 5000 + b"}", "JSON"),
        (b'{"\\ud800": 1}', "JSON"),
    ],
)  # fmt: skip
def test_what_is_no_json_object_is_refused_in_one_line(text: bytes, words: str) -> None:
    assert words in refusal(parse_object, text, "x.json")


def test_plain_json_is_read(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, None, {"b": "ü\ud83d\ude00"}], "wide": [[i] for i in range(300)]}
    (tmp_path / "x.json").write_text(json.dumps(content))
    assert read_object(tmp_path / "x.json") == json.loads(json.dumps(content))
    assert "cannot be read" in refusal(read_object, tmp_path)


def test_a_message_has_no_control_characters_and_an_end() -> None:
    fault = AceError("a\nb\x1b[2J " + "x" * 5000, "do\u2028this")
    assert str(fault).isprintable()
    assert len(str(fault)) < 600


def test_a_cause_on_the_second_line_is_told() -> None:
    fault = ValueError("Validation error for field 'x':\n    TypeError: expected int, got list\nmore")
    assert first_line(fault) == "Validation error for field 'x': TypeError: expected int, got list"
    assert first_line(KeyError()) == "KeyError"


# --- headers ---------------------------------------------------------------------------------------------------------


def with_header(file: Path, change: Any, data: bytes | None = None) -> Path:
    """``file`` with its header changed in place by ``change``."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + (raw[8 + length :] if data is None else data))
    return file


HEADERS: dict[str, Any] = {
    "overlap": lambda h: h["b"].update(data_offsets=[0, 24]),
    "negative": lambda h: h["a"].update(data_offsets=[-24, 0]),
    "hole": lambda h: h["b"].update(data_offsets=[32, 56]),
    "float shape": lambda h: h["a"].update(shape=[2.0, 3]),
    "true in a shape": lambda h: h["a"].update(shape=[True, 6]),
    "negative shape": lambda h: h["a"].update(shape=[-2, -3]),
    "absurd shape": lambda h: h["a"].update(shape=[0, 10**30], data_offsets=[0, 0]),
    "float offsets": lambda h: h["a"].update(data_offsets=[0.0, 24.0]),
    "three offsets": lambda h: h["a"].update(data_offsets=[0, 24, 48]),
    "no offsets": lambda h: h["a"].pop("data_offsets"),
    "dtype list": lambda h: h["a"].update(dtype=["F32"]),
    "dtype too wide": lambda h: h["a"].update(dtype="F64"),
    "lost tensor": lambda h: h.pop("a"),
    "beyond the end": lambda h: h["b"].update(shape=[2, 6], data_offsets=[24, 72]),
    "a list": lambda h: h.update(a=[1]),
    "line break": lambda h: h.update({"x\ny": h.pop("a") | {"shape": [7]}}),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_the_format_forbids_are_refused(tmp_path: Path, name: str) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, 3)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    assert len(read_header(tmp_path / "x.safetensors")) == 2
    file = with_header(tmp_path / "x.safetensors", HEADERS[name])
    assert "not a whole safetensors file" in refusal(read_header, file)
    with pytest.raises((SafetensorError, OSError)):
        safe_open(file, "pt")  # as the format's own reader does


def test_a_shape_of_thousands_of_axes_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    file = with_header(tmp_path / "x.safetensors", lambda h: h["a"].update(shape=[1] * 5000 + [3]))
    assert len(refusal(read_header, file)) < 2000


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    with open(tmp_path / "x.safetensors", "ab") as stream:
        stream.write(b"more")
    assert "16 bytes of tensors, the header counts 12" in refusal(read_header, tmp_path / "x.safetensors")


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [5, None, ["a"], {}, "", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "c:x",
                                  "a\0b", "x" * 5000])  # fmt: skip
def test_an_index_names_plain_files_alone(own_llama: Path, name: Any) -> None:
    (own_llama / "model.safetensors").rename(own_llama / "model-00001-of-00001.safetensors")
    (own_llama / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    assert "no name of a file beside it" in refusal(Checkpoint, own_llama)


@pytest.mark.parametrize("content", [[], {}, {"weight_map": []}, {"weight_map": None}, 3])
def test_an_index_without_a_map(tmp_path: Path, content: Any) -> None:
    (tmp_path / INDEX).write_text(json.dumps(content))
    assert INDEX in refusal(weight_map, tmp_path / INDEX)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "LICENSE", "gone.txt"])
def test_a_link_out_of_the_folder_is_refused(own_llama: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("of another folder")
    (own_llama / name).unlink(missing_ok=True)
    (own_llama / name).symlink_to(tmp_path / ("nowhere" if name == "gone.txt" else "secret"))
    line = refusal(open_model, ModelConfig(path=str(own_llama)))
    assert name in line
    assert "is a link to" in line


def test_a_folder_of_templates_elsewhere_is_refused(own_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (own_llama / TEMPLATES).symlink_to(tmp_path / "elsewhere")
    assert "is a link to" in refusal(Checkpoint, own_llama)


@pytest.mark.parametrize("where", ["the hub's cache", "a cache elsewhere", "the folder itself"])
def test_links_of_the_hubs_cache_are_followed(
    own_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    home = tmp_path / "hub"
    if where == "the hub's cache":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home))
    snapshot = home / "models--o--n" / "snapshots" / "abc"
    blobs = snapshot if where == "the folder itself" else home / "models--o--n" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(sorted(own_llama.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(blobs / str(number))
    (tmp_path / "by_link").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "by_link"):
        assert open_model(ModelConfig(path=str(folder))).tensors


@pytest.mark.parametrize("beside", [True, False])
def test_an_adapter_is_refused_by_name(own_llama: Path, beside: bool) -> None:
    if not beside:
        (own_llama / "config.json").unlink()
        (own_llama / "model.safetensors").unlink()
    (own_llama / "adapter_config.json").write_text("{}")
    line = refusal(open_model, ModelConfig(path=str(own_llama)))
    assert "PEFT adapter" in line
    assert "merge_and_unload" in line


def test_chat_templates_of_the_sub_folder_come_along(own_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (own_llama / TEMPLATES).mkdir()
    (own_llama / TEMPLATES / "tool_use.jinja").write_text("tools: {{ messages[0]['content'] }}")
    (own_llama / "chat_template.jinja").write_text("plain: {{ messages[0]['content'] }}")
    (tmp_path / "out").mkdir()
    copy_other_files(own_llama, tmp_path / "out")
    messages = [{"role": "user", "content": "w3"}]
    said = [
        AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, chat_template="tool_use", tokenize=False)
        for folder in (own_llama, tmp_path / "out")
    ]
    assert said == ["tools: w3", "tools: w3"]
