"""Write a checkpoint of random bf16 weights in a given shape, shard by shard: for timing and memory, not quality.

python scripts/make_synthetic.py FOLDER --shape 7b                13.5 GB, LLaMA-7B
python scripts/make_synthetic.py FOLDER --shape 70b --blocks 4    the first four blocks of Llama-2-70B
python scripts/make_synthetic.py FOLDER --shape 8x7b --blocks 3   9.2 GB, the first three blocks of Mixtral-8x7B
python scripts/make_synthetic.py FOLDER --shape 70b --holes       all of it for a plan: zeros that take no disk

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
    "8x7b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
             "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--blocks", type=int, help="write only so many decoder blocks")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--holes", action="store_true", help="zeros that take no room on the disk")
    options = parser.parse_args()
    shape = dict(SHAPES[options.shape])
    if options.blocks:
        shape["num_hidden_layers"] = options.blocks
    write(options.folder, shape, getattr(torch, options.dtype), options.holes)
    write_texts(options.folder, shape["vocab_size"])


def write(folder: Path, shape: dict[str, int], dtype: torch.dtype, holes: bool = False) -> None:
    """One shard a block, and one for embeddings, norm and head."""
    folder.mkdir(parents=True, exist_ok=True)
    family = ("MixtralForCausalLM", "mixtral") if "num_local_experts" in shape else ("LlamaForCausalLM", "llama")
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
