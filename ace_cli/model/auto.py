"""Which of transformers' classes builds a model, and which parts of it are not its text decoder."""

from __future__ import annotations

from typing import Any


def auto_class(config: Any) -> Any:
    """The auto class that builds a language model of ``config``, with images or without."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def decoder_of(skeleton: Any) -> Any:
    """The model that turns token ids into hidden states."""
    from transformers import PreTrainedModel

    decoder = skeleton.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else skeleton.base_model  # some heads are called decoder


def other_models(skeleton: Any) -> dict[str, Any]:
    """Models inside ``skeleton`` that its text decoder is no part of (towers for images and sound), by path."""
    from transformers import PreTrainedModel

    decoder = decoder_of(skeleton)
    found: dict[str, Any] = {}
    for path, module in skeleton.named_modules():
        inside = any(path.startswith(f"{known}.") for known in found)
        if isinstance(module, PreTrainedModel) and not inside and not _related(module, decoder):
            found[path] = module
    return found


def _related(one: Any, other: Any) -> bool:
    return any(part is other for part in one.modules()) or any(part is one for part in other.modules())
