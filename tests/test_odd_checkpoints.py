"""Checkpoints as they are found in the wild: other names, dtypes, shards, leftovers; and those that are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import LENGTH, digests, prune_into, stream, streamed
from tiny_models import VOCABULARY, add_tokenizer, load, make, token_windows, weights
from torch import Tensor
from transformers import AutoModelForCausalLM

from ace_cli.core.errors import AceError
from ace_cli.methods.patterns import NofM
from ace_cli.model.pruned import verify
from ace_cli.model.source import ModelConfig, open_model
from ace_cli.run.plan import Demand, Plan, make_plan


def rewrite(folder: Path, change: Any) -> Path:
    """Replace the stored tensors by ``change(tensors)``."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


def reconfigure(folder: Path, **entries: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    return folder


def plan_of(folder: Path) -> Plan:
    model = streamed(folder)
    return make_plan(model, {slot.name: NofM(2, 4) for block in model.blocks for slot in block.slots}, Demand())


def assert_streams_and_prunes(folder: Path, out: Path) -> dict[str, Tensor]:
    """Logits as the whole model's, before and after; what changed is what was pruned. Returns the pruned tensors."""
    ids = token_windows(2, LENGTH)
    slots = prune_into(folder, out, "2:4")
    for where in (folder, out):
        _, logits = stream(streamed(where), ids)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, experts_implementation="eager").eval()
        with torch.inference_mode():
            assert torch.equal(logits, model(ids, use_cache=False).logits)
    before, after = digests(folder), digests(out)
    assert {name for name in before if before[name] != after[name]} == {slot.key for slot in slots}
    return weights(out)


# --- names -----------------------------------------------------------------------------------------------------------


def test_gpt2_as_on_the_hub(tmp_path: Path) -> None:
    """Without the prefix of the base model, and with masks that no parameter wants."""
    folder = make(tmp_path / "m", "gpt2")

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items() if "lm_head" not in name}
        return bare | {"h.0.attn.bias": torch.ones(1, 1, 128, 128)}

    after = assert_streams_and_prunes(rewrite(folder, change), tmp_path / "out")
    assert "h.0.attn.c_attn.weight" in after
    assert any("h.0.attn.bias" in line for line in plan_of(folder).copied)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_already_fused_in_the_file(tmp_path: Path, family: str) -> None:
    model = load(make(tmp_path / "per_expert", family))
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    after = assert_streams_and_prunes(tmp_path / "fused", tmp_path / "out")
    assert "model.layers.0.mlp.experts.gate_up_proj" in after
    names = [slot.name for slot in streamed(tmp_path / "fused").blocks[0].slots]
    assert "model.layers.0.mlp.experts.gate_up_proj.3" in names


def test_layers_that_the_model_does_not_read_are_copied_and_named(tmp_path: Path) -> None:
    """As the multi-token prediction layer of DeepSeek-V3 and GLM-4.5."""
    folder = make(tmp_path / "m", "glm4_moe")
    extra = "model.layers.2.mlp.down_proj.weight"
    rewrite(folder, lambda tensors: tensors | {extra: torch.ones(64, 96)})
    after = assert_streams_and_prunes(folder, tmp_path / "out")
    assert torch.equal(after[extra], torch.ones(64, 96))
    assert any(extra in line for line in plan_of(folder).copied)


def test_a_conversion_without_places_still_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules other than stacking and joining are run as transformers runs them; their results stay dense, with why."""
    from ace_cli.model.mapping import Mapping

    monkeypatch.setattr(Mapping, "_stacked", lambda self, rule, sources: [])
    folder = make(tmp_path / "m", "mixtral")
    ids, model = token_windows(2, LENGTH), streamed(folder)
    _, logits = stream(model, ids)
    with torch.inference_mode():
        assert torch.equal(logits, load(folder)(ids, use_cache=False).logits)
    with pytest.raises(AceError, match="without a place for each expert"):
        make_plan(model, {slot.name: NofM(2, 4) for block in model.blocks for slot in block.slots}, Demand())


# --- dtypes, shards, sizes -------------------------------------------------------------------------------------------


def test_mixed_dtypes_are_kept(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "mixtral")

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kinds = {".w1.": torch.bfloat16, ".w2.": torch.float16, "q_proj": torch.bfloat16}
        return {
            name: tensor.to(next((kind for part, kind in kinds.items() if part in name), tensor.dtype))
            for name, tensor in tensors.items()
        }

    rewrite(folder, change)
    after = assert_streams_and_prunes(folder, tmp_path / "out")
    assert {str(tensor.dtype) for tensor in after.values()} == {"torch.bfloat16", "torch.float16", "torch.float32"}


def test_experts_spread_over_shards_of_a_whole_run(tmp_path: Path, prune_here: Any) -> None:
    model = load(make(tmp_path / "one", "olmoe"))
    folder = tmp_path / "many"
    model.save_pretrained(folder, max_shard_size="30KB")
    (folder / "generation_config.json").unlink()
    assert len(list(folder.glob("*.safetensors"))) > 4
    prune_here(add_tokenizer(folder), tmp_path / "out", "metric=wanda", "sparsity=2:4")
    assert verify(tmp_path / "out" / "checkpoint") == 2 * (4 + 3 * 4)


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "gpt_oss"])
def test_bin_files_of_odd_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setenv("ACE_PRUNE_CACHE", str(tmp_path / "cache"))
    folder = make(tmp_path / "m", family)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_streams_and_prunes(open_model(ModelConfig(path=str(folder))).folder, tmp_path / "out")


@pytest.mark.parametrize(
    "options",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False, "vocab_size": VOCABULARY + 64},  # padded to a multiple, as many are
    ],
)
def test_biases_ties_and_padded_vocabularies(tmp_path: Path, options: dict[str, Any]) -> None:
    assert_streams_and_prunes(make(tmp_path / "m", "llama", **options), tmp_path / "out")


def test_a_vocabulary_larger_in_the_file_than_in_the_configuration_is_refused(tmp_path: Path) -> None:
    folder = reconfigure(make(tmp_path / "m", "llama"), vocab_size=VOCABULARY - 8)
    with pytest.raises(AceError, match=r"embed_tokens|lm_head"):
        plan_of(folder)


def test_a_lost_expert_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "mixtral")
    lost = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    rewrite(folder, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != lost})
    with pytest.raises(AceError, match="down_proj"):
        plan_of(folder)


def test_a_layer_of_experts_larger_than_memory_is_planned_without_it(tmp_path: Path) -> None:
    """30 GB of experts in one parameter; the file is a header and a hole."""
    hidden, inner, experts = 4096, 14336, 64
    block = "model.layers.0"
    shapes = {f"{block}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
    shapes |= {f"{block}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes |= {
        "model.embed_tokens.weight": (128, hidden),
        "lm_head.weight": (128, hidden),
        "model.norm.weight": (hidden,),
    }
    shapes |= {f"{block}.block_sparse_moe.gate.weight": (experts, hidden)}
    for expert in range(experts):
        sizes = {"w1": (inner, hidden), "w3": (inner, hidden), "w2": (hidden, inner)}
        shapes |= {f"{block}.block_sparse_moe.experts.{expert}.{name}.weight": size for name, size in sizes.items()}
    header, end = {}, 0
    for name, size in shapes.items():
        start, end = end, end + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    config = {
        "model_type": "mixtral", "hidden_size": hidden, "intermediate_size": inner, "num_local_experts": experts,
        "num_hidden_layers": 1, "vocab_size": 128, "num_attention_heads": 32, "num_key_value_heads": 32,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = plan_of(tmp_path)
    assert plan.slot_weights == 4 * hidden**2 + 3 * experts * hidden * inner
    assert plan.host_bytes > 4 * plan.slot_weights


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        {"quantization_config": {"quant_method": "mxfp4"}},
        {"compression_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
        {"text_config": {"quantization_config": {"quant_method": "awq"}}},
    ],
)
def test_quantised_by_configuration(tmp_path: Path, entry: dict[str, Any]) -> None:
    folder = reconfigure(make(tmp_path / "m", "llama"), **entry)
    with pytest.raises(
        AceError, match=r"is quantised \((bitsandbytes|gptq|awq|fp8|mxfp4|compressed-tensors)\)"
    ) as caught:
        streamed(folder)
    assert "Prune the 16-bit original" in str(caught.value)


@pytest.mark.parametrize("suffix", [".qweight", ".weight_packed", ".weight_scale_inv", ".weight.absmax"])
def test_quantised_by_its_tensors_alone(tmp_path: Path, suffix: str) -> None:
    name = f"model.layers.0.mlp.up_proj{suffix}"
    folder = rewrite(make(tmp_path / "m", "llama"), lambda t: t | {name: torch.zeros(4, 4, dtype=torch.int32)})
    with pytest.raises(AceError, match=r"is quantised.*up_proj"):
        streamed(folder)


# --- families that nobody has listed ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [("arcee", {}), ("seed_oss", {}), ("biogpt", {}), ("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2})],
)
def test_an_unlisted_family_works(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    folder = make(tmp_path / "m", family, **options)
    assert_streams_and_prunes(folder, tmp_path / "out")
    assert plan_of(folder).coverage > 0.9


def test_a_class_that_is_not_known_is_named_with_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ace_cli.model import slots

    monkeypatch.delitem(slots.STORED_TRANSPOSED, "Conv1D")
    with pytest.raises(AceError) as caught:
        plan_of(make(tmp_path / "m", "gpt2"))
    for text in ("GPT2LMHeadModel", "c_attn.weight", "Conv1D", "STORED_TRANSPOSED"):
        assert text in str(caught.value)


def test_blocks_that_cannot_be_told_are_refused_with_the_lists_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ace_cli.model import streamed as module

    build = module.checked_skeleton

    def unannotated(*args: Any) -> Any:
        skeleton = build(*args)
        skeleton._no_split_modules = set()
        return skeleton

    monkeypatch.setattr(module, "checked_skeleton", unannotated)
    with pytest.raises(AceError) as caught:
        streamed(make(tmp_path / "m", "llama"))
    assert "LlamaForCausalLM" in str(caught.value)
    assert "BLOCKS" in str(caught.value)
    assert "model.layers of 2 LlamaDecoderLayer" in str(caught.value)
