"""Every name of transformers that no release promises to keep, each behind one function of ours.

A release that moves one is mended here and nowhere else. ``tests/test_libraries.py`` has a test for each that says in
one line what broke; the range of releases in pyproject.toml is the range that passes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from ace_cli.core.steps import Steps

if TYPE_CHECKING:
    import torch

# --- what a class says about its models -----------------------------------------------------------------------------


def block_classes(model: Any) -> set[str]:
    """The names of the classes of its decoder blocks."""
    return set(model._no_split_modules or ())


def kept_in_float32(model: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """Which parameters its class wants in float32, by name, where the others are in ``dtype``."""
    import torch

    names = set(model._keep_in_fp32_modules_strict or ())
    names |= set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    named = re.compile("|".join(name.replace("*", ".*") for name in sorted(names)) or "$^")
    return lambda name: named.search(name) is not None


def tied_weights(model: Any) -> dict[str, str]:
    """The parameters that are not stored, each with the one that it is."""
    return dict(model.all_tied_weights_keys)


def needs_images(config: Any) -> bool:
    """Whether no model class reads text alone with such a configuration, but one that reads images, too, does."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    return type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def compute_plainly(config: Any, experts: str | None = "eager") -> None:
    """Attention by torch and experts one by one in plain operations, whatever the file of ``config`` asks for.

    Both settings may name code that transformers would fetch from the hub and run.
    """
    from transformers import PreTrainedConfig

    config._attn_implementation = None  # torch's own where the class can, else the plain formula
    config._experts_implementation = experts
    for part in (config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))):
        part.return_dict = True


def known_model_types() -> set[str]:
    """The model types of which this release has a configuration class of its own."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return set(CONFIG_MAPPING_NAMES)


# --- how files become models ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rules:
    """The loader's rules for one model: names that change, and tensors that are made from others."""

    renamings: list[Any]
    converters: list[Any]
    prefix: str

    def name_of(self, key: str, state: dict[str, Any]) -> tuple[str, str | None]:
        """A file tensor's parameter, and the pattern of the rule that converts it: what the loader does."""
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], self.prefix, state)
        return name, pattern


def rules_of(model: Any) -> Rules:
    """What ``from_pretrained`` would do with the files of this model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    rules = get_model_conversion_mapping(model)
    return Rules(
        [rule for rule in rules if isinstance(rule, WeightRenaming)],
        [rule for rule in rules if isinstance(rule, WeightConverter)],
        model.base_model_prefix,
    )


def in_loading_order(keys: Iterable[str]) -> list[str]:
    """Numbers in names count as numbers: expert 10 comes after expert 9."""
    from transformers.core_model_loading import dot_natural_key

    return sorted(keys, key=dot_natural_key)


def only_stacks(rule: Any) -> bool:
    """Whether a converter does nothing but stack the tensors of one pattern and join those of several, rows to rows."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    kinds = [(type(operation), operation.dim) for operation in rule.operations]
    return kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


def is_transposed(module: Any) -> bool:
    """Whether it is GPT-2's kind of linear layer, which keeps (I, O)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def save_as_plain(model: Any) -> None:
    """Make ``save_pretrained`` write a model that came from a GGUF file like any other: its weights are plain now."""
    model.hf_quantizer = None
    model._weight_conversions = None  # those of the GGUF file: save under the names that the family has elsewhere
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


@contextmanager
def telling(steps: Steps) -> Iterator[None]:
    """While inside, ``steps`` hears of every tensor of a GGUF file that transformers reads, in place of its own bar."""
    from transformers import modeling_gguf_pytorch_utils as reading

    def bar(tensors: list[Any], **_: Any) -> Iterator[Any]:
        steps.of(len(tensors))
        for tensor in tensors:
            yield tensor
            steps()

    with patch.object(reading, "tqdm", bar):
        yield


def class_for(auto: Any, config: Any) -> Any:
    """The class that an auto class makes of a configuration."""
    return auto._model_mapping[type(config)]
