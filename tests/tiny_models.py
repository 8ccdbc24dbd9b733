"""Tiny random checkpoints: one row per family, weights large enough that every part of a block matters."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 128
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

MOE: dict[str, Any] = {
    "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
#: Multi-head latent attention, and a dense first layer.
LATENT: dict[str, Any] = {
    "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip

#: model_type -> what it needs beyond COMMON; None takes a key away. A second row of a type names its "model_type".
DENSE: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "gemma": {},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {
        "sliding_window": 8, "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi": {},
    "phi3": {"sliding_window": 8},
    "olmo": {},
    "olmo2": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "opt_350m": {"model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "gpt_neox": {},
    "falcon": {"head_dim": None},
    "bloom": {},
    "gptj": {"rotary_dim": 8},
    "stablelm": {},
    "starcoder2": {"sliding_window": 8},
    "granite": {},
    "cohere": {},
    "cohere2": {"sliding_window": 8},
    "smollm3": {},
    "glm": {},
    "nemotron": {},
    "ministral": {},
    "exaone4": {"sliding_window": 8},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 128},
    "gpt2": {"n_inner": 96},
}  # fmt: skip
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": MOE,
    "qwen3_moe": MOE,
    "olmoe": MOE,
    "deepseek_v2": {**MOE, **LATENT},
    "deepseek_v3": {**MOE, **LATENT},
    "glm4_moe": {**MOE, "first_k_dense_replace": 1},
    "granitemoe": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 96, "attention_chunk_size": 8},
}  # fmt: skip

FAMILIES = DENSE | EXPERTS


def make(folder: Path, family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> Path:
    """Save a random model of ``family`` into ``folder``: a copy of the first that was made alike."""
    wanted = json.dumps([family, str(dtype), seed, options], sort_keys=True)
    if wanted not in _made:
        _made[wanted] = _make(Path(_kept.name) / str(len(_made)), family, dtype, seed, options)
    torch.manual_seed(seed)  # what a test draws next does not depend on which test came first
    return Path(shutil.copytree(_made[wanted], folder, dirs_exist_ok=True))


_kept = tempfile.TemporaryDirectory()
_made: dict[str, Path] = {}


def _make(folder: Path, family: str, dtype: torch.dtype, seed: int, options: dict[str, Any]) -> Path:
    settings = {**COMMON, **FAMILIES.get(family, {}), **options}
    settings = {name: value for name, value in settings.items() if value is not None}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type", family), **settings))
    randomise(model, seed)
    model.to(dtype).save_pretrained(folder)
    return folder


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights large enough that every part of a block matters, biases and norms among them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.15 if parameter.dim() >= 2 else 0.1
            centre = 0.0 if parameter.dim() >= 2 else parameter.mean()
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))


def add_tokenizer(folder: Path) -> Path:
    """A tokenizer of whole words: w3 is token 3."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def write_documents(file: Path, count: int = 30, length: int = 60, seed: int = 0) -> Path:
    """Documents of ``length`` known words each, as JSON lines."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, length), generator=generator).tolist()
    lines = [json.dumps({"text": " ".join(f"w{i}" for i in document)}) for document in ids]
    file.write_text("\n".join(lines) + "\n")
    return file


def token_windows(count: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own model; fails when a weight is missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, experts_implementation="eager"
    )
    problems = {name: info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(name)}
    assert not problems, problems
    return model.eval()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor of every shard."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def edit(folder: Path, name: str, change: Any) -> None:
    """Replace one stored tensor by ``change(tensor)``."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, file, {"format": "pt"})
