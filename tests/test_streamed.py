"""The streamed model beyond what test_families.py shows of every family."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import add_tokenizer, edit, load, make, token_windows
from torch import nn

from ace_cli.core.errors import AceError
from ace_cli.evaluation.perplexity import perplexity, window_losses
from ace_cli.methods.patterns import NofM
from ace_cli.model import streamed
from ace_cli.model.auto import LargeOnMeta
from ace_cli.model.files import Checkpoint
from ace_cli.model.streamed import StreamedModel
from ace_cli.run.plan import Demand, Plan, make_plan


def open_streamed(folder: Path, dtype: torch.dtype = torch.float32) -> StreamedModel:
    return StreamedModel(Checkpoint(folder), torch.device("cpu"), dtype)


def plan_of(folder: Path) -> Plan:
    """What is checked before any calibration."""
    model = open_streamed(folder)
    return make_plan(model, {slot.name: NofM(2, 4) for block in model.blocks for slot in block.slots}, Demand())


def real_parameters(model: StreamedModel) -> list[str]:
    return [name for name, parameter in model.skeleton.named_parameters() if not parameter.is_meta]


def test_only_what_is_used_is_in_memory(llama: Path) -> None:
    model = open_streamed(llama)
    assert real_parameters(model) == []
    (batch,) = model.batches(token_windows(2, 8))
    assert real_parameters(model) == []
    with torch.inference_mode():
        for index, block in enumerate(model.blocks):
            with model.loaded(block):
                assert real_parameters(model)
                assert all(name.startswith(f"{block.name}.") for name in real_parameters(model))
                batch.hidden_BLH = model.forward(index, batch)
        with model.head_loaded():
            model.logits(batch.ids_BL, batch.hidden_BLH)
    assert real_parameters(model) == []


def test_nothing_stays_loaded_after_an_error(llama: Path) -> None:
    model = open_streamed(llama)
    with pytest.raises(RuntimeError, match="on purpose"), model.loaded(model.blocks[0]):
        raise RuntimeError("on purpose")
    assert real_parameters(model) == []


def test_windows_are_split_into_batches_of_bounded_tokens(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "BATCH_TOKENS", 40)
    windows = token_windows(7, 16)
    batches = list(open_streamed(llama).batches(windows))
    assert [len(batch.ids_BL) for batch in batches] == [2, 2, 2, 1]
    assert torch.equal(torch.cat([batch.ids_BL for batch in batches]), windows)
    monkeypatch.setattr(streamed, "BATCH_TOKENS", 5)
    assert len(list(open_streamed(llama).batches(windows))) == 7


def test_between_two_batches_gradients_are_as_the_caller_has_them(llama: Path) -> None:
    """Blocks may be trained on what comes out: nothing of it was made in inference mode, and none is left on."""
    model = open_streamed(llama)
    for batches in (
        model.batches(torch.ones(4, 8, dtype=torch.int64), tokens=16),
        model.embedded([torch.ones(2, 8).long()]),
    ):
        for batch in batches:
            assert not torch.is_inference_mode_enabled()
            assert torch.is_grad_enabled()
            assert not batch.hidden_BLH.is_inference()
            assert not any(value.is_inference() for value in batch.calls[0].kwargs.values() if torch.is_tensor(value))


def test_where_a_skeleton_is_made_tables_get_values_and_weights_need_none() -> None:
    with LargeOnMeta(1):
        tables = [
            torch.empty(3).fill_(2),
            nn.init.constant_(torch.empty(3), 2),
            nn.init.ones_(tensor=torch.empty(3)) * 2,
        ]
        weight = nn.init.normal_(torch.empty(3, device="meta"))
    assert all(torch.equal(table, torch.full((3,), 2.0)) for table in tables)
    assert weight.is_meta


def test_equal_masks_and_tables_are_kept_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Gemma2 builds a float mask per batch: without sharing, memory grows with the number of batches."""
    monkeypatch.setattr(streamed, "BATCH_TOKENS", 20)
    first, second = open_streamed(make(tmp_path / "m", "gemma2")).batches(token_windows(2, 20))
    for call, other in zip(first.calls, second.calls, strict=True):
        for name, value in call.kwargs.items():
            if isinstance(value, torch.Tensor):
                assert other.kwargs[name] is value, name


def test_slots_are_the_blocks_linear_layers(llama: Path) -> None:
    model = open_streamed(llama)
    assert [block.name for block in model.blocks] == ["model.layers.0", "model.layers.1"]
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
             "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
    for block in model.blocks:
        assert [slot.name for slot in block.slots] == [f"{block.name}.{name}.weight" for name in names]
        assert block.slots[1].shape == (32, 64)


def test_a_tied_llama_whose_file_also_holds_the_head(tmp_path: Path) -> None:
    """Some exporters store the tied tensor twice."""
    folder = make(tmp_path / "m", "llama", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    windows = token_windows(3, 12)
    expected = perplexity_of(load(folder), windows)
    assert perplexity(window_losses(open_streamed(folder), windows)) == pytest.approx(expected, rel=1e-5)


def perplexity_of(model: torch.nn.Module, windows_NL: torch.Tensor) -> float:
    """Wanda's protocol: exp of the mean over windows of the mean over L - 1 targets, in float64."""
    losses = []
    with torch.inference_mode():
        for ids_L in windows_NL:
            logits_LV = model(ids_L[None]).logits[0, :-1].double()
            chosen_L = logits_LV.log_softmax(-1).gather(1, ids_L[1:, None])
            losses.append(-chosen_L.mean())
    return float(torch.stack(losses).mean().exp())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bloom"])
def test_perplexity_is_that_of_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    folder, windows = make(tmp_path / "m", family), token_windows(5, 24)
    expected = perplexity_of(load(folder), windows)
    assert perplexity(window_losses(open_streamed(folder), windows)) == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(streamed, "BATCH_TOKENS", 48)
    assert perplexity(window_losses(open_streamed(folder), windows)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight", "model.norm.weight",
             "model.embed_tokens.weight", "lm_head.weight"]
)  # fmt: skip
def test_a_missing_weight_is_named_before_any_work(own_llama: Path, name: str) -> None:
    """The head, too: it is needed last, but a model without one must not be pruned for hours first."""
    plan_of(own_llama)
    drop(own_llama, name)
    with pytest.raises(AceError, match=name.replace(".", r"\.")):
        plan_of(own_llama)


def drop(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_weight_of_another_shape_is_named(own_llama: Path) -> None:
    edit(own_llama, "model.layers.0.mlp.up_proj.weight", lambda weight: weight[:, :32].contiguous())
    with pytest.raises(AceError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        plan_of(own_llama)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "no_such_model"}, "no_such_model"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"model_type": None}, "model_type"),
    ],
)
def test_models_that_cannot_be_built_are_refused_in_one_line(
    own_llama: Path, change: dict[str, object], expected: str
) -> None:
    config = json.loads((own_llama / "config.json").read_text()) | change
    (own_llama / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(AceError) as caught:
        open_streamed(own_llama)
    assert expected.lower() in str(caught.value).lower()
    assert "\n" not in str(caught.value)


def test_a_pruned_folder_is_a_model_again(llama: Path, tmp_path: Path, prune_here) -> None:  # type: ignore[no-untyped-def]
    """A checkpoint of ours is a source like any other, its own "pruning" entry and all."""
    prune_here(llama, tmp_path / "first", "metric=magnitude", "sparsity=0.25")
    report = prune_here(tmp_path / "first" / "checkpoint", tmp_path / "second", "metric=wanda", "sparsity=2:4")
    assert report.sparsity.achieved >= 0.5
    assert add_tokenizer(tmp_path / "second" / "checkpoint")


# --- blocks that cannot be run by themselves, and what they return ---------------------------------------------------


#: By default its state takes 256 numbers a channel and its chunks 256 tokens, however few there are.
SMALL = {"bamba": {"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_chunk_size": 16}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["bamba", "olmo_hybrid", "xlstm"])
def test_blocks_that_return_two_values_or_make_weights_of_their_own_dtype(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    """Bamba unpacks what its blocks return; Olmo-Hybrid makes its decay rates in float32 whatever is asked for."""
    folder, ids = make(tmp_path / "model", family, **SMALL.get(family, {})), token_windows(2, 12)
    model = open_streamed(folder, dtype)
    (batch,) = model.batches(ids)
    model.run([batch])
    with torch.inference_mode(), model.head_loaded():
        logits = model.logits(ids, batch.hidden_BLH)
        assert torch.equal(logits, load(folder, dtype)(ids, use_cache=False).logits)


@pytest.mark.parametrize(
    ("order", "between", "problem"),
    [
        ([0, 1, 0, 1], 0.0, "block 0 runs as number 2"),
        ([1, 0], 0.0, "block 1 runs as number 0"),
        ([0], 0.0, "1 of its 2 blocks run"),
        ([0, 1], 1.0, "the model computes between blocks 0 and 1"),
    ],
)
def test_a_model_that_does_more_than_run_its_blocks_in_turn_is_refused(
    llama: Path, monkeypatch: pytest.MonkeyPatch, order: list[int], between: float, problem: str
) -> None:
    def forward(input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        hidden_BLH = decoder.embed_tokens(input_ids)
        for index in order:
            hidden_BLH = decoder.layers[index](hidden_BLH) + between
        return hidden_BLH

    model = open_streamed(llama)
    decoder = model.skeleton.model
    monkeypatch.setattr(decoder, "forward", forward)
    with pytest.raises(AceError, match=f"LlamaForCausalLM cannot be run block by block: {problem}"):
        list(model.batches(token_windows(2, 8)))


@pytest.mark.parametrize("values", [2, 3])
def test_a_block_that_reads_more_of_the_one_before_is_refused(
    llama: Path, monkeypatch: pytest.MonkeyPatch, values: int
) -> None:
    def forward(input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        hidden_BLH, beside = decoder.embed_tokens(input_ids), ()
        for layer in decoder.layers:
            returned = layer(hidden_BLH, *beside)
            assert len(returned) == values, "too many values"
            hidden_BLH, beside = returned[0], returned[1:]
        return hidden_BLH

    model = open_streamed(llama)
    decoder = model.skeleton.model
    monkeypatch.setattr(decoder, "forward", forward)
    with pytest.raises(AceError, match="block 1 reads more of the one before than hidden states"):
        list(model.batches(token_windows(2, 8)))


def test_the_next_block_is_read_while_one_is_computed(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_streamed(llama)
    read, computed = model.read, model.advance
    events: list[str] = []
    second = threading.Event()

    def reading(block: Any) -> Any:
        events.append(f"read {block.name[-1]} on {threading.current_thread() is not threading.main_thread()}")
        tensors = read(block)
        if block.name.endswith("1"):
            second.set()
        return tensors

    def advance(index: int, batches: Any) -> None:
        assert second.wait(20), "the second block is read only after the first was computed"
        events.append(f"advance {index}")
        computed(index, batches)

    monkeypatch.setattr(model, "read", reading)
    monkeypatch.setattr(model, "advance", advance)
    model.run(list(model.batches(token_windows(2, 8))))
    assert events == ["read 0 on True", "read 1 on True", "advance 0", "advance 1"]
    assert all(parameter.is_meta for parameter in model.skeleton.parameters()), "all are let go of"
    assert list(model.one_by_one(1)) == [0]
    assert list(model.one_by_one(0)) == []
