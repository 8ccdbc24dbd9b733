from __future__ import annotations

import dataclasses
import os
import warnings
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from test_packed import DTYPES, SHAPES, make_sparse, random_matrix, rounded
from tiny_models import add_tokenizer, make
from tiny_models import load as load_dense

from ace_cli import sparse
from ace_cli.core.errors import AceError
from ace_cli.export.packed import pack_folder
from ace_cli.kernels import bitmask, native
from ace_cli.kernels.bitmask import Bitmask, pack, product, unpack, why_slow, with_scales
from ace_cli.sparse import FEW_TOKENS, PackedLinear

#: What a float32 sum of rounded inputs may be off by, as a share of the largest output.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}
compiled = pytest.mark.skipif(
    why_slow(torch.bfloat16) != "", reason=f"no packed product here: {why_slow(torch.bfloat16)}"
)


@compiled
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_is_the_sum_it_stands_for(shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> None:
    weight, bias = random_matrix(*shape, dtype), random_matrix(1, shape[0], dtype)[0]
    x = random_matrix(tokens, shape[1], dtype, zeros=0)
    wanted = torch.zeros(tokens, shape[0], dtype=torch.float64)
    for token, row in ((token, row) for token in range(tokens) for row in range(shape[0])):
        wanted[token, row] = (weight[row].double() * x[token].double()).sum() + bias[row].double()
    found = product(pack(weight), x, bias)
    assert found.dtype == dtype
    assert (found.double() - wanted).abs().max() <= ROUNDING[dtype] * max(1.0, float(wanted.abs().max()))


@compiled
@pytest.mark.parametrize("tokens", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [16, 32, 64, 128, None], ids=str)
def test_a_product_of_codes_is_that_of_their_weights(group: int | None, dtype: torch.dtype, tokens: int) -> None:
    _, packed = rounded(67, 96 if group is None else 3 * group, group, dtype)
    x, bias = random_matrix(tokens, packed.shape[1], dtype, zeros=0), random_matrix(1, 67, dtype)[0]
    found, wanted = product(packed, x, bias), x.double() @ exactly(packed).T + bias.double()
    assert found.dtype == dtype
    assert (found.double() - wanted).abs().max() <= ROUNDING[dtype] * wanted.abs().max()


def exactly(packed: Bitmask) -> torch.Tensor:
    """code * scale, float64."""
    return unpack(dataclasses.replace(packed, rounded_to=torch.float32)).double()


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_counts_as_what_it_is(dtype: torch.dtype) -> None:
    """One row for each: alone in it, at one place after the other."""
    codes = torch.zeros(256, 64, dtype=torch.int8)
    numbers = torch.arange(-128, 128)
    codes[torch.arange(256), torch.arange(256) % 64] = numbers.to(torch.int8)
    packed = with_scales(pack(codes), torch.full((256, 1), 0.5).bfloat16(), dtype)
    assert torch.equal(product(packed, torch.ones(1, 64, dtype=dtype))[0].float(), numbers / 2)
    x = torch.arange(1, 65).to(dtype)[None]
    assert torch.equal(product(packed, x)[0], (numbers / 2 * (numbers % 64 + 1)).to(dtype))


@compiled
def test_threads_do_not_change_a_bit() -> None:
    packed, x = pack(random_matrix(300, 200, torch.bfloat16)), random_matrix(3, 200, torch.bfloat16, zeros=0)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append((product(packed, x), unpack(packed)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for each in found[1:] for a, b in zip(found[0], each, strict=True))


@compiled
def test_the_kernel_for_older_processors_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACE_PRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_FLAGS", ("-O3", "-march=haswell", "-shared", "-fPIC"))
    for function in (native.library, bitmask._library, bitmask._x_is_bfloat16):
        function.cache_clear()  # type: ignore[attr-defined]
    try:
        assert why_slow(torch.float16)
        assert not why_slow(torch.bfloat16)
        for dtype in DTYPES:
            weight, x = random_matrix(65, 130, dtype), random_matrix(3, 130, dtype, zeros=0)
            wanted = x.double() @ weight.double().T
            assert torch.equal(unpack(pack(weight)), weight)
            values, codes = rounded(65, 96, 32, dtype)
            assert torch.equal(unpack(codes), values)
            exact = x[:, :96].double() @ exactly(codes).T
            assert (product(codes, x[:, :96]).double() - exact).abs().max() <= ROUNDING[dtype] * exact.abs().max()
            assert (product(pack(weight), x).double() - wanted).abs().max() <= ROUNDING[dtype] * wanted.abs().max()
    finally:
        for function in (native.library, bitmask._library, bitmask._x_is_bfloat16):
            function.cache_clear()  # type: ignore[attr-defined]


# --- the compiler -------------------------------------------------------------------------------------------------


def fresh(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Any:
    monkeypatch.setenv("ACE_PRUNE_CACHE", str(cache))
    return native.library.__wrapped__


def test_a_missing_compiler_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = fresh(monkeypatch, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(native.NoKernel, match=r"^no C compiler is on the path \(cc, gcc, clang, \$CC\)$"):
        library("packed")


@compiled
def test_a_processor_without_a_kernel_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = fresh(monkeypatch, tmp_path)
    monkeypatch.setattr(native, "_FLAGS", ("-march=x86-64", "-shared", "-fPIC"))
    with pytest.raises(native.NoKernel, match=r"packed\.c does not compile .*no packed kernel for this processor") as e:
        library("packed")
    assert "\n" not in str(e.value)
    assert not list(tmp_path.rglob("*.so"))


@compiled
def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = fresh(monkeypatch, tmp_path)
    library("packed")
    (made,) = (tmp_path / "kernels").iterdir()
    stamp = made.stat().st_mtime_ns
    library("packed")
    assert [file.stat().st_mtime_ns for file in (tmp_path / "kernels").iterdir()] == [stamp]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="everything is writable here")
def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = fresh(monkeypatch, tmp_path / "locked" / "cache")
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(native.NoKernel):
        library("packed")


# --- models -------------------------------------------------------------------------------------------------------


def same_model(dense: Any, packed: Any, dtype: torch.dtype) -> None:
    """Logits of a token, of few and of many agree to rounding, and the same tokens are written."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for batch, length in ((1, 1), (1, FEW_TOKENS), (3, 11)):
            ids = torch.randint(3, 128, (batch, length), generator=generator)
            wanted, found = dense(ids).logits.float(), packed(ids).logits.float()
            assert (wanted - found).abs().max() <= 20 * ROUNDING[dtype] * wanted.abs().max()
        ids = torch.arange(5, 12)[None]
        written = [model.generate(ids, max_new_tokens=8, do_sample=False) for model in (dense, packed)]
    assert torch.equal(*written)


@pytest.mark.parametrize(  # products are tested in every dtype above; a family decides which modules are packed
    ("family", "dtype"),
    [*(("llama", dtype) for dtype in DTYPES), *zip(["qwen2", "gemma3_text", "opt", "mixtral"], cycle(DTYPES))],
    ids=str,
)
def test_a_packed_model_writes_what_the_dense_one_does(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make_sparse(tmp_path / "plain", family, dtype)
    pack_folder(folder, tmp_path / "packed")
    dense = load_dense(folder, dtype)
    for source in (tmp_path / "packed", folder):
        packed = sparse.load(source)
        assert packed.dtype == packed.config.dtype == dtype
        same_model(dense, packed, dtype)
        assert any(isinstance(module, PackedLinear) for module in packed.modules()) or why_slow(dtype)


@compiled
@pytest.mark.parametrize("group", [32, 48])
def test_a_rounded_model_computes_from_its_codes(group: int, tmp_path: Path, prune_here: Any) -> None:
    """Where the compiled code knows such groups; else from the weights that they stand for."""
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    source = make(tmp_path / "model", "llama", torch.bfloat16, hidden_size=96, num_attention_heads=6, head_dim=16)
    options = ["metric=magnitude", "quantize=int8", f"quantize.group={group}", "quantize.rounding=nearest", "pack=true"]
    prune_here(add_tokenizer(source), tmp_path / "out", *options)
    model, dense = sparse.load(tmp_path / "out" / "packed"), load_dense(tmp_path / "out" / "checkpoint", torch.bfloat16)
    same_model(dense, model, torch.bfloat16)
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == 14
    assert {layer.values.dtype for layer in layers} == {torch.int8 if group == 32 else torch.bfloat16}
    with torch.inference_mode():  # in another dtype its weights are what they were rounded to
        ids = torch.arange(5, 9)[None]
        assert torch.allclose(model.float()(ids).logits, dense.float()(ids).logits, atol=1e-3)


def test_the_head_is_not_copied_for_a_prompts_last_token(tmp_path: Path) -> None:
    folder, ids = make_sparse(tmp_path / "plain"), torch.arange(3, 40)[None]
    products = []
    for model in (load_dense(folder, torch.bfloat16), sparse.load(folder)):
        with torch.no_grad(), torch.profiler.profile() as found:
            model(ids, logits_to_keep=1)
        products.append(sum(event.count for event in found.key_averages() if event.key == "aten::bmm"))
    assert products[0] == products[1]


def test_another_dtype_may_be_asked_for(tmp_path: Path) -> None:
    folder = make_sparse(tmp_path / "plain")
    pack_folder(folder, tmp_path / "packed")
    same_model(load_dense(folder, torch.float32), sparse.load(tmp_path / "packed", torch.float32), torch.float32)


def test_what_is_saved_again_is_the_plain_checkpoint(tmp_path: Path) -> None:
    folder = make_sparse(tmp_path / "plain", "qwen2")
    sparse.load(folder).save_pretrained(tmp_path / "again")
    wanted, found = (load_dense(each, torch.bfloat16).state_dict() for each in (folder, tmp_path / "again"))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.parametrize("rows", [1, 2, 5, 9])
@pytest.mark.parametrize("compiler", [True, False])
def test_many_tokens_go_through_pieces_of_the_weight(
    rows: int, compiler: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "_PIECE", 70 * rows)
    if not compiler:
        monkeypatch.setattr(bitmask, "_library", lambda: None)
    weight, bias = random_matrix(9, 70, torch.float32), random_matrix(1, 9, torch.float32)[0]
    x = random_matrix(30, 70, torch.float32, zeros=0).view(3, 10, 70)
    assert torch.allclose(PackedLinear(pack(weight), bias)(x), x @ weight.T + bias, atol=1e-5)


def test_gradients_reach_the_inputs(tmp_path: Path) -> None:
    weight = random_matrix(8, 64, torch.float32)
    x = torch.ones(2, 64, requires_grad=True)
    PackedLinear(pack(weight))(x).sum().backward()
    assert torch.equal(x.grad, weight.sum(0).expand(2, -1))


def test_without_a_compiler_it_is_dense_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_sparse(tmp_path / "plain")
    monkeypatch.setattr(sparse, "why_slow", lambda _: "no C compiler is on the path")
    with pytest.warns(UserWarning, match="computed with densely: no C compiler is on the path"):
        model = sparse.load(folder)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    same_model(load_dense(folder, torch.bfloat16), model, torch.bfloat16)


def test_a_dense_model_stays_dense_and_says_so(llama: Path) -> None:
    with pytest.warns(UserWarning, match="no linear layer of it gets smaller"):
        sparse.load(llama)


def test_a_folder_without_weights_is_refused_in_one_line(tmp_path: Path) -> None:
    with warnings.catch_warnings(), pytest.raises(AceError, match=r"has no config\.json"):
        warnings.simplefilter("error")
        sparse.load(tmp_path)
