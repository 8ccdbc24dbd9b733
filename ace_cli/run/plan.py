"""What a run will do and need, known before it starts."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ace_cli.core.errors import AceError
from ace_cli.core.memory import MAPPED
from ace_cli.pruning.recipe import Propagate
from ace_cli.run.machine_limit import Limit, Rates, existing

if TYPE_CHECKING:
    from ace_cli.methods.patterns import Pattern
    from ace_cli.methods.statistics import Statistic
    from ace_cli.model.blocks import Block
    from ace_cli.model.header import TensorEntry
    from ace_cli.model.slots import Slot
    from ace_cli.model.streamed import StreamedModel

#: Below this share of the block weights a "pruned" model would be mostly dense: stop instead.
MINIMUM_COVERAGE = 0.9
_LIBRARIES = 540_000_000
#: Counted in profiles of SmolLM2-135M and of a 7B Llama: a block's products beside large square ones; passes over the
#: inputs, as if in float32, of all else that a block computes and observes; whole-weight temporaries, in float32, where
#: rows are not pruned one after the other.
PRODUCT_SHARE, INPUT_PASSES, _WEIGHT_PASSES = 0.8, 12, 12
#: Forwards that one with its backward counts for.
_WITH_GRADIENT = 3


@dataclass(frozen=True)
class Demand:
    """What the chosen methods need, from which the plan counts memory and time.

    ``tokens``: of all calibration windows, in rows of ``length``. ``statistics``: what is remembered of each slot's
    input. ``propagate``: how often a block is run. ``surveys``: how often the dense model is run before pruning, to
    look at it. ``by_rows``: whether scores and patterns of a row need that row alone, so that no temporary is as
    large as a weight. ``flops(rows, columns)``: operations that refining and repairing a weight of this shape take.
    ``training_forwards`` and ``training_bytes``: what a recovery costs, in forwards of all tokens and in bytes for each
    weight of a block. ``nbytes(rows, columns)``: what refining and repairing such a weight hold beside the statistics.
    ``evaluated``: tokens of one evaluation window, whose logits are in memory at once. ``beside``: how many further
    blocks are loaded while one is worked on. ``catch_up``: whether the dense model runs beside the pruned one, its
    states in memory, too, and a copy of the dense block.
    """

    tokens: int = 1
    length: int = 1
    statistics: tuple[Statistic, ...] = ()
    propagate: Propagate = Propagate.sublayer
    surveys: int = 0
    by_rows: bool = True
    flops: Callable[[int, int], int] = lambda rows, columns: 0
    training_forwards: float = 0.0
    training_bytes: int = 0
    nbytes: Callable[[int, int], int] = lambda rows, columns: 0
    evaluated: int = 0
    beside: int = 0
    catch_up: bool = False

    def forwards(self, batch_tokens: int) -> float:
        """How often all tokens go through every block.

        In sublayer order one forward will do if all tokens fit into one batch. Several batches are run again for each
        group of slots, up to where that group reads its input: two and a half forwards in all. Where weights catch up,
        the dense model is run as often for that as the pruned one.
        """
        several = self.tokens > max(1, batch_tokens // self.length) * self.length
        observing = 2.5 if several and self.propagate is Propagate.sublayer else 1.0
        orders = observing + (self.propagate is Propagate.block) + self.catch_up * observing
        gradients = _WITH_GRADIENT if any(statistic.needs_backward for statistic in self.statistics) else 0
        return orders + self.surveys + self.training_forwards + gradients


@dataclass(frozen=True)
class Plan:
    """Sizes in elements and bytes; ``shapes`` are the slots', ``coverage`` the share of the blocks' weights in them.

    ``passed``: weights of the blocks that one token is multiplied with, pruned or not.
    ``host_bytes`` and ``device_bytes`` are expected peaks while pruning. Of them, or of the device's, ``fixed_bytes``
    are needed whatever the calibration; ``token_bytes`` is one token's hidden state, or two where the dense model runs
    beside the pruned one; ``budget_bytes`` what may be used.
    """

    model: str
    architecture: str
    parameters: int
    blocks: int
    shapes: dict[str, tuple[int, int]]
    slot_weights: int
    passed: int
    pruned_weights: int
    coverage: float
    left_dense: list[str]
    copied: list[str]
    tokens: int
    device: str
    dtype: str
    host_bytes: int
    device_bytes: int
    disk_bytes: int
    fixed_bytes: int
    token_bytes: int
    budget_bytes: float
    bytes_source: int
    flops: int
    method_flops: int
    forwards: float
    by_rows: bool
    #: Of a model that gets smaller: what is cut, in words, and what is left.
    cut: str = ""
    parameters_left: int = 0
    bytes_left: int = 0
    speeds: bool = True
    #: Of a model that is rounded: bits and bytes, in words.
    rounds: str = ""

    def smaller(self, entries: Mapping[str, TensorEntry], cut: str, speeds: bool) -> Plan:
        """The plan of a model whose files will hold ``entries``; ``speeds``: a token is computed with fewer weights."""
        left, nbytes = (sum(getattr(entry, name) for entry in entries.values()) for name in ("numel", "nbytes"))
        disk = self.disk_bytes - self.bytes_source + nbytes
        return replace(self, cut=cut, parameters_left=left, bytes_left=nbytes, disk_bytes=disk, speeds=speeds)

    def spills(self, tokens: int) -> bool:
        """Whether the hidden states of so many tokens must go to disk."""
        return self.fixed_bytes + tokens * self.token_bytes > self.budget_bytes

    def limit(self, rates: Rates, nbytes: int) -> Limit:
        """What pruning a checkpoint of ``nbytes`` costs at least."""
        return Limit(self.flops, self.method_flops, nbytes, nbytes, rates)

    def seconds(self, limit: Limit) -> float:
        """Expected seconds of pruning, writing and verifying, a permutation's search apart.

        Reading, writing and reading again go on meanwhile, on threads of their own that take their share of the cores.
        """
        parts, rates = limit.parts, limit.rates
        inputs = 4 * self.tokens * sum(columns for _, columns in self.shapes.values()) * self.forwards
        compute = parts["compute"] * self.forwards / PRODUCT_SHARE + parts["method"]
        prune = self.slot_weights / rates.prune
        whole = 0.0 if self.by_rows else _WEIGHT_PASSES * 4 * self.slot_weights / rates.fresh
        files = parts["read"] + parts["write"] + limit.bytes_written / rates.read
        work = compute + INPUT_PASSES * inputs / rates.memory + prune + whole
        return max(work + files / rates.threads, files)


def make_plan(
    model: StreamedModel,
    patterns: Mapping[str, Pattern],
    demand: Demand,
    budget: float = float("inf"),
    whole: StreamedModel | None = None,
) -> Plan:
    """Check the patterns against every shape and the slots against the model; then add up.

    ``whole``: the model with all its slots, where ``model`` is watched in some of them alone.
    Raises AceError where a pattern does not fit a weight or the slots cover too little of the blocks.
    """
    model.check_complete()
    slots = {slot.name: slot.shape for block in model.blocks for slot in block.slots}
    misfits = [f"{name} {shape}: {why}" for name, shape in slots.items() if (why := patterns[name].misfit(*shape))]
    if misfits:
        more = f" (and {len(misfits) - 1} more)" if len(misfits) > 1 else ""
        raise AceError(f"sparsity does not fit {misfits[0]}{more}.", "Choose a pattern whose M divides the inputs.")
    coverage, left = _coverage(model)
    if coverage < MINIMUM_COVERAGE:
        raise AceError(
            f"Only {coverage:.0%} of the block weights of {type(model.skeleton).__name__} can be pruned; the rest "
            f"is in {', '.join(left)}.",
            "Give its class a row in STORED_TRANSPOSED of ace_cli/model/slots.py, or exclude it to leave it dense.",
        )
    fixed, host, device = _memory(model, demand, budget)
    token_bytes = _hidden_size(model) * model.dtype.itemsize * (1 + demand.catch_up)
    spilled = fixed + demand.tokens * token_bytes > budget
    shares = [(share_of(model, slot), slot.shape) for block in model.blocks for slot in block.slots]
    passed = _passed(model if whole is None else whole)
    return Plan(
        model=str(model.checkpoint.folder),
        architecture=type(model.skeleton).__name__,
        parameters=sum(entry.numel for entry in model.checkpoint.tensors.values()),
        blocks=len(model.blocks),
        shapes=slots,
        slot_weights=sum(rows * columns for rows, columns in slots.values()),
        passed=passed,
        pruned_weights=sum(patterns[name].pruned(*shape) for name, shape in slots.items()),
        coverage=coverage,
        left_dense=left,
        copied=_copied(model),
        tokens=demand.tokens,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        host_bytes=host,
        device_bytes=device,
        disk_bytes=model.checkpoint.nbytes + spilled * demand.tokens * token_bytes * (1 + demand.surveys),
        fixed_bytes=fixed,
        token_bytes=token_bytes,
        budget_bytes=budget,
        bytes_source=model.checkpoint.nbytes,
        flops=2 * demand.tokens * passed,
        method_flops=sum(
            s.flops(round(demand.tokens * share), *shape) for s in demand.statistics for share, shape in shares
        )
        + sum(demand.flops(*shape) for _, shape in shares),
        forwards=demand.forwards(model.batch_tokens),
        by_rows=demand.by_rows,
    )


def check_room(plan: Plan, folder: Path) -> None:
    """AceError unless the disk of ``folder`` and the memory have room for the run."""
    faults, there = [], existing(folder)
    reserved = sum(file.stat().st_blocks * 512 for file in folder.glob("checkpoint.partial/*"))
    free = shutil.disk_usage(there).free + reserved
    if free < plan.disk_bytes * 1.01:
        faults.append(f"the run needs {plan.disk_bytes / 1e9:.1f} GB of disk, {there} has {free / 1e9:.1f} GB free")
    if plan.budget_bytes < plan.fixed_bytes:
        faults.append(
            f"it needs {plan.fixed_bytes / 1e9:.2f} GB of memory at least, it may use {plan.budget_bytes / 1e9:.2f} GB"
        )
    if faults:
        text = " and ".join(faults)
        hint = "Free some space, choose another output_dir, or raise memory_gb if it is set."
        raise AceError(f"{text[0].upper()}{text[1:]}.", hint)


def _coverage(model: StreamedModel) -> tuple[float, list[str]]:
    """Share of the blocks' matrices that are pruned or left as the user said, and the names of those left, with why."""
    covered = sum(rows * columns for block in model.blocks for rows, columns in (slot.shape for slot in block.slots))
    left = {name: left for block in model.blocks for name, left in block.left.items()}
    chosen = sum(left.count for left in left.values() if left.chosen)
    names = {f"{re.sub(r'[.][0-9]+(?=[.]|$)', '.*', name)} ({left.why})" for name, left in left.items()}
    return (covered + chosen) / max(1, covered + sum(left.count for left in left.values())), sorted(names)


def share_of(model: StreamedModel, slot: Slot) -> float:
    """The share of the tokens that reach the slot: all of them, or those that are routed to an expert."""
    if slot.in_module.index is None:
        return 1.0
    routed = getattr(model.skeleton.config.get_text_config(), "num_experts_per_tok", None)
    experts = getattr(slot.module, slot.leaf).shape[0]
    return min(1.0, float(routed or experts) / float(experts))


def _passed(model: StreamedModel) -> int:
    """Weights of the blocks that a token is multiplied with."""
    slots = [(share_of(model, slot), slot.shape) for block in model.blocks for slot in block.slots]
    left = sum(left.count for block in model.blocks for left in block.left.values())
    return left + sum(round(share * rows * columns) for share, (rows, columns) in slots)


def _copied(model: StreamedModel) -> list[str]:
    """What the files hold beside the text decoder."""
    copied = [f"{path} ({type(other).__name__}), no part of the text decoder" for path, other in model.others.items()]
    if unused := model.unused:
        copied.append(f"{len(unused)} tensors that {type(model.skeleton).__name__} does not read, like {unused[0]}")
    return copied


def _statistics(block: Block, demand: Demand, at_a_time: bool) -> int:
    """Bytes of the statistics that are held at once: of every linear layer, or one ``at_a_time``; and of one expert."""

    def held(slots: Iterable[Slot], backward: bool = False) -> int:
        some = [statistic for statistic in demand.statistics if statistic.needs_backward is backward]
        return sum(statistic.nbytes(demand.tokens, *slot.shape) for slot in slots for statistic in some)

    first = [[s for s in each.slots if s.in_module.index == each.slots[0].in_module.index] for each in block.experts]
    layers = max((held([slot]) for slot in block.layers), default=0) if at_a_time else held(block.layers)
    return layers + max((held(slots) for slots in first), default=0) + held(block.layers, backward=True)


def _hidden_size(model: StreamedModel) -> int:
    size: int = model.skeleton.config.get_text_config().hidden_size
    return size


def room_to_evaluate(model: StreamedModel, tokens: int, windows: int, budget: float) -> bool:
    """Whether the hidden states of ``windows`` windows of so many ``tokens`` fit into memory, too.

    Raises AceError if not even one block, or the logits of one window, do. ``budget`` in bytes.
    """
    entries, width = model.checkpoint.tensors, model.dtype.itemsize
    block = max(sum(entries[key].numel for key in block.files) for block in model.blocks) * width
    widest = max((max(slot.shape) for block in model.blocks for slot in block.slots), default=1)
    active = max(tokens, model.plain_tokens) * (4 * widest + 6 * _hidden_size(model)) * width
    fixed = max(3 * block + active, evaluation_bytes(model, tokens))
    fixed += _LIBRARIES if model.device.type == "cpu" else 0
    if fixed > budget:
        raise AceError(
            f"Windows of {tokens} tokens take {fixed / 1e9:.1f} GB of memory, {budget / 1e9:.1f} GB are free.",
            "Lower eval.seq_len, or use dtype=bfloat16.",
        )
    return fixed + windows * tokens * _hidden_size(model) * width <= budget


def evaluation_bytes(model: StreamedModel, tokens: int) -> int:
    """What the head and the logits of one window take: as computed, in float32, and their logarithms."""
    if not tokens:
        return 0
    head = model.skeleton.get_input_embeddings().weight
    return int(head.numel() * model.dtype.itemsize + tokens * head.shape[0] * (model.dtype.itemsize + 8))


def _memory(model: StreamedModel, demand: Demand, budget: float) -> tuple[int, int, int]:
    """Expected peak bytes while pruning: where it computes, but for hidden states; then on the host, on the device.

    The stem is in memory while the windows are embedded, then one block computes while the last one is written, then
    the next one read; pruned weights in another dtype than the one computed in, scores and masks of the largest slot
    (unless it is pruned by rows) and a batch's activations come on top.
    """
    entries, width = model.checkpoint.tensors, model.dtype.itemsize
    blocks = [[entries[key] for key in block.files] for block in model.blocks]
    loaded = (1 + demand.beside) * max(sum(entry.numel for entry in block) for block in blocks) * width
    stored = (1 + demand.beside) * max(sum(entry.nbytes for entry in block) for block in blocks)
    converted = stored if any(entry.nbytes != entry.numel * width for entry in blocks[0]) else 0
    kept = max(sum(entry.nbytes for entry in block if entry.nbytes < MAPPED) for block in blocks)
    shapes = [slot.shape for block in model.blocks for slot in block.slots]
    working = (
        0 if demand.by_rows else max(14 * rows * columns + demand.nbytes(rows, columns) for rows, columns in shapes)
    )
    at_a_time = demand.propagate is Propagate.sublayer and demand.tokens <= model.batch_tokens
    held = max(_statistics(block, demand, at_a_time) for block in model.blocks)
    in_batch = min(demand.tokens, model.batch_tokens)
    active = in_batch * (4 * max(max(shape) for shape in shapes) + 6 * _hidden_size(model)) * width
    embeddings = model.skeleton.get_input_embeddings().weight.numel() * width
    on_host = _LIBRARIES + stored + converted + 2 * kept  # the heap keeps about as much again as is used
    hidden = demand.tokens * _hidden_size(model) * width
    held += hidden if any(block.experts for block in model.blocks) else 0  # while each is shown its own tokens
    if demand.training_bytes:  # what goes into a block and what should come out of it are held in memory
        held += 3 * hidden + demand.training_bytes * max(sum(entry.numel for entry in block) for block in blocks)
    if demand.catch_up:  # a copy of the block, and the inputs of its slots in one batch
        inputs = max(sum(slot.shape[1] for slot in block.layers) for block in model.blocks)
        held += loaded // (1 + demand.beside) + in_batch * inputs * width
        hidden *= 2
    logits = evaluation_bytes(model, demand.evaluated)
    fixed = max(embeddings, logits, loaded + working + active + held) + (on_host if model.device.type == "cpu" else 0)
    whole = fixed + (0 if fixed + hidden > budget else hidden)
    return (fixed, whole, 0) if model.device.type == "cpu" else (fixed, on_host, whole)
