"""How long a person will wait, phase by phase: a range, since a probe of a tenth of a second is no promise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.pruning.recipe import Permute
from ace_cli.report.pace import Span
from ace_cli.run.machine_limit import Limit
from ace_cli.run.plan import INPUT_PASSES, PRODUCT_SHARE, Plan

if TYPE_CHECKING:
    from ace_cli.run.context import RunContext

#: What is forecast may take so many times less or more: a probe of a tenth of a second knows no better. Of 14 runs of
#: SmolLM2 on cores shared with others (weights, channels, blocks; repairs, training) 13 ended within; one lost its
#: core.
UNSURE = 2.0
#: A step of writing text costs about so much for every block beside its arithmetic: Python calls every module.
_STEP = 1e-3

#: Names of bars.
PRUNING, VERIFYING = "pruning", "reading again what was written"
DENSE, PRUNED = "evaluating dense", "evaluating pruned"
DENSE_WRITES, PRUNED_WRITES = "dense writes on", "pruned writes on"


@dataclass(frozen=True)
class Forecast:
    """Seconds of each phase, at least and at most; ``apart`` is what nobody can tell before."""

    phases: dict[str, Span]
    apart: tuple[str, ...] = ()
    #: Seconds of the evaluation that are over: its texts are read.
    evaluated: float = 0.0

    @property
    def total(self) -> Span:
        """Of all phases together."""
        return sum(low for low, _ in self.phases.values()), sum(high for _, high in self.phases.values())

    def line(self, verbose: bool = True) -> str:
        """In words; without the phases unless ``verbose``."""
        parts = ", ".join(f"{name} {span(each)}" for name, each in self.phases.items())
        return (
            f"{span(self.total)} in all"
            + (f" ({parts})" if verbose else "")
            + "".join(f"; {name} on top" for name in self.apart)
        )

    def bars(self) -> dict[str, Span]:
        """The bars that are to come, by name: what each of them will take."""
        low, high = self.phases.get("evaluate", (0.0, 0.0))
        half = max(0.0, low - self.evaluated) / 2, max(0.0, high - self.evaluated) / 2
        least, most = self.phases.get("samples", (0.0, 0.0))
        writes = least / 2, most / 2
        found = {PRUNING: self.phases.get("prune", (0.0, 0.0)), DENSE: half, PRUNED: half}
        return {**found, DENSE_WRITES: writes, PRUNED_WRITES: writes}


def span(seconds: Span) -> str:
    """ "3 s", "2.1 to 4.3 s", "40 to 90 s"; what rounds to the same is one number."""
    digits = 2 if seconds[1] < 1 else 1 if seconds[1] < 10 else 0
    low, high = (f"{each:,.{digits}f}" for each in seconds)
    return f"{low} s" if low == high else f"{low} to {high} s"


def of_run(run: RunContext) -> Forecast:
    """Everything that a person waits for, once all texts are there; what is done counts as it was."""
    config, plan, limit, texts, done = run.config, run.plan, run.limit, run.texts, run.phases.clock.seconds
    phases = {name: (done[name], done[name]) for name in ("import", "calibrate")}
    phases["prune"] = pruning(plan, limit)
    if texts.evaluation is not None:
        head = run.model.skeleton.get_input_embeddings().weight.numel()
        low, high = evaluation(plan, limit, texts.evaluation.ids_NL.numel(), head)
        phases["evaluate"] = done["evaluate"] + low, done["evaluate"] + high
        if config.samples.wanted and config.samples.refusal(plan.parameters, run.model.dtype) is None:
            rows, size = 2 * len(config.samples.prompts), run.model.dtype.itemsize
            phases["samples"] = samples(plan, limit, rows, config.samples.tokens, size)
    apart = {
        "zero-shot tasks": texts.tasks is not None,
        "the search for a permutation": config.permute is not Permute.none,
        "later stages": bool(config.stages),
    }
    return Forecast(phases, tuple(name for name, wanted in apart.items() if wanted), done["evaluate"])


def pruning(plan: Plan, limit: Limit) -> Span:
    """Pruning, writing and verifying."""
    return _around(plan.seconds(limit), limit)


def evaluation(plan: Plan, limit: Limit, tokens: int, head_weights: int) -> Span:
    """``tokens`` through the dense model and the pruned one, and through a head of so many weights."""
    compute = 2 * tokens * (plan.passed + head_weights) / limit.rates.matmul / PRODUCT_SHARE
    inputs = INPUT_PASSES * 4 * tokens * sum(columns for _, columns in plan.shapes.values()) / limit.rates.memory
    return _around(2 * (compute + inputs + limit.parts["read"]), limit)


def samples(plan: Plan, limit: Limit, rows: int, steps: int, itemsize: int) -> Span:
    """Both models, whole in memory, write ``steps`` tokens in each of ``rows``."""
    nbytes = plan.parameters * itemsize
    step = max(nbytes / limit.rates.memory, 2 * plan.parameters * rows / limit.rates.matmul) + _STEP * plan.blocks
    return _around(2 * (steps * step + limit.parts["read"] + nbytes / limit.rates.fresh), limit)


def _around(seconds: float, limit: Limit) -> Span:
    """A busy machine may be slower than it was in the probe, or faster, once it is left alone."""
    unsure = UNSURE * (limit.rates.spread if limit.rates.busy else 1.0)
    return seconds / unsure, seconds * unsure
