"""What comes from outside is checked where it enters: JSON, headers, indexes, folders, configurations."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from test_families import stream, streamed
from test_odd_checkpoints import plan_of, reconfigure, rewrite
from tiny_models import make, token_windows
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import ace_cli
from ace_cli.core.errors import AceError, first_line, wider_than
from ace_cli.core.json_reader import parse_object, read_object
from ace_cli.data.documents import load_tokenizer
from ace_cli.data.generation import sample_windows, whole_model
from ace_cli.evaluation.perplexity import perplexity, window_losses
from ace_cli.model.files import Checkpoint
from ace_cli.model.folder import INDEX, TEMPLATES, copy_other_files, weight_map
from ace_cli.model.header import read_header
from ace_cli.model.source import ModelConfig, open_model
from ace_cli.report.card import model_card, without_places


def refusal(action: Any, *arguments: Any) -> str:
    """The one line with which ``action`` refuses."""
    with pytest.raises(AceError) as caught:
        action(*arguments)
    assert str(caught.value).isprintable()
    return str(caught.value)


def logits(model: Any) -> Tensor:
    return stream(model, token_windows(2, 20))[1]


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


def test_links_to_what_is_never_read_do_not_matter(own_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in ("logs", ".git"):
        (own_llama / name).symlink_to(tmp_path / "elsewhere")
    assert open_model(ModelConfig(path=str(own_llama))).tensors


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


# --- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["[]", "null", "5", '"x"', "{", "[" * 100_000])
def test_a_configuration_that_is_no_object(own_llama: Path, text: str) -> None:
    (own_llama / "config.json").write_text(text)
    assert "config.json" in refusal(streamed, own_llama)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000, the files hold 2 blocks"),
        ({"num_hidden_layers": 500}, "num_hidden_layers=500, the files hold 2 blocks"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "the files hold 2 blocks"),
        ({"num_labels": 10**9}, "num_labels=1000000000 is beyond any model"),
        ({"vocab_size": 10**400}, "vocab_size=1000000000"),
        ({"hidden_size": 10**9, "head_dim": 16}, "hidden_size=1000000000"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers': TypeError: Field 'num_hidden_layers' expected int"),
        ({"layer_types": ["full_attention"] * 3}, "must be equal to the number of `layer_types` (3). Mend its config"),
        ({"model_type": None}, "names no model_type"),
        ({"model_type": "of_tomorrow"}, "does not know the model_type 'of_tomorrow'. Only language models"),
        ({"model_type": "of_tomorrow", "auto_map": {"AutoConfig": "x.C"}}, "without running code that lies in"),
        ({"pad_token_id": 10**9}, "pad_token_id=1000000000 is beyond any model"),
        ({"pad_token_id": 500}, "Padding_idx"),
    ],
)  # fmt: skip
def test_configurations_that_no_model_has(own_llama: Path, change: dict[str, Any], words: str) -> None:
    assert words in refusal(streamed, reconfigure(own_llama, **change))


@pytest.mark.parametrize("config", [{"num_local_experts": 10**7}, {"num_local_experts": 10**5}])
def test_counts_beyond_the_file_do_not_run_for_hours(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = reconfigure(make(tmp_path / "m", "jamba", mamba_d_state=4), **config)
    refusal(plan_of, folder)


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_another_number_of_experts_than_the_files_hold(tmp_path: Path, count: int) -> None:
    refusal(plan_of, reconfigure(make(tmp_path / "m", "mixtral"), num_local_experts=count))


def test_what_computes_is_chosen_here(own_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration may name kernels to be fetched from the hub, or ask for tuples."""
    names = {"_attn_implementation": "nobody/kernel", "attn_implementation": "nobody/kernel", "return_dict": False,
             "experts_implementation": "nobody/kernel", "_experts_implementation": "nobody/kernel",
             "dtype": "nonsense"}  # fmt: skip
    expected = logits(streamed(own_llama))
    assert torch.equal(logits(streamed(reconfigure(own_llama, **names))), expected)
    whole = whole_model(Checkpoint(own_llama), "auto", "cpu", "")
    assert whole.dtype == torch.float32
    assert torch.allclose(whole(token_windows(2, 20)).logits, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama_of_mine", "llama"])
def test_code_of_a_checkpoint_is_never_run(
    own_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Neither of its model nor of its tokenizer, and nobody is asked whether it may."""
    (own_llama / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'evil')!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class C(LlamaConfig):\n    model_type = 'llama_of_mine'\n"
        "class M(LlamaForCausalLM):\n    config_class = C\n"
        "class T(PreTrainedTokenizerFast):\n    pass\n"
    )
    code = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    reconfigure(own_llama, model_type=kind, auto_map=code)
    tokenizer = json.loads((own_llama / "tokenizer_config.json").read_text()) | {"auto_map": code}
    (own_llama / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr("builtins.input", lambda _: "y")
    checkpoint = open_model(ModelConfig(path=str(own_llama)))
    assert load_tokenizer(checkpoint)("w3")["input_ids"] == [3]
    if kind == "llama":
        assert type(streamed(own_llama).skeleton).__name__ == "LlamaForCausalLM"
        whole_model(checkpoint, "auto", "cpu", "")
    else:
        assert "llama_of_mine" in refusal(streamed, own_llama)
        assert "llama_of_mine" in refusal(whole_model, checkpoint, "auto", "cpu", "")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("file", sorted(Path(ace_cli.__file__).parent.rglob("*.py")), ids=lambda file: file.stem)
def test_remote_code_is_declined_wherever_transformers_loads_something(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call) or "GenerationConfig" in (call := ast.unparse(node.func)):  # JSON alone
            continue
        if call.endswith((".from_pretrained", ".from_config")):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert given.get("trust_remote_code") == "False", f"line {node.lineno}"


def head(tensors: dict[str, Tensor], other: Tensor | None = None) -> dict[str, Tensor]:
    """With a stored head: the embedding's values, or ``other``."""
    name = next(name for name in tensors if "embed_tokens" in name or name.endswith("wte.weight"))
    return tensors | {"lm_head.weight": tensors[name].clone() if other is None else other}


OTHER = 0.15 * torch.randn(128, 64, generator=torch.Generator().manual_seed(5))
TIED = {"tie_word_embeddings": True}
#: Odd folders that transformers loads: family, its options, changes of config.json, changes of the tensors.
FOLDERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], Any]] = {
    "tied, a head of other values": ("llama", TIED, {}, lambda t: head(t, OTHER)),
    "tied, a head of the same values": ("llama", TIED, {}, head),
    "tied, only the head": (
        "llama", TIED, {}, lambda t: {("lm_head.weight" if "embed" in name else name): v for name, v in t.items()},
    ),
    "tied, a head in 16 bits": ("llama", TIED, {}, lambda t: head(t, t["model.embed_tokens.weight"].bfloat16())),
    "tied by default, a head of other values": ("gpt2", {}, {}, lambda t: head(t, OTHER)),
    "without a prefix, a head of other values": (
        "gpt2", {}, {}, lambda t: {name.removeprefix("transformer."): v for name, v in head(t, OTHER).items()},
    ),
    "scaled, a head of other values": ("gemma2", {}, {}, lambda t: head(t, OTHER)),
    "a model without its head's prefix": (
        "llama", TIED, {}, lambda t: {name.removeprefix("model."): v for name, v in t.items()},
    ),
    "untied, but declared": ("llama", {}, TIED, lambda t: t),
    "tied, declared untied, both stored": ("llama", TIED, {"tie_word_embeddings": False}, head),
    "half precision": ("llama", {}, {}, lambda t: {name: v.half() for name, v in t.items()}),
    "another class named": ("llama", {}, {"architectures": ["Qwen2ForCausalLM"]}, lambda t: t),
    "options of training": ("llama", {}, {"attention_dropout": 0.5, "output_attentions": True}, lambda t: t),
    "rope as it was written before": (
        "llama", {}, {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5000.0}, lambda t: t,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_what_transformers_loads_is_what_is_measured(tmp_path: Path, name: str) -> None:
    family, options, entries, change = FOLDERS[name]
    folder = rewrite(reconfigure(make(tmp_path / "m", family, **options), **entries), change)
    ids = token_windows(3, 20)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        of_theirs = model(ids).logits[:, :-1]
    theirs = perplexity([float(cross_entropy(a, b)) for a, b in zip(of_theirs.double(), ids[:, 1:], strict=True)])
    ours = streamed(folder)
    ours.check_complete()
    assert perplexity(window_losses(ours, ids)) == pytest.approx(theirs, rel=1e-5)


# --- what the files lack ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "change", "words"),
    [
        ({}, lambda t: {f"_orig_mod.{name}": v for name, v in t.items()}, "begin with '_orig_mod.'"),
        ({}, lambda t: {f"module.model.{name}": v for name, v in t.items()}, "begin with 'module.model.'"),
        ({"num_hidden_layers": 4}, lambda t: t, "asks for 4 blocks, the files hold 2"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            lambda t: {name.replace("lm_head", "score"): v for name, v in t.items()},
            "(LlamaForSequenceClassification) has no lm_head.weight: a base or reward model",
        ),
        ({}, lambda t: {name: v for name, v in t.items() if "1.mlp.up" not in name}, "no weight for model.layers.1"),
        ({}, lambda t: t | {"model.norm.weight": torch.ones(32)}, "model.norm.weight is (32,) in the file"),
        *(
            ({}, lambda t, dtype=dtype: {name: v.to(dtype) if "q_proj" in name else v for name, v in t.items()}, kind)
            for dtype, kind in (
                (torch.int8, "stored as I8"), (torch.bool, "stored as BOOL"), (torch.int64, "stored as I64"),
                (torch.float8_e4m3fn, "stored as F8_E4M3"),
            )
        ),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_first(own_llama: Path, entries: dict[str, Any], change: Any, words: str) -> None:
    rewrite(reconfigure(own_llama, **entries), change)
    line = refusal(plan_of, own_llama)
    assert words in line
    assert "slots.py" not in line


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def added(own_llama: Path) -> Path:
    """Token 128, <new>, is in the tokenizer and not in the model."""
    tokenizer = load_tokenizer(Checkpoint(own_llama))
    tokenizer = type(tokenizer).from_pretrained(own_llama)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(own_llama)
    return own_llama


@pytest.mark.parametrize("where", ["calib", "eval"])
def test_a_token_that_the_model_lacks_is_named_before_work_begins(
    added: Path, tmp_path: Path, documents: Path, prune_here: Any, where: str
) -> None:
    file = tmp_path / "new.jsonl"
    file.write_text(json.dumps({"text": "w3 <new> " * 200}) + "\n")
    texts = {"calib": documents, "eval": documents, where: file}
    options = [option for name, path in texts.items() for option in (f"{name}=text", f"{name}.path={path}")]
    line = refusal(
        prune_here, added, tmp_path / "out", *options, "metric=wanda", "sparsity=2:4", "calib.n_samples=4",
        "eval.seq_len=16",
    )  # fmt: skip
    assert "Token 128 ('<new>') of the" in line
    assert "knows 128 tokens" in line
    assert not (tmp_path / "out" / "checkpoint.partial").exists()


@pytest.mark.parametrize(("value", "fine"), [(-1, True), (None, True), (10**9, False), (128, False)])
def test_absurd_start_tokens(own_llama: Path, value: int | None, fine: bool) -> None:
    checkpoint = Checkpoint(reconfigure(own_llama, bos_token_id=value))
    if fine:
        assert sample_windows(checkpoint, 2, 8, 0, 0, "cpu").shape == (2, 8)
    else:
        assert f"Token {value} of the text" in refusal(sample_windows, checkpoint, 2, 8, 0, 0, "cpu")


def test_no_tokenizer(own_llama: Path) -> None:
    for file in own_llama.glob("*token*"):
        file.unlink()
    assert "has no tokenizer (tokenizer.json, say)" in refusal(load_tokenizer, Checkpoint(own_llama))
    (own_llama / "tokenizer.json").write_text("[")
    assert "no usable tokenizer: " in refusal(load_tokenizer, Checkpoint(own_llama))


def test_nobody_is_told_to_try_the_dtype_that_was_used() -> None:
    assert "Try dtype=float32" in wider_than(torch.bfloat16)
    assert "Try --dtype float32" in wider_than("bfloat16", "--dtype ")
    assert "Try" not in wider_than(torch.float32) + wider_than("float32")


# --- what a checkpoint tells -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("ace-prune model=x output_dir=/home/me/out metric=wanda", "ace-prune model=x metric=wanda"),
        ("ace-prune model.path=/home/me/models/m calib.path=~/t.txt", "ace-prune model.path=m calib.path=t.txt"),
        ("ace-prune model.path=org/name sparsity=2:4", "ace-prune model.path=org/name sparsity=2:4"),
        ("ace-prune 'model.path=\"/home/me/my models/m\"'", "ace-prune model.path=m"),
        (
            "ace-prune --config-dir /home/me/configs 'x=[/home/me/a,/home/me/b,2]'",
            "ace-prune --config-dir configs 'x=[a,b,2]'",
        ),
        ("ace-prune models/m 'allocation=[1/2,3]'", "ace-prune models/m 'allocation=[1/2,3]'"),
    ],
)
def test_a_command_for_others_names_no_place(command: str, expected: str) -> None:
    assert without_places(command) == expected


SUMMARY = {"method": "wanda", "pattern": "2:4", "sparsity": 0.5}


def card_data(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_the_licence_of_the_source_is_kept() -> None:
    source = (
        "---\nlicense: other\nlicense_name: mine\nlanguage:\n- en\n- 'no'\ntags: [chat, sparsity]\n"
        "base_model: org/older\nmodel-index: [{name: x, results: []}]\nlibrary_name: gguf\n---\n# Dense\n"
    )
    data = card_data(model_card("org/dense", True, "ace-prune", SUMMARY, source))
    assert data == {
        "license": "other", "license_name": "mine", "language": ["en", "no"], "library_name": "transformers",
        "pipeline_tag": "text-generation", "base_model": "org/dense", "base_model_relation": "finetune",
        "tags": ["chat", "sparsity", "pruning", "wanda", "2:4"],
    }  # fmt: skip
    local = card_data(model_card("dense", False, "ace-prune", SUMMARY, source))
    assert local["base_model"] == "org/older"
    assert "base_model_relation" not in local


@pytest.mark.parametrize("source", ["", "no head", "---\n- a\n---\n", "---\n{\n---\n", "---\nlicense: [[1]]\n---",
                                    f"---\n{'[' * 5000}\n---", "---\ntags: 5\n---"])  # fmt: skip
def test_cards_of_anything(source: str) -> None:
    assert card_data(model_card("dense", False, "ace-prune", SUMMARY, source)) == {
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["pruning", "sparsity", "wanda", "2:4"],
    }  # fmt: skip


def test_a_local_folder_is_no_name_on_the_hub(own_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_llama.parent.parent)
    relative = ModelConfig(path=f"{own_llama.parent.name}/{own_llama.name}")
    assert (relative.on_hub, relative.name) == (False, own_llama.name)
    assert (ModelConfig(path="org/name").on_hub, ModelConfig(path="org/name").name) == (True, "org/name")
    assert ModelConfig(path="package:p/x.gguf").name == "package:p/x.gguf"


def test_the_same_run_from_another_folder_gives_the_same_bytes(own_llama: Path, tmp_path: Path, here: Any) -> None:
    (own_llama / "README.md").write_text("---\nlicense: mit\n---\n")
    for name in ("one", "two"):
        shutil.copytree(own_llama, tmp_path / name / "dense")
        done = here(
            f"model.path={tmp_path / name / 'dense'}", "metric=magnitude", "sparsity=2:4", "eval=none", "html=false",
            f"output_dir={tmp_path / name / 'out'}",
        )  # fmt: skip
        assert done.returncode == 0
    one, two = (tmp_path / name / "out" / "checkpoint" for name in ("one", "two"))
    for file in sorted(one.iterdir()):
        content = file.read_bytes()
        assert content == (two / file.name).read_bytes(), file.name
        assert str(tmp_path).encode() not in content, file.name
    assert "license: mit" in (one / "README.md").read_text()
