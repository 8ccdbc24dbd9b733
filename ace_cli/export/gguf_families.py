"""What GGUF calls a family, what its files say of it, and how its tensors lie in them: a row teaches a new one.

A row is for a family that llama.cpp computes as transformers does, and that transformers reads back from the file.
Names of tensors are gguf's own ``TensorNameMap``; keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Keys = dict[str, int | float | str | list[int]]


class NoForm(Exception):
    """GGUF has no form for this; says for what, in one line."""


@dataclass(frozen=True)
class Family:
    """``arch``: GGUF's name. ``activation``: the only one that llama.cpp computes for it.

    ``interleaved``: the two halves of a head that rotate together lie side by side, not one after the other.
    ``norm_offset`` is added to the weights of norms. ``more`` gives further keys, or raises NoForm.
    """

    arch: str
    activation: str = "silu"
    interleaved: bool = False
    norm_offset: float = 0.0
    more: Callable[[Any], Keys] = lambda _: {}


def _no_window(config: Any) -> Keys:
    if getattr(config, "use_sliding_window", False):
        raise NoForm("attention in a sliding window")
    return {}


def _within_window(config: Any) -> Keys:
    """llama.cpp sees everything; so it is not told of more positions than a window holds."""
    window = config.sliding_window or config.max_position_embeddings
    return {"context_length": min(window, config.max_position_embeddings)}


def _gemma(config: Any, layers: list[str]) -> Keys:
    """``layers``: the kinds of attention that repeat."""
    wanted = [layers[index % len(layers)] for index in range(config.num_hidden_layers)]
    if list(config.layer_types) != wanted:
        raise NoForm(f"another order of layers than {layers.count('sliding_attention')} sliding, then a full one")
    if config.query_pre_attn_scalar != config.head_dim:
        raise NoForm(f"query_pre_attn_scalar={config.query_pre_attn_scalar} beside head_dim={config.head_dim}")
    return {"attention.sliding_window": config.sliding_window}


def _gemma2(config: Any) -> Keys:
    return {
        **_gemma(config, ["sliding_attention", "full_attention"]),
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
    }


def _gemma3(config: Any) -> Keys:
    if config.attn_logit_softcapping or config.final_logit_softcapping:
        raise NoForm("capped logits")
    return _gemma(config, ["sliding_attention"] * 5 + ["full_attention"])


#: model_type of transformers -> its row.
FAMILIES = {
    "llama": Family("llama", interleaved=True),
    "mistral": Family("llama", interleaved=True, more=_within_window),
    "qwen2": Family("qwen2", more=_no_window),
    "qwen3": Family("qwen3", more=_no_window),
    "gemma2": Family("gemma2", "gelu_pytorch_tanh", norm_offset=1.0, more=_gemma2),
    "gemma3_text": Family("gemma3", "gelu_pytorch_tanh", norm_offset=1.0, more=_gemma3),
}


def family_of(config: Any) -> Family:
    """The row of a configuration of transformers. Raises NoForm."""
    if config.model_type not in FAMILIES:
        raise NoForm(f"the family {config.model_type} (there is one for {', '.join(FAMILIES)})")
    family = FAMILIES[config.model_type]
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation != family.activation:
        raise NoForm(f"a {config.model_type} with the activation {activation}")
    return family


def uneven_family(config: Any) -> Family:
    """The row of a model whose blocks differ in width: only Llama's shape has one. Raises NoForm."""
    family = family_of(config)
    if family.arch != "llama":
        raise NoForm(f"a {config.model_type} whose blocks differ in width (deci has Llama's shape)")
    return replace(family, arch="deci")


def uneven_keys(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> Keys:
    """The keys that have a number for each block. ``shapes``: of the tensors by their names in GGUF."""

    def rows(leaf: str) -> list[int]:
        return [shapes[f"blk.{index}.{leaf}.weight"][0] for index in range(config.num_hidden_layers)]

    head = head_width(config)
    return {
        "feed_forward_length": rows("ffn_gate"),
        "attention.head_count": [width // head for width in rows("attn_q")],
        "attention.head_count_kv": [width // head for width in rows("attn_k")],
    }


def head_width(config: Any) -> int:
    """Outputs of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def keys_of(config: Any, family: Family) -> Keys:
    """What the file says of the model's shape, without the prefix of the architecture. Raises NoForm."""
    heads, head = config.num_attention_heads, head_width(config)
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head,
        **_rotation(config),
        **family.more(config),
    }


def _rotation(config: Any) -> Keys:
    rope = config.rope_parameters
    if "full_attention" in rope:  # one for each kind of attention
        local = rope["sliding_attention"]
        if local.get("rope_type", "default") != "default":
            raise NoForm("scaled positions inside a sliding window")
        return {"rope.freq_base_swa": float(local["rope_theta"]), **_scaled(rope["full_attention"])}
    return _scaled(rope)


def _scaled(rope: dict[str, Any]) -> Keys:
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise NoForm(f"positions scaled by {kind}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise NoForm("heads of which only a part rotates")
    keys: Keys = {"rope.freq_base": float(rope["rope_theta"])}
    if kind == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return keys


def frequency_factors(config: Any) -> list[float] | None:
    """By what each frequency of a head is divided where positions are scaled as in Llama 3; else None.

    Waves longer than ``original_max_position_embeddings / low_freq_factor`` are stretched by ``factor``, short ones
    stay, and between them it goes over smoothly.
    """
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    head = head_width(config)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    found = []
    for index in range(0, head, 2):
        turns = rope["original_max_position_embeddings"] / (2 * math.pi * rope["rope_theta"] ** (index / head))
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        found.append(1 / ((1 - smooth) / factor + smooth))
    return found


def laid_out(name: str, tensor: Tensor, config: Any, family: Family) -> Tensor:
    """``tensor``, called ``name`` in GGUF, as it lies in the file."""
    if family.norm_offset and name.endswith("norm.weight"):
        return tensor.float() + family.norm_offset
    leaf = name.split(".")[-2]
    if family.interleaved and leaf in ("attn_q", "attn_k"):
        heads = len(tensor) // head_width(config)
        return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    return tensor
