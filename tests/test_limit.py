"""The limit of a run and its efficiency: rates that were measured, arithmetic that adds up."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ace_cli.methods.gradients import Gradient, Source
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
from ace_cli.model.slots import SlotFilter
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.recipe import Propagate
from ace_cli.report.facts import Report
from ace_cli.run import forecast
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
        assert rates.read > 0  # a busy machine shows any
        assert rates.write > 0
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
    # a Gram matrix of 5 inputs
    assert (Gram().nbytes(10, 3, 5), CosineTerm("second").nbytes(10, 3, 5)) == (100, 60)


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


def test_weights_that_stay_are_computed_with_too(llama: Path) -> None:
    """What is excluded, or is no consumer of units, takes as long in every forward; a gradient takes three more."""
    plans = {}
    for name, exclude in (("all", ()), ("some", ("*.gate_proj.*", "*.up_proj.*", "*.q_proj.*"))):
        model = StreamedModel(Checkpoint(llama), torch.device("cpu"), torch.float32, SlotFilter((), exclude))
        patterns = {slot.name: NofM(2, 4) for block in model.blocks for slot in block.slots}
        plans[name] = make_plan(model, patterns, Demand(64, 16))
    assert plans["some"].slot_weights < plans["all"].slot_weights == plans["all"].passed
    assert plans["some"].passed == plans["all"].passed
    assert plans["some"].flops == plans["all"].flops == 2 * 64 * plans["all"].slot_weights
    model = StreamedModel(Checkpoint(llama), torch.device("cpu"), torch.float32)
    readers = model.watching({slot.name for block in model.blocks for slot in block.slots if "down_proj" in slot.name})
    watched = make_plan(readers, {slot.name: NofM(2, 4) for block in readers.blocks for slot in block.slots},
                        Demand(64, 16), whole=model)  # fmt: skip
    assert (watched.passed, watched.flops) == (plans["all"].passed, plans["all"].flops)
    assert watched.slot_weights < watched.passed
    plain, gradient = (Demand(64, 16, statistics).forwards(64) for statistics in ((), (Gradient(Source.block, 0),)))
    assert gradient == plain + 3


def test_a_run_that_cuts_units_counts_the_weights_that_read_none(
    llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []

    def made(*asked: Any) -> Plan:
        plans.append(make_plan(*asked))
        return plans[-1]

    monkeypatch.setattr("ace_cli.run.pipeline.make_plan", made)
    for number, options in enumerate((["sparsity=0.5"], ["unit=channel", "sparsity=40%", "unit.multiple=8"])):
        prune_here(llama, tmp_path / str(number), "metric=wanda", *options)
    zeroed, cut = plans
    assert cut.passed == zeroed.passed == zeroed.slot_weights > cut.slot_weights


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


def test_no_run_is_faster_than_the_limit() -> None:
    """Under load the probe shows too little; what the run itself did, the machine can do."""
    slow = Limit(1000, 500, 60, 40, Rates(matmul=10, read=1, write=2, memory=5))
    for seconds in (0.1, 2.0, 30.0, 1000.0):
        found = slow.efficiency(seconds)
        assert 0 < found["efficiency"] <= 1
        assert found["limit_seconds"] <= seconds
        assert found["probed"]["matmul"] == 10
    assert slow.efficiency(1000.0)["rates"] == slow.efficiency(1000.0)["probed"]
    # its forward took 5 of 20 seconds: then the limit of computing is no more than those
    computed = replace(slow, rates=Rates(matmul=10, read=1e9, write=1e9, memory=1e9)).efficiency(20.0, 5.0)
    assert computed["rates"]["matmul"] == 200
    assert computed["efficiency"] == pytest.approx(5 / 20)


@pytest.mark.parametrize("slowed", [1, 1000])
def test_the_report_is_never_above_100_percent(
    llama: Path, tmp_path: Path, prune_here: Prune, monkeypatch: pytest.MonkeyPatch, slowed: int
) -> None:
    original = limit._matmul
    monkeypatch.setattr(limit, "_matmul", lambda *args: (original(*args)[0] / slowed, 1.0))
    monkeypatch.setattr(limit, "_read", lambda source: 1e10 / slowed**3)
    report = prune_here(llama, tmp_path / "out", "metric=wanda", "calib.n_samples=64")
    assert report.efficiency["efficiency"] <= 1
    raised = report.efficiency["rates"]["matmul"] > report.efficiency["probed"]["matmul"]
    assert raised == (slowed > 1)
    assert ("run itself showed more" in (tmp_path / "out" / "report.md").read_text()) == raised


def test_a_busy_machine_is_said(
    llama: Path, tmp_path: Path, here: Callable[..., subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert limit._spread([2e-3, 2.1e-3, 2.05e-3]) < 1.1
    assert limit._spread([2e-6, 9e-6]) == 1.0, "the clock's own noise"
    assert limit._spread([2e-3, 8e-3]) == 4
    for spread, said in ((1.2, False), (4.0, True)):
        monkeypatch.setattr(limit, "_matmul", lambda *_, spread=spread: (1e9, spread))
        out = tmp_path / f"{spread}"
        done = here(
            f"model.path={llama}", "calib=self", "calib.n_samples=2", "eval=none", "verbose=true", f"output_dir={out}"
        )
        assert ("machine      busy: " in done.stdout) == said
        assert ("The machine was busy" in (out / "report.md").read_text()) == said


def test_the_forecast_is_a_range_of_everything_one_waits_for(
    llama: Path, documents: Path, tmp_path: Path, here: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    options = [f"model.path={llama}", "calib=self", "calib.n_samples=2", "eval=text", f"eval.path={documents}"]
    done = here(*options, "eval.seq_len=32", "verbose=true", f"output_dir={tmp_path / 'out'}")
    expected = next(line for line in done.stdout.splitlines() if line.startswith("expects"))
    for phase in ("import", "calibrate", "prune", "evaluate", "samples"):
        assert re.search(rf"{phase} [\d.,]+ (to [\d.,]+ )?s", expected), expected
    assert re.search(r"takes +[\d.]+ to [\d.]+ s to prune", done.stdout)


def test_ranges_hold_what_they_say() -> None:
    assert [forecast.span(each) for each in ((3, 3), (2.06, 4.3), (40, 90), (0.01, 0.02), (0, 0))] == [
        "3.0 s", "2.1 to 4.3 s", "40 to 90 s", "0.01 to 0.02 s", "0.00 s",
    ]  # fmt: skip
    both = forecast.Forecast({"prune": (1, 4), "evaluate": (2, 8)}, ("zero-shot tasks",))
    assert both.total == (3, 12)
    assert both.line() == "3 to 12 s in all (prune 1.0 to 4.0 s, evaluate 2.0 to 8.0 s); zero-shot tasks on top"


def test_the_forecast_grows_with_what_is_done(llama: Path) -> None:
    model = StreamedModel(Checkpoint(llama), torch.device("cpu"), torch.float32)
    patterns = {slot.name: NofM(2, 4) for block in model.blocks for slot in block.slots}
    plan = make_plan(model, patterns, Demand(2048, 16, (Gram(),)))
    quiet = plan.limit(Rates(matmul=1e9, read=1e9, write=1e9, memory=1e9), model.checkpoint.nbytes)
    busy = replace(quiet, rates=replace(quiet.rates, spread=3.0))
    low, high = forecast.pruning(plan, quiet)
    assert 0 < low < plan.seconds(quiet) < high
    assert forecast.pruning(plan, busy)[1] == pytest.approx(3 * high)
    for few, many in (
        (forecast.evaluation(plan, quiet, 1000, 10), forecast.evaluation(plan, quiet, 2000, 10)),
        (forecast.evaluation(plan, quiet, 1000, 10), forecast.evaluation(plan, quiet, 1000, 10**6)),
        (forecast.samples(plan, quiet, 6, 8, 4), forecast.samples(plan, quiet, 6, 16, 4)),
    ):
        assert few[0] < many[0]
        assert few[1] < many[1]


def test_the_plan_counts_what_repairs_and_logits_hold(llama: Path) -> None:
    model = StreamedModel(Checkpoint(llama), torch.device("cpu"), torch.float32)
    patterns = {slot.name: NofM(2, 4) for block in model.blocks for slot in block.slots}
    rows, columns = max((slot.shape for slot in model.blocks[0].slots), key=lambda shape: shape[1])
    plain = make_plan(model, patterns, Demand(64, 16, (Gram(),), by_rows=False))
    repaired = make_plan(model, patterns, Demand(64, 16, (Gram(),), by_rows=False, nbytes=SparseGPT().nbytes))
    assert repaired.fixed_bytes - plain.fixed_bytes >= 16 * columns**2
    assert SparseGPT().nbytes(rows, columns) >= 16 * columns**2
    long = make_plan(model, patterns, Demand(64, 16, evaluated=10**6))
    assert long.fixed_bytes > 10**6 * 128 * (4 + 8)  # a vocabulary of 128
    at_once, one = (
        make_plan(model, patterns, Demand(64, 16, (Gram(),), propagate=order)).fixed_bytes
        for order in (Propagate.block, Propagate.sublayer)
    )
    assert at_once > one, "in sublayer order one input's statistics are in memory at a time"


def test_the_plan_names_what_is_much_cheaper(
    llama: Path, tmp_path: Path, prune_here: Callable[..., object], capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("ace_cli.methods.metrics.ace.ACE.flops", lambda self, rows, columns: 10**13)
    prune_here(llama, tmp_path / "a", "metric=ace")
    prune_here(llama, tmp_path / "b", "metric=varp")
    first, second = capfd.readouterr().out.split("Report ")[:2]
    (line,) = [line for line in first.splitlines() if line.startswith("cheaper")]
    assert "metric=varp" in line
    assert re.search(r": [\d.]+(?: to [\d.]+)? s$", line)
    assert float(line.split()[-2]) < 1000  # beside thousands of seconds for the exchanges; a busy machine is unsure
    assert "cheaper" not in second


def test_a_block_that_is_loaded_beside_another_is_planned(llama: Path) -> None:
    model = StreamedModel(Checkpoint(llama), torch.device("cpu"), torch.float32)
    patterns = {slot.name: NofM(2, 4) for block in model.blocks for slot in block.slots}
    one, two = (make_plan(model, patterns, Demand(64, 16, beside=beside)).host_bytes for beside in (0, 1))
    entries = [model.checkpoint.tensors[key] for key in model.blocks[0].files]
    assert two - one >= sum(entry.nbytes for entry in entries)
