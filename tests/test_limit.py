"""The limit of a run and its efficiency: rates that were measured, arithmetic that adds up."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ace_cli.methods.metrics.ace import ACE
from ace_cli.methods.metrics.wanda import Wanda
from ace_cli.methods.patterns import NofM
from ace_cli.methods.repair.admm import Admm
from ace_cli.methods.repair.none import NoRepair
from ace_cli.methods.repair.sparsegpt import SparseGPT
from ace_cli.methods.repair.swaps import Swaps
from ace_cli.methods.statistics import CosineTerm, Gram, SecondMoment
from ace_cli.model import disk
from ace_cli.model.files import Checkpoint
from ace_cli.model.streamed import StreamedModel
from ace_cli.report.facts import Report
from ace_cli.run import machine_limit as limit
from ace_cli.run.machine_limit import Limit, Rates, probe
from ace_cli.run.plan import Demand, Plan, make_plan

Prune = Callable[..., Report]


def test_rates_are_measured_and_leave_nothing(llama: Path, tmp_path: Path) -> None:
    rates = probe(torch.device("cpu"), torch.float32, Checkpoint(llama), tmp_path / "not" / "there", NofM(2, 4))
    assert 1e8 < rates.matmul < 1e14
    assert all(1e6 < rate < 1e13 for rate in (rates.read, rates.write, rates.memory, rates.fresh, rates.prune))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_is_measured_the_way_the_run_takes(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways: set[tuple[str, bool]] = set()
    reader, write = disk.Reader, disk.write

    def write_noted(file: Path, start: int, data: memoryview, around: bool) -> None:
        ways.add(("write", around))
        assert not list(tmp_path.iterdir()) or not Path("/proc/self/fd").is_dir(), "a kill now would leave a file"
        write(file, start, data, around)

    def reader_noted(file: Path, around: bool) -> disk.Reader:
        ways.add(("read", around))
        return reader(file, around)

    monkeypatch.setattr(disk, "write", write_noted)
    monkeypatch.setattr(disk, "Reader", reader_noted)
    for around in (False, True):
        monkeypatch.setattr(Checkpoint, "around_cache", around)
        ways.clear()
        rates = probe(torch.device("cpu"), torch.float32, Checkpoint(llama), tmp_path, NofM(2, 4))
        assert ways == {("read", around), ("write", around)}
        assert rates.read > 1e4  # on a busy machine
        assert rates.write > 1e4
    assert list(tmp_path.iterdir()) == []


def test_a_faster_product_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bigger products are tried only while small ones are quick."""
    sizes = []
    monkeypatch.setattr(torch, "mm", lambda a, b: sizes.append(len(a)))
    monkeypatch.setattr(limit, "_LARGEST_PRODUCT", 1024)
    limit._matmul.__wrapped__(torch.device("cpu"), torch.float32, lambda: None)  # type: ignore[attr-defined]
    assert sizes[0] == 256
    assert max(sizes) == 1024


def test_the_limit_is_the_longer_of_computing_and_the_disk() -> None:
    found = Limit(1000, 500, 60, 40, Rates(matmul=100, read=10, write=20, memory=50))
    assert found.parts == {"compute": 10, "read": 6, "write": 2, "memory": 2, "method": 5}
    assert found.seconds == 10
    assert Limit(100, 500, 60, 40, found.rates).seconds == 8
    assert replace(found, rates=replace(found.rates, float32=25)).parts["method"] == 20
    assert found.efficiency(20)["efficiency"] == 0.5


def test_matrix_products_of_statistics() -> None:
    assert SecondMoment().flops(10, 3, 5) == 0
    assert Gram().flops(10, 3, 5) == 10 * 25  # half of it mirrored
    assert CosineTerm("second").flops(10, 3, 5) == 2 * 10 * 15
    assert CosineTerm("token").flops(10, 3, 5) == 0
    # a Gram matrix of 5 inputs, beside it what is factored or damped of it
    assert (Gram().nbytes(10, 3, 5), CosineTerm("second").nbytes(10, 3, 5)) == (200, 60)


ACTING = [Swaps(), Swaps(refit_steps=5), Admm(), Admm(iterations=20), SparseGPT(), SparseGPT(refit_steps=30)]


def test_more_work_is_forecast_for_more_weights_inputs_and_rounds() -> None:
    for one in (*ACTING, ACE()):
        assert one.flops(64, 128) > one.flops(32, 128) > 0, one
        assert one.flops(64, 256) > 2 * one.flops(64, 128), one
    for few, many in zip(ACTING[::2], ACTING[1::2], strict=True):
        assert many.flops(64, 128) > few.flops(64, 128), many
    assert ACE(sweeps=32).flops(64, 128) > ACE().flops(64, 128) > ACE(sweeps=0).flops(64, 128) == 0
    assert Wanda().flops(64, 128) == NoRepair().flops(64, 128) == 0


def test_the_forecast_knows_of_refining_and_repairing(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    found = {}
    for name in ("none", "swaps"):
        prune_here(llama, tmp_path / name, "metric=wanda", f"repair={name}", "calib.n_samples=8", "calib.seq_len=16")
        found[name] = json.loads((tmp_path / name / "report.json").read_text())["efficiency"]["method_flops"]
    model = StreamedModel(Checkpoint(llama), torch.device("cpu"), torch.float32)
    slots = [slot for block in model.blocks for slot in block.slots]
    assert found["none"] == 0
    assert found["swaps"] == sum(Swaps().flops(*slot.shape) + Gram().flops(128, *slot.shape) for slot in slots)


def test_the_report_has_its_efficiency(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    report = prune_here(llama, tmp_path / "out", "metric=cosp", "calib.n_samples=8", "calib.seq_len=16")
    found = json.loads((tmp_path / "out" / "report.json").read_text())["efficiency"]
    weights = report.model["slot_weights"]
    assert found["flops"] == 2 * weights * 8 * 16
    assert found["method_flops"] == 2 * weights * 8 * 16
    assert found["bytes_read"] == found["bytes_written"] == Checkpoint(llama).nbytes
    assert found["measured_seconds"] == pytest.approx(report.seconds["prune"] + report.seconds["write"])
    assert found["efficiency"] == pytest.approx(found["limit_seconds"] / found["measured_seconds"])
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"limit is {found['limit_seconds']:.2f} s" in text


def test_the_forecast_adds_up_what_was_measured(llama: Path) -> None:
    """Each rate, slower, makes the forecast longer; rows pruned one after the other take no fresh memory."""
    model = StreamedModel(Checkpoint(llama), torch.device("cpu"), torch.float32)
    patterns = {slot.name: NofM(2, 4) for block in model.blocks for slot in block.slots}
    rates = Rates(matmul=1e9, read=1e9, write=1e9, memory=1e9, fresh=1e9, prune=1e9)
    demand = Demand(2048, 16, (Gram(),))
    by_rows, whole = (make_plan(model, patterns, replace(demand, by_rows=flag)) for flag in (True, False))

    def seconds(plan: Plan, **slower: float) -> float:
        return plan.seconds(plan.limit(replace(rates, **slower), model.checkpoint.nbytes))

    assert seconds(whole) > seconds(by_rows)
    assert seconds(by_rows, fresh=1e6) == seconds(by_rows)
    for rate in ("matmul", "read", "write", "memory", "prune"):
        assert seconds(by_rows, **{rate: 1e6}) > seconds(by_rows), rate
    added = seconds(by_rows, prune=1e6) - seconds(by_rows)
    assert added == pytest.approx(by_rows.slot_weights * (1e-6 - 1e-9))
    assert seconds(by_rows, write=1e6) - seconds(by_rows, write=1e6, threads=2) == pytest.approx(
        (model.checkpoint.nbytes / 1e6 + 2 * model.checkpoint.nbytes / 1e9) / 2
    )
