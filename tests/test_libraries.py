"""What is used of other libraries though no release promises to keep it: one line says what broke when one moves it.

Such names live in ``*_api.py`` files alone, each in the room that needs it.
"""

from __future__ import annotations

import ast
import inspect
import tempfile
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import ace_cli
from ace_cli.core import torch_api
from ace_cli.model import compressed_tensors_api, transformers_api
from ace_cli.run import hydra_api

PACKAGE = Path(ace_cli.__file__).parent
CONTRACTS: dict[str, Callable[[], bool]] = {}


def contract(what: str) -> Callable[[Callable[[], bool]], Callable[[], bool]]:
    def keep(check: Callable[[], bool]) -> Callable[[], bool]:
        CONTRACTS[what] = check
        return check

    return keep


@pytest.mark.parametrize("what", CONTRACTS)
def test_contract(what: str) -> None:
    try:
        fine, why = CONTRACTS[what](), "it is there, but says something else"
    except Exception as fault:
        fine, why = False, f"{type(fault).__name__}: {fault}"
    if not fine:
        pytest.fail(f"MOVED in {what} ({why})", pytrace=False)


def tiny(family: str, **options: Any) -> Any:
    settings = {**tiny_models.COMMON, **tiny_models.FAMILIES[family], **options}
    config = AutoConfig.for_model(family, **settings)
    transformers_api.compute_plainly(config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


# --- transformers ---------------------------------------------------------------------------------------------------


@contract("transformers: _model_mapping of an auto class has the class of a configuration, used by class_for")
def _() -> bool:
    return transformers_api.class_for(AutoModelForCausalLM, tiny("llama").config).__name__ == "LlamaForCausalLM"


@contract("transformers: _no_split_modules names the classes of decoder blocks, used by block_classes")
def _() -> bool:
    return transformers_api.block_classes(tiny("llama")) == {"LlamaDecoderLayer"}


@contract("transformers: _keep_in_fp32_modules(_strict) of a class, used by kept_in_float32")
def _() -> bool:
    known = all(hasattr(PreTrainedModel, name) for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"))
    model = tiny("llama")
    model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict = {"q_proj"}, {"norm"}
    half, brain = (transformers_api.kept_in_float32(model, dtype) for dtype in (torch.float16, torch.bfloat16))
    return known and half("x.q_proj.weight") and not brain("x.q_proj.weight") and brain("x.norm.weight")


@contract("transformers: all_tied_weights_keys maps a tied weight to the stored one, used by tied_weights")
def _() -> bool:
    tied = transformers_api.tied_weights(tiny("llama", tie_word_embeddings=True))
    return tied == {"lm_head.weight": "model.embed_tokens.weight"} and not transformers_api.tied_weights(tiny("llama"))


@contract("transformers: the auto classes' tables MODEL_FOR_..._MAPPING, used by needs_images")
def _() -> bool:
    text, images = AutoConfig.for_model("llama"), AutoConfig.for_model("llava")
    return transformers_api.needs_images(images) and not transformers_api.needs_images(text)


@contract("transformers: conversion_mapping and core_model_loading tell a file's tensors, used by rules_of")
def _() -> bool:
    model = tiny("mixtral")
    rules, state = transformers_api.rules_of(model), model.state_dict()
    plain = rules.name_of("model.layers.0.self_attn.q_proj.weight", state)
    expert, pattern = rules.name_of("model.layers.0.block_sparse_moe.experts.1.w1.weight", state)
    return plain == ("model.layers.0.self_attn.q_proj.weight", None) and expert in state and pattern is not None


@contract("transformers: MergeModulelist and Concatenate are how experts are stacked, used by only_stacks")
def _() -> bool:
    return all(map(transformers_api.only_stacks, transformers_api.rules_of(tiny("mixtral")).converters))


@contract("transformers: dot_natural_key sorts numbers in names as numbers, used by in_loading_order")
def _() -> bool:
    return transformers_api.in_loading_order(["e.10.w", "e.9.w"]) == ["e.9.w", "e.10.w"]


@contract("transformers: _experts_implementation of a configuration decides, used by compute_plainly")
def _() -> bool:
    return bool(tiny("mixtral", _experts_implementation="nobody/k").config._experts_implementation == "eager")


@contract("transformers: _attn_implementation of a configuration decides, used by compute_plainly")
def _() -> bool:
    return bool(tiny("llama", _attn_implementation="nobody/k").config._attn_implementation == "sdpa")


@contract("transformers: CONFIG_MAPPING_NAMES lists the model types, used by known_model_types")
def _() -> bool:
    return {"llama", "gpt2", "mixtral"} < transformers_api.known_model_types()


@contract("transformers: save_pretrained asks for hf_quantizer and _weight_conversions, set by save_as_plain")
def _() -> bool:
    from transformers import core_model_loading

    saving, loading = (inspect.getsource(where) for where in (PreTrainedModel.save_pretrained, core_model_loading))
    return "hf_quantizer" in saving and '"_weight_conversions"' in loading


@contract("transformers: Conv1D keeps (inputs, outputs), used by is_transposed")
def _() -> bool:
    from transformers.pytorch_utils import Conv1D

    return tuple(Conv1D(3, 2).weight.shape) == (2, 3) and transformers_api.is_transposed(Conv1D(3, 2))


@contract("transformers: tqdm is what a GGUF file's tensors are counted by, used by telling")
def _() -> bool:
    from transformers import modeling_gguf_pytorch_utils

    return "in tqdm(reader.tensors" in inspect.getsource(modeling_gguf_pytorch_utils.load_gguf_checkpoint)


# --- torch ----------------------------------------------------------------------------------------------------------


@contract("torch: torch.cpu tells of units for bfloat16, used by has_bfloat16_units")
def _() -> bool:
    return isinstance(torch_api.has_bfloat16_units(), bool)


@contract("torch: a module computes with what is put into its _parameters and _buffers, used by own_parameters")
def _() -> bool:
    layer = torch.nn.Linear(2, 3, bias=False)
    torch_api.own_parameters(layer)["weight"] = torch.nn.Parameter(torch.ones(1, 2))
    layer.register_buffer("table", torch.zeros(1))
    torch_api.own_buffers(layer)["table"] = torch.ones(2)
    return layer(torch.ones(2)).tolist() == [2.0] and layer.table.tolist() == [1, 1]


@contract("torch: every convolution is a _ConvNd, used by is_convolution")
def _() -> bool:
    kinds = [torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.ConvTranspose2d]
    return all(torch_api.is_convolution(kind(1, 1, 1)) for kind in kinds) and not torch_api.is_convolution(
        torch.nn.Linear(1, 1)
    )


@contract("torch: too little memory is an OutOfMemoryError, on a CPU a text, used by lacks_memory")
def _() -> bool:
    try:
        torch.empty(1 << 55)
    except RuntimeError as fault:
        return torch_api.lacks_memory(fault) and torch_api.lacks_memory(torch.OutOfMemoryError())
    return False


# --- lm-eval --------------------------------------------------------------------------------------------------------


@contract("lm-eval: HFLM scores through _loglikelihood_tokens, overridden by TokenModel")
def _() -> bool:
    from lm_eval.models.huggingface import HFLM

    wanted = ["self", "requests", "disable_tqdm", "override_bs"]
    return list(inspect.signature(HFLM._loglikelihood_tokens).parameters) == wanted


@contract("lm-eval: HFLM takes a model made before, and says its device by _device, used by TokenModel")
def _() -> bool:
    from lm_eval.models.huggingface import HFLM

    taken = inspect.signature(HFLM.__init__).parameters
    said = "self._device" in inspect.getsource(HFLM.device.fget)
    return said and {"pretrained", "tokenizer", "backend"} <= set(taken)


@contract("lm-eval: what harness reads of a task and of TaskManager.load")
def _() -> bool:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    functions = ["has_test_docs", "get_config", "set_config", "set_fewshot_seed"]
    names = ["OUTPUT_TYPE", "VERSION", "instances", "eval_docs", "config", *functions]
    return all(hasattr(ConfigurableTask, name) for name in names) and hasattr(TaskManager, "load")


# --- where they live ------------------------------------------------------------------------------------------------

FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if not file.name.endswith("_api.py")]


def own_names(trees: Iterable[ast.AST]) -> set[str]:
    """Every name with an underscore in front that this package gives to something of its own."""
    names = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                names.add(node.attr)
    return names


def test_private_names_of_libraries_live_in_one_place() -> None:
    trees = {file: ast.parse(file.read_text()) for file in PACKAGE.rglob("*.py")}
    own, wrong = own_names(trees.values()), []
    for file, node in ((each, node) for each in FILES for node in ast.walk(trees[each])):
        private = isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
        if private and node.attr not in own and ast.unparse(node) != "os._exit":  # documented under this name
            wrong.append(f"{file}:{node.lineno}: {node.attr} is no name of ours: put it in an *_api.py")
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
            wrong.append(f"{file}:{node.lineno}: {node.module} is no promise: put it in model/transformers_api.py")
    assert wrong == []


# --- Hydra and OmegaConf ---------------------------------------------------------------------------------------------


def composing(*overrides: str, file: str = "") -> tuple[str, str]:
    """What Hydra says of a composition that fails, and its first cause's words."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from ace_cli.run.config import _root, config_folder, store_schemas

    store_schemas()
    GlobalHydra.instance().clear()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "experiment").mkdir()
        (Path(folder) / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{file}\n")
        path = [f"hydra.searchpath=[file://{folder}]", "+experiment=mine"] if file else []
        try:
            with initialize_config_dir(str(config_folder().absolute()), version_base="1.3"):
                compose("prune", [*(each.replace("+experiment", "experiment") for each in path), *overrides])
        except Exception as fault:
            return str(fault), str(_root(fault))
    return "", ""


@contract("hydra: a choice that is not there is named with its group, read by choice_not_found")
def _() -> bool:
    return hydra_api.choice_not_found(composing("metric=wand")[0]) == ("metric", "wand")


@contract("hydra: its parser of flags is asked before it prints a usage, by unreadable_flags")
def _() -> bool:
    read = hydra_api.unreadable_flags
    return (
        read(["-m", "a=1", "--cfg", "job"]) is None
        and read(["--foo"]) == "unrecognized arguments: --foo"
        and "expected one argument" in (read(["--config-dir"]) or "")
    )


@contract("hydra: its parser tells which flags take a value, read by flags_first")
def _() -> bool:
    return hydra_api.flags_first(["a=1", "--cfg", "job", "-m"]) == ["--cfg", "job", "-m", "a=1"]


@contract("omegaconf: an option that a class lacks is named with the class, read by key_not_in_class")
def _() -> bool:
    return hydra_api.key_not_in_class(composing("metric=ria", "metric.alpa=1")[1]) == ("metric.alpa", "RIA")


@contract("hydra: an override that fails names its key, read by key_not_overridden")
def _() -> bool:
    return hydra_api.key_not_overridden(composing("calib.n_samples=many")[0]) in ("calib.n_samples", None) and (
        hydra_api.key_not_overridden(composing("sparsty=0.5")[0]) == "sparsty"
    )


@contract("omegaconf: a plain value for a group in a file is named with file and class, read by merged_into_class")
def _() -> bool:
    found = hydra_api.merged_into_class(composing(file="metric: wanda")[0])
    return found is not None and found[0].endswith("mine") and found[2] == "wanda"


@contract("omegaconf: a value of the wrong type is said beside full_key, read by full_key and words")
def _() -> bool:
    cause = composing("calib.n_samples=many")[1]
    return hydra_api.full_key(cause) == "calib.n_samples" and "full_key" not in hydra_api.words(ValueError(cause))


@contract("compressed-tensors: codes are packed and unpacked as pack-quantized has them, and its config names the grid")
def _() -> bool:
    if find_spec("compressed_tensors") is None:
        return True
    codes = torch.arange(-4, 4, dtype=torch.int8).repeat(3, 5)
    packed = compressed_tensors_api.packed(codes, 3)
    settings = compressed_tensors_api.settings(3, 8, ["lm_head"])
    weights = settings["config_groups"]["group_0"]["weights"]
    return (
        packed.shape == (3, 4)
        and torch.equal(compressed_tensors_api.unpacked(packed, 3, (3, 40)), codes)
        and (settings["quant_method"], settings["format"]) == ("compressed-tensors", "pack-quantized")
        and (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (3, 8, True)
    )
