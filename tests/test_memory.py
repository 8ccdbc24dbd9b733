"""Peak memory while pruning: two blocks + embeddings + hidden states + 500 MB of libraries, whatever the depth."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import types
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from ace_cli.core import memory
from ace_cli.core.memory import Trimmer
from ace_cli.model.calls import BlockCalls
from ace_cli.model.streamed import StreamedModel
from ace_cli.model.weights import Weights

WIDTH, INNER, VOCABULARY, N_SAMPLES, SEQ_LEN = 384, 1024, 512, 16, 16
MEGABYTE = 1_000_000
BLOCK = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER + 2 * WIDTH)  # bytes in float32: 7 MB
EMBEDDINGS = 4 * 2 * VOCABULARY * WIDTH
HIDDEN = 4 * N_SAMPLES * SEQ_LEN * WIDTH


def deep_model(folder: Path, blocks: int) -> Path:
    """``blocks`` equal blocks, a shard each: written without ever holding the model."""
    folder.mkdir()
    LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=blocks,
        num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    shapes = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH), "mlp.down_proj": (WIDTH, INNER)}
    generator = torch.Generator().manual_seed(0)
    block = {f"{name}.weight": torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
    block |= {f"{name}.weight": torch.ones(WIDTH) for name in ("input_layernorm", "post_attention_layernorm")}
    stem = {name: torch.randn(VOCABULARY, WIDTH, generator=generator) for name in
            ("model.embed_tokens.weight", "lm_head.weight")} | {"model.norm.weight": torch.ones(WIDTH)}  # fmt: skip
    shards = [stem, *({f"model.layers.{i}.{name}": t for name, t in block.items()} for i in range(blocks))]
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def peaks(command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, blocks: int) -> dict[str, int]:
    model = deep_model(tmp_path / f"model{blocks}", blocks)
    out = tmp_path / f"out{blocks}"
    done = command(
        "__main__", f"model.path={model}", "metric=varp", "sparsity=2:4", "calib=self", f"calib.n_samples={N_SAMPLES}",
        f"calib.seq_len={SEQ_LEN}", "eval=none", "device=cpu", "html=false", "samples.prompts=[]",
        f"output_dir={out}",cwd=tmp_path, OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads((out / "report.json").read_text())["peak_memory_bytes"]
    return found


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of phases need Linux's /proc")
def test_peak_memory_does_not_grow_with_depth(
    command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    shallow, deep = peaks(command, tmp_path, 6)["prune"], peaks(command, tmp_path, 30)["prune"]
    bound = 2 * BLOCK + EMBEDDINGS + HIDDEN + 500 * MEGABYTE
    assert shallow < bound
    assert deep < bound
    # the heap may grow by the slack before it is trimmed; 24 blocks kept would be 170 MB
    assert deep - shallow < 2 * BLOCK + Trimmer.SLACK, f"24 more blocks cost {deep - shallow:,} bytes"


def test_a_control_group_s_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory.free()
    monkeypatch.setattr(memory.control_group, "room", lambda: 500.0)
    assert memory.free() == 500
    monkeypatch.setattr(memory.control_group, "room", lambda: -20.0)
    assert memory.free() == 0
    monkeypatch.setattr(memory.control_group, "room", lambda: float("inf"))
    assert memory.free() > whole / 2


def test_what_lasts_is_no_longer_looked_at_but_garbage_from_before_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Node:
        """One end of a cycle, which reference counts alone never free."""

    def cycle() -> weakref.ref[Node]:
        node = Node()
        node.itself = node  # type: ignore[attr-defined]
        return weakref.ref(node)

    before = cycle()
    frozen = gc.get_freeze_count()
    try:
        with pytest.raises(ValueError, match="inside"), memory.lasting("imported_inside"):
            assert before() is None
            assert not gc.isenabled()
            inside = cycle()
            monkeypatch.setitem(sys.modules, "imported_inside", types.ModuleType("imported_inside"))
            raise ValueError("inside")
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen
        gc.collect()
        assert inside() is not None
        after = cycle()
        gc.collect()
        assert after() is None
    finally:
        gc.unfreeze()
        gc.collect()
        gc.freeze()  # or each collection of all later tests looks at every module


@pytest.mark.parametrize("module", ["gc", "never_imported"])
def test_where_nothing_is_imported_nothing_is_frozen(module: str) -> None:
    frozen = gc.get_freeze_count()
    with memory.lasting(module):
        pass
    assert gc.get_freeze_count() == frozen
    assert gc.isenabled()


def cuda_lack(*_: object) -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 14.58 GiB of which 9 is free."
    )


def cpu_lack(*_: object) -> None:
    torch.empty(1 << 55)


ON_GPU = (cuda_lack, "The GPU has no memory left: 20.00 GiB more")
ON_CPU = (cpu_lack, "This machine has no memory left: 14411518")


@pytest.mark.parametrize(  # what lacks it is told apart in one place, wherever it lacks
    ("kind", "where", "lack", "said"),
    [
        (BlockCalls, "capture", *ON_GPU),
        (StreamedModel, "forward", *ON_CPU),
        (Weights, "fill", *ON_GPU),
        (StreamedModel, "logits", *ON_CPU),
    ],
)
def test_too_little_memory_is_one_line_that_says_what_to_lower(
    here: Callable[..., subprocess.CompletedProcess[str]], llama: Path, documents: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, kind: type, where: str, lack: Callable[..., None], said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(kind, where, lack)
    options = [f"model.path={llama}", "calib=self", "calib.n_samples=2", "eval=text", f"eval.path={documents}"]
    done = here(*options, "eval.seq_len=32", f"output_dir={tmp_path / 'out'}", "device=cpu")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert said in done.stderr
    assert "Lower calib.n_samples" in done.stderr


def test_other_faults_of_torch_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="sizes"), memory.lack_in_one_line("a hint"):
        raise RuntimeError("sizes of tensors must match")
