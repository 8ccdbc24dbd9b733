"""What a run would take on many workers: seconds of each part, memory and traffic of a worker. Nothing is measured.

Reading, the forward and writing are not shared; rows or experts, what statistics multiply, and windows of the
evaluation, are (docs/evidence.md). With ``split=windows`` the forward is, and all statistics, which are then sent.
Exchanges are counted as compiled loops of a CPU make them, also for a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.core.workers import Workers
from ace_cli.evaluation.base import Evaluation
from ace_cli.methods import catch_up
from ace_cli.methods.statistics import ROWS, SHARED_TOKENS
from ace_cli.pruning.recipe import Propagate
from ace_cli.run.machine_limit import Rates
from ace_cli.run.plan import PRODUCT_SHARE, Plan, share_of
from ace_cli.run.split import is_split

if TYPE_CHECKING:
    from ace_cli.model.slots import Slot
    from ace_cli.model.streamed import StreamedModel
    from ace_cli.run.config import RunConfig
    from ace_cli.run.hardware import Hardware


@dataclass(frozen=True)
class AtScale:
    """``parts``: seconds by name, of the worker that has most to do; ``traffic``: bytes that each worker is sent."""

    workers: int
    parts: dict[str, float]
    traffic: int

    @property
    def seconds(self) -> float:
        """Files are read and written while blocks are computed."""
        files = self.parts["read"] + self.parts["write"]
        work = sum(seconds for name, seconds in self.parts.items() if name not in ("read", "write", "evaluation"))
        return max(files, work) + self.parts.get("evaluation", 0.0)


def rates_of(card: Hardware) -> Rates:
    """As a probe of such a machine would give them."""
    return Rates(card.matmul, card.read, card.write, card.memory, card.float32)


def at_scale(
    config: RunConfig, model: StreamedModel, plan: Plan, rates: Rates, workers: int, link: float = math.inf
) -> AtScale:
    """The estimate for so many workers, each computing at ``rates``; ``link``: bytes a second that one is sent.

    ``plan``: of the calibration tokens that one of them sees.
    """
    statistics = outputs = method = traffic = 0.0
    apart = is_split(config, workers)
    for block in model.blocks:
        counts = {id(each.module): each.count for each in block.experts}
        for slot in block.slots:
            experts = counts.get(id(slot.module), 0)
            dealt = experts >= workers > 1 and _together(config) and not apart
            some = -(-experts // workers) / experts if dealt else 1.0
            share, shared = _of_rows(config, model, slot, 1 if dealt else workers)
            tokens = round(plan.tokens * share_of(model, slot))
            flops, sent = _statistics(config, model.device.type, slot, tokens, 1 if dealt else workers, shared)
            looked_at, sent_too = _outputs(config, model, slot, tokens, 1 if dealt else workers)
            statistics, outputs = statistics + some * flops, outputs + some * looked_at
            traffic += sent + sent_too
            method += some * share + (catch_up.flops(*slot.shape) if config.catch_up else 0)
            if workers > 1 and (dealt or shared):
                width = model.checkpoint.tensors[slot.key]
                traffic += slot.shape[0] * slot.shape[1] * width.nbytes / width.numel * (workers - 1) / workers
    forward, training = _forwards(config, model, plan, workers)
    if config.recover.acts and workers > 1:
        traffic += _gradients(config, plan, plan.tokens * (workers if apart else 1)) * 2 * (workers - 1) / workers
    float32 = rates.float32 or rates.matmul
    parts = {
        "read": plan.bytes_source / rates.read,
        "forward": plan.flops * forward / rates.matmul / PRODUCT_SHARE,
        "statistics": statistics / float32 + outputs / rates.matmul / PRODUCT_SHARE,
        "exchanges and repairs": method / float32,
        "traffic": traffic / link,
        "write": plan.bytes_source / rates.write,
    }
    if config.recover.acts:
        parts["recovery"] = plan.flops * training / rates.matmul / PRODUCT_SHARE
    if isinstance(config.eval, Evaluation) and config.eval.max_windows is not None:
        parts["evaluation"] = _evaluation(config.eval, model, plan, rates, workers, config.eval.max_windows)
    return AtScale(workers, parts, round(traffic))


def _together(config: RunConfig) -> bool:
    """Whether workers share the rows of a weight, or experts: of weights that are cut or replaced everyone does all."""
    return not (config.unit.cuts or config.unit.ranks)


def _of_rows(config: RunConfig, model: StreamedModel, slot: Slot, workers: int) -> tuple[float, bool]:
    """Operations of refining and repairing, of the worker with most rows; and whether rows are shared."""
    rows, columns = slot.shape
    apart = _together(config) and config.metric.refines_rows and config.repairing.repairs_rows(config.pattern)
    if apart:
        of_workers = Workers(0, workers).pieces(rows, model.device.type)
        most = max(sum(piece.stop - piece.start for piece in pieces) for pieces in of_workers)
    else:
        most = rows
    flops = config.metric.flops(most, columns) + config.repairing.flops(most, columns)
    return flops, apart and flops > 0


def _forwards(config: RunConfig, model: StreamedModel, plan: Plan, workers: int) -> tuple[float, float]:
    """Forwards of all tokens that pruning takes, and those that training takes of a worker."""
    training = config.forwards_of_training
    together = 1 if is_split(config, workers) else min(workers, max(1, config.recover.batch // config.calib.length))
    return plan.forwards - training, training / together


def _gradients(config: RunConfig, plan: Plan, tokens: int) -> float:
    """Bytes of all gradients of all steps: a step is three forwards of its tokens."""
    return 4 * plan.slot_weights * config.forwards_of_training / 3 * tokens / config.recover.batch


def _statistics(
    config: RunConfig, device: str, slot: Slot, tokens: int, workers: int, rows_shared: bool
) -> tuple[float, float]:
    """Operations of a worker, and the bytes that it is sent."""
    flops = sent = 0.0
    if is_split(config, workers):  # each of them is added up in slices, which are then sent to all
        held = sum(each.sent(*slot.shape) for each in config.statistics)
        return sum(each.flops(tokens, *slot.shape) for each in config.statistics), 2 * held * (workers - 1) / workers
    for each in config.statistics:
        together = workers if each.shared and each.pays(tokens, device) and not config.unit.ranks else 1
        flops += each.flops(tokens, *slot.shape) / together
        if not (each.of_rows and rows_shared):
            sent += each.sent(*slot.shape) * (together - 1) / together
    return flops, sent


def _outputs(config: RunConfig, model: StreamedModel, slot: Slot, tokens: int, workers: int) -> tuple[float, float]:
    """The same of the outputs that statistics look at, where these are computed beside the forward."""
    rows, columns = slot.shape
    if config.propagate is not Propagate.sublayer or not any(each.needs_output for each in config.statistics):
        return 0.0, 0.0
    shared = not is_split(config, workers) and model.device.type == "cpu"
    several = tokens >= SHARED_TOKENS and rows > ROWS and shared
    together = workers if several and not config.unit.ranks else 1
    return 2 * tokens * rows * columns / together, tokens * rows * model.dtype.itemsize * (together - 1) / together


def _evaluation(
    options: Evaluation, model: StreamedModel, plan: Plan, rates: Rates, workers: int, windows: int
) -> float:
    """Of the worker with most windows; dense and pruned; both are read by all workers."""
    at_once = model.windows_at_once(options.seq_len, model.plain_tokens)
    batches = -(-windows // at_once)
    mine = -(-batches // workers) / batches
    head: int = model.skeleton.get_input_embeddings().weight.numel()
    of_token = 2 * head + sum(
        2 * share_of(model, slot) * slot.shape[0] * slot.shape[1] for block in model.blocks for slot in block.slots
    )
    compute = windows * options.seq_len * mine * of_token / rates.matmul / PRODUCT_SHARE
    return 2 * max(compute, plan.bytes_source / rates.read)


def lines_at_scale(config: RunConfig, model: StreamedModel, plan: Plan, alone: Plan, rates: Rates) -> dict[str, str]:
    """For people: what stands on the left of a line -> the line. ``alone``: the plan of one that sees all tokens."""
    card, count = config.hardware, config.workers or 1
    link = card.link if card is not None else math.inf
    found, one = at_scale(config, model, plan, rates, count, link), at_scale(config, model, alone, rates, 1, link)
    machines = f" on {-(-count // int(card.workers))} machines" if card is not None else ""
    room = f" of {card.memory_gb:g} GB" if card is not None else ""
    host = f", and {plan.host_bytes / 1e9:,.1f} GB of its machine" if plan.device_bytes else ""
    return {
        "at scale": f"{count} workers{machines}: about {span(found.seconds)}; one alone {span(one.seconds)}",
        "parts": ", ".join(f"{name} {span(seconds)}" for name, seconds in found.parts.items()),
        "a worker": f"holds {(plan.device_bytes or plan.host_bytes) / 1e9:,.1f} GB{room}{host}; "
        f"is sent {found.traffic / 1e9:,.1f} GB",
    }


def span(seconds: float) -> str:
    """ "3.1 s", "12 min", "4.1 h"."""
    if seconds < 120:
        return f"{seconds:,.1f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
