"""Write a checkpoint of random bf16 weights in a given shape, shard by shard: for timing and memory, not quality.

python scripts/make_synthetic.py FOLDER --shape 7b                13.5 GB, LLaMA-7B
python scripts/make_synthetic.py FOLDER --shape 70b --blocks 4    the first four blocks of Llama-2-70B
python scripts/make_synthetic.py FOLDER --shape 8x7b --blocks 3   9.2 GB, the first three blocks of Mixtral-8x7B
python scripts/make_synthetic.py FOLDER --shape 405b --holes      all of it for a plan: zeros that take no disk
python scripts/make_synthetic.py FOLDER --shape deepseek_v3 --holes    the same, 671B parameters
python scripts/make_synthetic.py FOLDER --shape 405b --part 8 --blocks 2    two blocks of an eighth of the width

Beside the weights lie a tokenizer of made-up words and pages.jsonl, documents of them: calib=text
calib.path=FOLDER/pages.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
           "num_key_value_heads": 4, "vocab_size": 32000},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 32000},
    "405b": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
             "num_key_value_heads": 8, "vocab_size": 128256},
    "deepseek_v3": {"hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
                    "num_hidden_layers": 61, "first_k_dense_replace": 3, "num_attention_heads": 128,
                    "num_key_value_heads": 128, "vocab_size": 129280, "n_routed_experts": 256, "n_shared_experts": 1,
                    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "q_lora_rank": 1536, "kv_lora_rank": 512,
                    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    "8x7b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
             "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2},
}  # fmt: skip
#: What ``--part`` divides. Heads keep their width.
DIVIDED = ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads",
           "vocab_size", "n_routed_experts", "q_lora_rank", "kv_lora_rank")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--blocks", type=int, help="write only so many decoder blocks")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--holes", action="store_true", help="zeros that take no room on the disk")
    parser.add_argument("--part", type=int, default=1, help="widths, heads, experts and words divided by so many")
    options = parser.parse_args()
    shape = part_of(SHAPES[options.shape], options.part, options.blocks)
    write(options.folder, shape, getattr(torch, options.dtype), options.holes)
    write_texts(options.folder, shape["vocab_size"])


def part_of(shape: dict[str, int], part: int, blocks: int | None = None) -> dict[str, int]:
    """Narrower, with ``blocks`` blocks; of those that differ from the rest, one stays."""
    found = {key: max(1, value // part) if key in DIVIDED else value for key, value in shape.items()}
    if blocks:
        found["num_hidden_layers"] = blocks
    if "first_k_dense_replace" in found:
        found["first_k_dense_replace"] = min(found["first_k_dense_replace"], max(1, found["num_hidden_layers"] // 2))
    return found


def write(folder: Path, shape: dict[str, int], dtype: torch.dtype, holes: bool = False) -> None:
    """One shard a block, and one for embeddings, norm and head."""
    folder.mkdir(parents=True, exist_ok=True)
    family = ("MixtralForCausalLM", "mixtral") if "num_local_experts" in shape else ("LlamaForCausalLM", "llama")
    family = ("DeepseekV3ForCausalLM", "deepseek_v3") if "kv_lora_rank" in shape else family
    config = {"architectures": [family[0]], "model_type": family[1], "dtype": str(dtype).removeprefix("torch."),
              "max_position_embeddings": 4096, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
              **shape}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    blocks = shape["num_hidden_layers"]
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for number in range(blocks + 1):
        tensors = stem(shape) if number == blocks else block(shape, number)
        name = f"model-{number + 1:05}-of-{blocks + 1:05}.safetensors"
        if holes:
            write_hole(folder / name, tensors, dtype)
        else:
            made = {key: random(size, generator, dtype) for key, size in tensors.items()}
            save_file(made, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_hole(file: Path, tensors: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """A whole safetensors file whose data were never written."""
    code = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    header, end = {}, 0
    for name, size in tensors.items():
        start, end = end, end + math.prod(size) * dtype.itemsize
        header[name] = {"dtype": code, "shape": size, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


def write_texts(folder: Path, vocabulary: int) -> None:
    """A tokenizer of whole words, w3 is token 3, and 256 documents of 64 words."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    ids = torch.randint(3, vocabulary, (256, 64), generator=torch.Generator().manual_seed(0)).tolist()
    lines = [json.dumps({"text": " ".join(f"w{i}" for i in document)}) for document in ids]
    (folder / "pages.jsonl").write_text("\n".join(lines) + "\n")


def block(shape: dict[str, int], number: int) -> dict[str, tuple[int, ...]]:
    if "kv_lora_rank" in shape:
        return latent_block(shape, number)
    hidden = shape["hidden_size"]
    narrow = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    sizes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden),
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), **multilayer_perceptron(shape),
    }  # fmt: skip
    return {f"model.layers.{number}.{name}.weight": size for name, size in sizes.items()}


def multilayer_perceptron(shape: dict[str, int]) -> dict[str, tuple[int, ...]]:
    hidden, inner, experts = shape["hidden_size"], shape["intermediate_size"], shape.get("num_local_experts", 0)
    if not experts:
        return {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    sizes: dict[str, tuple[int, ...]] = {"block_sparse_moe.gate": (experts, hidden)}
    for expert in range(experts):
        parts = {"w1": (inner, hidden), "w3": (inner, hidden), "w2": (hidden, inner)}
        sizes |= {f"block_sparse_moe.experts.{expert}.{name}": size for name, size in parts.items()}
    return sizes


def latent_block(shape: dict[str, int], number: int) -> dict[str, tuple[int, ...]]:
    """Multi-head latent attention; experts but for the first blocks. Routers' corrections are vectors."""
    hidden, heads, key = shape["hidden_size"], shape["num_attention_heads"], shape["kv_lora_rank"]
    nope, rope, value = shape["qk_nope_head_dim"], shape["qk_rope_head_dim"], shape["v_head_dim"]
    sizes: dict[str, tuple[int, ...]] = {
        "self_attn.q_a_proj": (shape["q_lora_rank"], hidden), "self_attn.q_a_layernorm": (shape["q_lora_rank"],),
        "self_attn.q_b_proj": (heads * (nope + rope), shape["q_lora_rank"]),
        "self_attn.kv_a_proj_with_mqa": (key + rope, hidden), "self_attn.kv_a_layernorm": (key,),
        "self_attn.kv_b_proj": (heads * (nope + value), key), "self_attn.o_proj": (hidden, heads * value),
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip

    def network(where: str, inner: int) -> dict[str, tuple[int, ...]]:
        parts = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        return {f"{where}.{name}": size for name, size in parts.items()}

    extra: dict[str, tuple[int, ...]] = {}
    if number < shape["first_k_dense_replace"]:
        sizes |= network("mlp", shape["intermediate_size"])
    else:
        sizes["mlp.gate"] = (shape["n_routed_experts"], hidden)
        extra = {f"model.layers.{number}.mlp.gate.e_score_correction_bias": (shape["n_routed_experts"],)}
        sizes |= network("mlp.shared_experts", shape["moe_intermediate_size"] * shape["n_shared_experts"])
        for expert in range(shape["n_routed_experts"]):
            sizes |= network(f"mlp.experts.{expert}", shape["moe_intermediate_size"])
    return {**{f"model.layers.{number}.{name}.weight": size for name, size in sizes.items()}, **extra}


def stem(shape: dict[str, int]) -> dict[str, tuple[int, ...]]:
    vocabulary = (shape["vocab_size"], shape["hidden_size"])
    return {"model.embed_tokens.weight": vocabulary, "lm_head.weight": vocabulary,
            "model.norm.weight": (shape["hidden_size"],)}  # fmt: skip


def random(size: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=dtype)
    return torch.empty(size, dtype=dtype).normal_(0, size[1] ** -0.5, generator=generator)


if __name__ == "__main__":
    main()
