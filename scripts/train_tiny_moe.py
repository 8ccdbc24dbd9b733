"""Train a tiny mixture of experts on a text file until its experts specialise: something to take experts out of.

Usage: train_tiny_moe.py FOLDER TEXT.jsonl [--steps 500]

An OLMoE model of 4 layers with 16 experts each, 2 for a token, that reads bytes; each line of TEXT is an object with a
"text". The last twentieth of the documents is not trained on: it is written to FOLDER/held_out.jsonl, to evaluate on.
The same command gives the same model on the same machine.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

LENGTH, BATCH = 128, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    given = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    texts = [json.loads(line)["text"] for line in given.text.read_text(encoding="utf-8").splitlines() if line.strip()]
    held_out = texts[-max(1, len(texts) // 20) :]
    ids_T = torch.tensor(tokenizer("\n".join(texts[: -len(held_out)]))["input_ids"])
    model = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=64, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, num_experts=16, num_experts_per_tok=2, norm_topk_prob=True,
            max_position_embeddings=1024, router_aux_loss_coef=0.001, output_router_logits=True,
            pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    train(model, ids_T, given.steps)
    model.config.output_router_logits = False
    model.save_pretrained(given.folder)
    tokenizer.save_pretrained(given.folder)
    lines = [json.dumps({"text": text}) for text in held_out]
    (given.folder / "held_out.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and nothing else."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def train(model: OlmoeForCausalLM, ids_T: torch.Tensor, steps: int) -> None:
    """AdamW with a warm-up and a cosine, on windows drawn anywhere."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps, pct_start=0.05)
    generator, begun = torch.Generator().manual_seed(0), time.monotonic()
    for step in range(steps):
        starts = torch.randint(0, len(ids_T) - LENGTH, (BATCH,), generator=generator)
        ids_BL = torch.stack([ids_T[start : start + LENGTH] for start in starts])
        loss = model(input_ids=ids_BL, labels=ids_BL).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}, {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
