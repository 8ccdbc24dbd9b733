"""Work on pieces of rows against the same work on the whole."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from grids import pairs, triples
from tiny_models import make, token_windows, weights
from torch import Tensor

from ace_cli.core.errors import AceError
from ace_cli.core.timing import Clock
from ace_cli.kernels import selection
from ace_cli.kernels import threads as pieces
from ace_cli.kernels.selection import Scaled
from ace_cli.kernels.threads import each_columns, each_piece
from ace_cli.methods.metrics.ace import ACE, Combine
from ace_cli.methods.metrics.base import Metric
from ace_cli.methods.metrics.cosp import CosP, Mode
from ace_cli.methods.metrics.magnitude import Magnitude
from ace_cli.methods.metrics.ria import RIA
from ace_cli.methods.metrics.varp import Form, Norm, RIAVarP, VarP
from ace_cli.methods.metrics.wanda import Wanda
from ace_cli.methods.patterns import NofM, Pattern, Ratio, Scope, parse_sparsity
from ace_cli.methods.repair.none import NoRepair
from ace_cli.methods.row_pruning import masked, prune_rows
from ace_cli.methods.statistics import Seen
from ace_cli.model.files import Checkpoint, CheckpointWriter
from ace_cli.model.pruned import Pruned, Rereading, Violation, count_zeros
from ace_cli.model.slots import View
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.engine import prune
from ace_cli.pruning.recipe import Propagate, Recipe

PATTERNS = [Ratio(Fraction(1, 2)), Ratio(Fraction(3, 10)), NofM(2, 4), NofM(3, 8), NofM(8, 32)]
METRICS = [Magnitude(), Wanda(), RIA(), RIA(alpha=0), VarP(), VarP(wpow=2, norm=Norm.raw, form=Form.poly), RIAVarP()]
METRICS += [CosP(mode=mode) for mode in Mode] + [ACE(), ACE(combine=Combine.replace, relative=False)]


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Torch's number of threads, with pieces so small that every one of them is used."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    for size in ("PIECE", "LARGEST_PIECE", "_LEAST_SHARED"):
        monkeypatch.setattr(pieces, size, 200)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=[False, True], ids=["plain", "compiled"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether weights of any size are pruned and counted by compiled loops, or none are."""
    monkeypatch.setattr(selection, "LARGE", 0 if request.param else 1 << 60)
    assert (selection.loops_for(1) is not None) == request.param
    return bool(request.param)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


# --- pieces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "width"), [(0, 5), (1, 5), (41, 5), (40, 5), (7, 1000), (97, 64)])
def test_every_row_comes_once(threads: int, count: int, width: int) -> None:
    seen: list[int] = []
    each_piece(count, width, lambda rows: seen.extend(range(rows.start, rows.stop)))
    assert sorted(seen) == list(range(count))


def test_a_piece_has_one_thread_and_the_caller_keeps_its_own(threads: int) -> None:
    inside: list[tuple[int, bool]] = []
    workers: set[str] = set()

    def work(rows: slice) -> None:
        inside.append((torch.get_num_threads(), torch.is_inference_mode_enabled()))
        workers.add(threading.current_thread().name)

    each_piece(64, 100, work)
    assert set(inside) == {(1, True)}
    assert (threading.current_thread().name in workers) == (threads == 1)
    assert torch.get_num_threads() == threads
    later: list[int] = []
    other = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert later == [threads]


@pytest.mark.parametrize("columns", [1, 255, 256, 511, 512, 513, 1700])
def test_every_column_comes_once_in_the_same_slices(threads: int, columns: int) -> None:
    seen: list[tuple[int, int]] = []
    each_columns(3000, columns, lambda some: seen.append((some.start, some.stop)))
    bounds = [first for first, _ in sorted(seen)] + [columns]
    assert sorted(seen) == list(itertools.pairwise(bounds))
    assert bounds[:-1] == list(range(0, max(1, columns - 255), 256))


def test_a_fault_in_a_piece_is_raised(threads: int) -> None:
    def work(rows: slice) -> None:
        if rows.start <= 33 < rows.stop:
            raise AceError("row 33", "")

    with pytest.raises(AceError, match="row 33"):
        each_piece(64, 100, work)


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threads", "metric", "shape", "dtype"),
    pairs([1, 3], METRICS, [(33, 72), (5, 200), (130, 129), (64, 8), (3, 1)], [torch.float32, torch.bfloat16]),
    indirect=["threads"], ids=str,
)  # fmt: skip
def test_rows_score_as_the_whole_does(threads: int, metric: Metric, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight_OI = normal(*shape, dtype=dtype)
    seen = Seen(metric.needs())
    x_TI = normal(50, shape[1])
    for statistic in seen:
        statistic.update(x_TI, x_TI @ weight_OI.float().T, weight_OI.float())
    scores = metric.scores_of_rows(weight_OI.T.contiguous().T, seen)
    whole_OI = scores(weight_OI.float(), slice(None))
    assert torch.equal(metric.score(weight_OI.float(), seen), whole_OI)
    for start in range(0, shape[0], 7):
        rows = slice(start, start + 7)
        assert torch.equal(scores(weight_OI[rows].float(), rows), whole_OI[rows])


def test_relative_weights_are_divided_by_plain_sums(threads: int) -> None:
    """The sums of columns, made some columns at a time, are those that torch makes of the whole."""
    for shape in ((300, 700), (1000, 100), (70, 63), (2, 65)):
        size_OI = normal(*shape).abs()
        expected_OI = size_OI * (1 / size_OI.sum(0, keepdim=True) + 1 / size_OI.sum(1, keepdim=True))
        assert torch.equal(RIA(alpha=0).score(size_OI, _Ones(shape[1])), expected_OI)  # type: ignore[arg-type]


class _Ones:
    """Statistics of inputs that are all alike."""

    def __init__(self, inputs: int) -> None:
        self.mean_I = torch.ones(inputs, dtype=torch.float64)

    def __getitem__(self, _: Any) -> _Ones:
        return self


# --- masks -----------------------------------------------------------------------------------------------------------


def few_values(*shape: int) -> Tensor:
    """Ties everywhere, half of them zeros, some of these negative."""
    values = (normal(*shape) * 1.5).round().clamp(-1, 1)
    values[0] = -0.0
    return values


def any_scores(f_I: Tensor) -> Any:
    return lambda rows_RI, _: rows_RI.abs() * f_I


@pytest.mark.parametrize(
    ("threads", "compiled", "pattern", "dtype", "make_weight", "view", "scores_of"),
    triples(
        [1, 3], [False, True], PATTERNS, [torch.float32, torch.bfloat16, torch.float16, torch.float64],
        [normal, few_values], [View(), View(transposed=True), View(2), View(1, transposed=True)], [Scaled, any_scores],
    ),
    indirect=["threads", "compiled"], ids=lambda value: getattr(value, "__name__", str(value)),
)  # fmt: skip
def test_pruned_by_rows_as_whole(
    threads: int, compiled: bool, pattern: Pattern, dtype: torch.dtype, make_weight: Any, view: View, scores_of: Any
) -> None:
    """Ragged last pieces, ties, zeros of either sign, weights stored either way round, experts in one parameter."""
    stored = make_weight(*(() if view.index is None else (3,)), *((96, 37) if view.transposed else (37, 96))).to(dtype)
    before, weight_OI = stored.clone(), view(stored)
    norm_I = normal(96).abs() if make_weight is normal else torch.ones(96)
    score_OI = weight_OI.float().abs() * norm_I
    expected_OI = weight_OI.masked_fill(~pattern.keep(score_OI), 0)
    prune_rows(weight_OI, scores_of(norm_I), pattern, "it")
    assert torch.equal(weight_OI, expected_OI)
    assert torch.equal(weight_OI.signbit(), expected_OI.signbit())
    view(before)[:] = expected_OI
    assert torch.equal(stored, before), "something beside the slot was changed"


@pytest.mark.parametrize(
    ("threads", "compiled", "pattern", "value", "scores_of"),
    triples([1, 3], [False, True], PATTERNS, ["inf", "nan", "-inf"], [Scaled, any_scores]),
    indirect=["threads", "compiled"], ids=lambda value: getattr(value, "__name__", str(value)),
)  # fmt: skip
def test_rows_that_are_not_finite_are_refused(
    threads: int, compiled: bool, pattern: Pattern, value: str, scores_of: Any
) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight_OI = normal(37, 96, dtype=dtype)
        weight_OI[31, 5] = float(value)
        with pytest.raises(AceError, match="NaN or Inf in it"):
            prune_rows(weight_OI, scores_of(torch.ones(96)), pattern, "it")


@pytest.mark.parametrize(  # loops are compiled anew for each of these widths up to 32
    ("compiled", "m", "columns"), pairs([False, True], [2, 3, 8, 17, 64, 65, 128], [1, 30, 70]), indirect=["compiled"]
)
def test_groups_of_every_width(compiled: bool, m: int, columns: int) -> None:
    """More groups than a vector has places, and rows longer than a chunk of scores."""
    weight_OI, norm_I = normal(3, columns * m), normal(columns * m).abs()
    for pattern in (NofM(1, m), NofM(m // 2, m), NofM(m - 1, m)):
        keep_OI = pattern.keep(weight_OI.abs() * norm_I)
        pruned_OI = weight_OI.clone()
        prune_rows(pruned_OI, Scaled(norm_I), pattern, "it")
        assert torch.equal(pruned_OI, weight_OI * keep_OI)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_in_pieces(threads: int, dtype: torch.dtype) -> None:
    weight_OI, keep_OI = normal(37, 96), normal(37, 96) > 0.2
    new_OI = masked(weight_OI, keep_OI, dtype)
    assert new_OI.dtype == dtype
    assert torch.equal(new_OI, weight_OI.masked_fill(~keep_OI, 0).to(dtype))
    assert not (new_OI.signbit() & ~keep_OI).any()


# --- the engine ------------------------------------------------------------------------------------------------------


class WandaWhole(Wanda):
    """The same scores, given for the whole weight: nothing is pruned by rows."""

    def score(self, weight_OI: Tensor, seen: Seen) -> Tensor:
        return self.scores_of_rows(weight_OI, seen)(weight_OI, slice(None))


class WandaRefined(Wanda):
    """A mask that is looked at once more, as a whole."""

    def refine(self, weight_OI: Tensor, keep_OI: Tensor, seen: Seen, pattern: Pattern) -> Tensor:
        return keep_OI


STORED = [
    ("llama", torch.float32, torch.float32), ("llama", torch.bfloat16, torch.bfloat16),
    ("llama", torch.bfloat16, torch.float32), ("llama", torch.float32, torch.bfloat16),
    ("gpt2", torch.float32, torch.float32), ("gpt2", torch.bfloat16, torch.float32),
    ("mixtral", torch.float32, torch.float32), ("gpt_oss", torch.float32, torch.bfloat16),
    ("phi3", torch.float32, torch.float32),
]  # fmt: skip


@pytest.mark.parametrize(
    ("threads", "compiled", "sparsity", "family", "stored", "computed"),
    [
        (threads, compiled, sparsity, *stored)
        for (threads, compiled), sparsity, stored in pairs([(1, False), (3, True)], ["0.5", "2:4"], STORED)
    ],
    indirect=["threads", "compiled"],
)
def test_the_engine_prunes_by_rows_as_whole(
    tmp_path: Path, threads: int, compiled: bool, family: str, stored: torch.dtype, computed: torch.dtype, sparsity: str
) -> None:
    folder = make(tmp_path / "model", family, dtype=stored)
    whole, rows = (
        _pruned(folder, tmp_path / type(metric).__name__, metric, sparsity, computed)
        for metric in (WandaWhole(), Wanda())
    )
    assert any(not torch.equal(tensor, weights(folder)[name]) for name, tensor in rows.items())
    assert all(torch.equal(rows[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("metric", "sparsity", "scope", "by_rows"),
    [
        (Wanda(), "0.5", Scope.row, True), (Wanda(), "2:4", Scope.layer, True),
        (Wanda(), "0.5", Scope.layer, False), (WandaWhole(), "2:4", Scope.row, False),
        (WandaRefined(), "2:4", Scope.row, False),
        (ACE(), "2:4", Scope.row, False), (ACE(sweeps=0), "2:4", Scope.row, True),
    ],
)  # fmt: skip
def test_what_needs_the_whole_gets_it(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: Metric, sparsity: str, scope: Scope,
    by_rows: bool,
) -> None:  # fmt: skip
    called: list[str] = []
    monkeypatch.setattr(
        "ace_cli.pruning.slot_pruner.prune_rows", lambda weight, scores, pattern, what: called.append(what)
    )
    _pruned(llama, tmp_path / "out", metric, sparsity, torch.float32, scope)
    assert len(called) == (14 if by_rows else 0)


def _pruned(
    folder: Path, out: Path, metric: Metric, sparsity: str, dtype: torch.dtype, scope: Scope = Scope.row
) -> dict[str, Tensor]:
    out.mkdir()
    model = StreamedModel(Checkpoint(folder), torch.device("cpu"), dtype)
    patterns = {slot.name: parse_sparsity(sparsity, scope) for block in model.blocks for slot in block.slots}
    writer = CheckpointWriter(model.checkpoint, out)
    recipe = Recipe(metric, patterns, NoRepair(), Propagate.sublayer)
    for _ in prune(model, list(model.batches(token_windows(6, 16))), recipe, writer, Clock()):
        pass
    writer.finish()
    return weights(out)


# --- verification ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("view", [View(), View(2), View(transposed=True), View(0, transposed=True)], ids=repr)
def test_zeros_are_counted_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool, dtype: torch.dtype, view: View
) -> None:
    """A zero of either sign is one; the first row that breaks the pattern is named by its number in the weight."""
    from safetensors.torch import save_file

    monkeypatch.setattr("ace_cli.model.pruned.LARGEST_PIECE", 200)
    stored = normal(*(() if view.index is None else (3,)), *((96, 37) if view.transposed else (37, 96)), dtype=dtype)
    weight_OI = view(stored)
    weight_OI[~NofM(2, 4).keep(weight_OI.float().abs().contiguous())] = -0.0
    weight_OI[9, 8:12] = 0.0
    pruned = {"it": Pruned("w", view, NofM(2, 4))}
    save_file({"w": stored}, tmp_path / "model.safetensors")
    assert count_zeros(Checkpoint(tmp_path, bare=True), pruned) == {"it": 37 * 48 + 2}
    weight_OI[30] = weight_OI[23, 8:12] = 1.0
    save_file({"w": stored}, tmp_path / "model.safetensors")
    with pytest.raises(Violation, match="row 23, inputs 8 to 11 have 4 non-zeros, 2 allowed"):
        count_zeros(Checkpoint(tmp_path, bare=True), pruned)


@pytest.mark.parametrize("pattern", [Ratio(Fraction(1, 2)), Ratio(Fraction(1, 3)), NofM(2, 4), NofM(8, 32)], ids=str)
def test_any_pattern_is_counted(tmp_path: Path, compiled: bool, pattern: Pattern) -> None:
    from safetensors.torch import save_file

    weight_OI = normal(37, 96)
    weight_OI *= pattern.keep(weight_OI.abs())
    weight_OI[3, :7] = -0.0
    zeros = int((weight_OI == 0).sum())
    save_file({"w": weight_OI}, tmp_path / "model.safetensors")
    pruned = {"it": Pruned("w", View(), pattern)}
    assert count_zeros(Checkpoint(tmp_path, bare=True), pruned) == {"it": zeros}
    weight_OI[11, :33] = 1.0
    weight_OI[11, 33:] = 2.0
    save_file({"w": weight_OI}, tmp_path / "model.safetensors")
    with pytest.raises(Violation, match=r"it breaks .*: row 11"):
        count_zeros(Checkpoint(tmp_path, bare=True), pruned)


def test_what_is_on_disk_is_read_again_meanwhile(tmp_path: Path) -> None:
    """Weights are counted once they are there; those nobody spoke of, and those in one piece, at the end."""
    from safetensors.torch import save_file

    file, pattern = tmp_path / "model.safetensors", NofM(2, 4)
    names = {"first": View(), "second": View(), "turned": View(transposed=True), "silent": View()}
    weights = {name: torch.ones(8, 8) for name in names}
    save_file(weights, file)
    with Rereading(tmp_path, {name: Pruned(name, view, pattern) for name, view in names.items()}) as again:
        weights["first"][:, ::2] = 0
        save_file(weights, file)
        again.check(["first"])
        assert again._found[0].result() == {"first": 32}
        for name in ("second", "turned", "silent"):
            names[name](weights[name])[:, ::2] = 0
        save_file(weights, file)
        again.check(["second", "turned"])
        assert again.zeros() == dict.fromkeys(names, 32)
    weights["second"][5] = 1.0
    save_file(weights, file)
    with Rereading(tmp_path, {name: Pruned(name, view, pattern) for name, view in names.items()}) as again:
        again.check(["first", "second"])
        with pytest.raises(Violation, match="second breaks 2:4: row 5"):
            again.zeros()
