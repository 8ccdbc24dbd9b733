"""Hydra's configuration -> plain objects, every range checked before a model is touched. The only user of OmegaConf."""

from __future__ import annotations

import functools
import math
import os
import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ace_cli.core import registry
from ace_cli.core.device import Dtype, device_faults
from ace_cli.core.errors import AceError, did_you_mean, first_line
from ace_cli.core.stage import Stage
from ace_cli.core.workers import Split
from ace_cli.data.calibration import Calibration
from ace_cli.evaluation.base import Evaluation
from ace_cli.evaluation.gate import Gate
from ace_cli.evaluation.none import NoEvaluation
from ace_cli.evaluation.samples import Samples
from ace_cli.evaluation.speed.options import Bench
from ace_cli.export.factors import Factors
from ace_cli.export.gguf import Gguf
from ace_cli.export.gguf import fault as gguf_fault
from ace_cli.export.packed import Pack
from ace_cli.export.quantised import Quantised
from ace_cli.methods import catch_up
from ace_cli.methods.allocation.base import Allocation
from ace_cli.methods.metrics.base import Metric
from ace_cli.methods.patterns import NofM, Pattern, Ratio, Scope, parse_sparsity
from ace_cli.methods.quantize.base import Quantize
from ace_cli.methods.repair.base import Repair
from ace_cli.methods.statistics import Statistic
from ace_cli.model.source import ModelConfig
from ace_cli.pruning.diagnostics import Observe
from ace_cli.pruning.recipe import Permute, Propagate
from ace_cli.pruning.units.base import Unit
from ace_cli.recovery.base import Recovery
from ace_cli.report.trackers.base import Tracker
from ace_cli.run import hydra_api, target
from ace_cli.run.hardware import Hardware
from ace_cli.run.hub import fault as hub_fault


@dataclass
class Schema:
    """What a configuration may say; groups (metric, calib, ...) bring their own schemas."""

    model: ModelConfig = field(default_factory=ModelConfig)
    metric: Any = MISSING
    allocation: Any = MISSING
    repair: Any = MISSING
    quantize: Any = MISSING
    recover: Any = MISSING
    unit: Any = MISSING
    calib: Any = MISSING
    eval: Any = MISSING
    sparsity: Any = None
    keep: int | None = None
    target_gb: float | None = None
    target_params: Any = None
    scope: Scope | None = None
    propagate: Propagate = Propagate.sublayer
    permute: Permute = Permute.none
    catch_up: float = 0.0
    include: Any = None
    exclude: Any = None
    observe: Observe = field(default_factory=Observe)
    samples: Samples = field(default_factory=Samples)
    gate: Gate = field(default_factory=Gate)
    tracker: Any = MISSING
    html: bool = True
    device: str = "auto"
    dtype: Dtype = Dtype.auto
    memory_gb: float | None = None
    pack: Any = False
    export: str | None = None
    bench: bool = False
    keep_checkpoint: bool = True
    push_to_hub: str | None = None
    dry_run: bool = False
    split: Split = Split.rows
    workers: int | None = None
    hardware: str | None = None
    verbose: bool = False
    output_dir: str = MISSING


@dataclass(frozen=True)
class RunConfig:
    """One run, checked. ``text`` is the configuration as YAML, for the report."""

    model: ModelConfig
    metric: Metric
    allocation: Allocation
    repair: Repair
    quantize: Quantize
    recover: Recovery
    calib: Calibration
    eval: Evaluation | NoEvaluation
    pattern: Pattern
    unit: Unit
    keep: int | None
    target: target.Target | None
    propagate: Propagate
    permute: Permute
    catch_up: float
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    observe: Observe
    samples: Samples
    gate: Gate
    tracker: Tracker
    html: bool
    device: str
    dtype: Dtype
    memory_gb: float | None
    stages: tuple[Stage, ...]
    bench: Bench | None
    keep_checkpoint: bool
    push_to_hub: str | None
    dry_run: bool
    split: Split
    workers: int | None
    hardware: Hardware | None
    verbose: bool
    output_dir: Path
    output_dir_given: bool
    text: str

    @property
    def requested(self) -> str:
        """What was asked for, in short: a sparsity, or units to keep."""
        return str(self.pattern) if self.keep is None else f"keep {self.keep}"

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What the methods read, each once."""
        moving = catch_up.needs(self.catch_up)
        return tuple(dict.fromkeys((*self.metric.needs(), *self.repairing.needs(), *moving)))

    @property
    def forwards_of_training(self) -> float:
        """Forwards of all calibration tokens that the recovery costs."""
        rows = self.calib.rows
        return self.recover.forwards(sum(self.recover.trained_on(rows)) / rows)

    @property
    def needs_data(self) -> bool:
        """Whether any of the chosen methods looks at calibration windows."""
        parts = (self.metric, self.repairing, self.allocation)
        looks = self.metric.of_states or self.recover.acts or self.catch_up > 0
        return looks or any(part.needs() for part in parts)

    @property
    def repairing(self) -> Repair:
        """The repair, with the rounding that ends it."""
        return self.quantize.around(self.repair)


#: The sparsity where nothing is said; and where bits alone make the model smaller.
HALF, NOTHING = "0.5", "0"

#: More than anybody has.
MOST_WORKERS = 100_000

#: Options of their own that belong to no choice.
SETTINGS: dict[str, type] = {"observe": Observe, "samples": Samples, "gate": Gate}


def store_schemas() -> None:
    """Make every registered choice, and the schema of the whole, known to Hydra, if they are not yet."""
    for group in registry.PACKAGES:
        for name, cls in registry.choices(group).items():
            _store_choice(group, name, cls)
    _store_whole()


@functools.cache
def _store_whole() -> None:
    ConfigStore.instance().store(group="schema", name="prune", node=Schema, package="_global_")


@functools.cache
def _store_choice(group: str, name: str, cls: type) -> None:
    store, brought = ConfigStore.instance(), registry.brought(group, name)
    where = f"schema/{group}" if brought else group
    store.store(group=where, name=name, node=cls)
    if brought:
        others = [{f"override /{other}": choice} for other, choice in brought.items()]
        node = {"defaults": [f"/{where}/{name}@{group}", "_self_", *others]}
        store.store(group=group, name=name, node=node, package="_global_")


def config_folder() -> Path:
    """The ``configs`` tree: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def named_model(name: str) -> ModelConfig:
    """What ``model=NAME`` (a card) or ``model.path=NAME`` means. Raises AceError when it is neither."""
    cards = {file.stem: file for file in (config_folder() / "model").glob("*.yaml")}
    model = ModelConfig(path=name)
    if name in cards:
        card: Any = OmegaConf.load(cards[name])
        model = ModelConfig(**OmegaConf.to_container(card.get("model", card)))  # type: ignore[arg-type]
    if faults := unfit("model", model) or model.faults():
        raise AceError(faults[0], "" if "/" in name else did_you_mean(name, cards))
    return model


def _hardware(name: str) -> Hardware:
    """A card in ``configs/machines/``, or a file of the same lines. Raises AceError when it is neither, or damaged."""
    cards = {file.stem: file for file in (config_folder() / "machines").glob("*.yaml")}
    file = cards.get(name, Path(name).expanduser())
    if not file.is_file():
        raise AceError(f"hardware={name}: neither a card nor a file", did_you_mean(name, cards))
    try:
        card = Hardware(**OmegaConf.to_container(OmegaConf.load(file)))  # type: ignore[arg-type]
    except Exception as fault:  # YAML fails in as many ways as there are files
        raise AceError(
            f"hardware={name}: {first_line(fault)}", "Begin with a copy of configs/machines/h100x8.yaml."
        ) from fault
    if faults := card.faults():
        raise AceError("; ".join(faults))
    return card


def parse(config: DictConfig, output_dir: Path, output_dir_given: bool = True) -> RunConfig:
    """Plain objects from a composed configuration. Raises AceError that names every fault at once.

    ``output_dir_given``: the user named the folder; otherwise it is a new dated one.
    """
    if faults := _unchosen(config) or _unknown_options(config):
        raise AceError("; ".join(faults))
    parts: Any = OmegaConf.to_object(config)
    if faults := unfit("", parts):  # what is asked of a value next takes it for what it should be
        raise AceError("; ".join(faults))
    faults = _faults(parts) + target.faults(parts)
    if parts.sparsity is None:
        parts.sparsity = NOTHING if parts.quantize.of_target else HALF
    pattern: Pattern | None = None
    try:
        pattern = parse_sparsity(parts.sparsity, parts.scope or parts.metric.default_scope)
        faults += _misfits(parts, pattern) + _misfits_of_unit(parts, pattern)
    except AceError as fault:
        faults.append(str(fault).rstrip("."))
    if faults or pattern is None:
        raise AceError("; ".join(faults) + ".")
    return RunConfig(
        model=parts.model,
        metric=parts.metric,
        allocation=parts.allocation,
        repair=parts.repair if parts.unit.cuts else parts.metric.with_repair(parts.repair),
        quantize=parts.quantize,
        recover=parts.recover,
        calib=parts.calib,
        eval=parts.eval,
        pattern=pattern,
        unit=parts.unit,
        keep=parts.keep,
        target=target.target_of(parts),
        propagate=parts.propagate,
        permute=parts.permute,
        catch_up=parts.catch_up,
        include=_globs(parts.include),
        exclude=_globs(parts.exclude),
        observe=parts.observe,
        samples=parts.samples,
        gate=parts.gate,
        tracker=parts.tracker,
        html=parts.html,
        device=parts.device,
        dtype=parts.dtype,
        memory_gb=parts.memory_gb,
        stages=_stages(parts),
        bench=Bench() if parts.bench else None,
        keep_checkpoint=parts.keep_checkpoint,
        push_to_hub=parts.push_to_hub,
        dry_run=parts.dry_run,
        split=parts.split,
        workers=parts.workers,
        hardware=None if parts.hardware is None else _hardware(parts.hardware),
        verbose=parts.verbose,
        output_dir=output_dir.expanduser().absolute(),
        output_dir_given=output_dir_given,
        text=OmegaConf.to_yaml(config),
    )


def _faults(parts: Any) -> list[str]:
    """What is wrong with the choices, whatever the pattern."""
    faults = []
    if not str(parts.output_dir).strip():
        faults.append("output_dir is empty: name a folder")
    for name in ("model", *SETTINGS, *registry.PACKAGES):
        faults += getattr(parts, name).faults()
    if parts.gate.max_ppl_ratio is not None and isinstance(parts.eval, NoEvaluation):
        faults.append("gate.max_ppl_ratio needs a perplexity, eval=none measures none: choose an eval")
    faults += device_faults(parts.device)
    if parts.memory_gb is not None and not parts.memory_gb > 0:
        faults.append(f"memory_gb={parts.memory_gb}: must be more than 0, or null for what is free")
    if parts.workers is not None and not 1 <= parts.workers <= MOST_WORKERS:
        faults.append(f"workers={parts.workers}: must be 1 up to {MOST_WORKERS:,}, or null")
    for name in ("workers", "hardware"):
        if getattr(parts, name) is not None and not parts.dry_run:
            faults.append(f"{name} is for plans: add dry_run=true; torchrun decides how many workers there are")
    if not 0 <= parts.catch_up <= 1:
        faults.append(f"catch_up={parts.catch_up:g}: must be 0 up to 1, such as 0.5")
    if parts.pack not in (True, False, "zstd"):
        faults.append(f"pack={parts.pack}: must be true, false or zstd")
    if parts.export is not None and parts.export.partition(":")[0] != "gguf":
        faults.append(f"export={parts.export}: must be gguf or gguf:TYPE")
    elif parts.export and (wrong := gguf_fault(_gguf_kind(parts.export))):
        faults.append(wrong)
    if unnamed := hub_fault(parts.push_to_hub):
        faults.append(unnamed)
    elif parts.push_to_hub and not parts.keep_checkpoint:
        faults.append("keep_checkpoint=false leaves nothing for push_to_hub")
    for name in ("include", "exclude"):
        if any(not isinstance(glob, str) or not glob for glob in _globs(getattr(parts, name))):
            faults.append(f"{name}={getattr(parts, name)}: give globs on names of weights, like *.down_proj.*")
    return faults


def _misfits(parts: Any, pattern: Pattern) -> list[str]:
    """What makes no sense with this pattern."""
    faults = []
    if reason := parts.allocation.refusal(pattern):
        faults.append(f"allocation={registry.name_of('allocation', parts.allocation)}: {reason}")
    if isinstance(pattern, NofM) and parts.scope is Scope.layer:
        faults.append(f"scope=layer means nothing for sparsity={pattern}: N:M compares within groups of {pattern.m}")
    if parts.permute is not Permute.none and isinstance(pattern, Ratio):
        faults.append(f"permute={parts.permute.value} means nothing for sparsity={parts.sparsity}: N:M has groups")
    if parts.recover.acts and parts.propagate is Propagate.dense:
        faults.append("recover needs what the pruned blocks make of the text, propagate=dense looks at none of it")
    if parts.catch_up > 0 and parts.propagate is Propagate.dense:
        faults.append("catch_up makes up for what was pruned before, propagate=dense looks at none of it")
    zeros = not parts.unit.cuts and pattern.pruned(9216, 9216) > 0
    faults += parts.recover.misfits(parts.unit.cuts, zeros)
    faults += _misfits_of_quantize(parts) + _misfits_of_split(parts)
    if parts.pack and (8 if parts.quantize.acts else 16) * pattern.pruned(1, 9216) <= 9216:
        faults.append(f"pack: at sparsity={pattern} a bit mask takes more than the zeros did")
    return faults


def _misfits_of_quantize(parts: Any) -> list[str]:
    """What does not go with rounding, yet."""
    if not parts.quantize.acts:
        return []
    name, faults = registry.name_of("quantize", parts.quantize), []
    if (unit := registry.name_of("unit", parts.unit)) != "weight":
        faults.append(
            f"quantize={name} does not go with unit={unit}: cut first, then quantise the smaller checkpoint "
            "(model.path=FOLDER sparsity=0)"
        )
    if parts.recover.acts:
        faults.append(f"recover would move weights off the grid of quantize={name}: recover first, then quantise")
    return faults


def _misfits_of_split(parts: Any) -> list[str]:
    """What looks at all calibration windows at once, where workers have windows of their own."""
    if parts.split is Split.rows:
        return []
    looks = {
        "unit": not parts.unit.splits_windows,
        "allocation": parts.allocation.of_states,
        "metric": any(statistic.needs_backward for statistic in parts.metric.needs()),
    }
    names = [f"{group}={registry.name_of(group, getattr(parts, group))}" for group, does in looks.items() if does]
    return [f"split=windows does not go with {name}, which looks at all windows at once: split=rows" for name in names]


def _stages(parts: Any) -> tuple[Stage, ...]:
    """What is made of the finished checkpoint, in this order."""
    factored = [Factors()] if parts.unit.ranks and parts.unit.factors else []
    codes = [Quantised(parts.quantize.bits, parts.quantize.group)] if parts.quantize.acts else []
    packed = [Pack(parts.pack == "zstd")] if parts.pack else []
    return (*factored, *codes, *packed, *([Gguf(_gguf_kind(parts.export), parts.unit.uneven)] if parts.export else []))


def _gguf_kind(export: str) -> str:
    """gguf -> stored, gguf:f16 -> f16."""
    return export.partition(":")[2] or "stored"


def _misfits_of_unit(parts: Any, pattern: Pattern) -> list[str]:
    """What makes no sense with the unit that is taken out."""
    unit = registry.name_of("unit", parts.unit)
    faults = []
    for refusal in parts.unit.refusals(parts.metric, parts.repair):
        group, _, reason = refusal.partition(": ")
        faults.append(
            f"{group}={registry.name_of(group, getattr(parts, group))} does not go with unit={unit}: {reason}"
        )
    if parts.catch_up > 0 and not parts.unit.catches_up:
        faults.append(f"catch_up does not go with unit={unit}: it is for single weights and for whole blocks that go")
    elif parts.catch_up > 0 and parts.metric.of_states and not parts.repair.acts:
        faults.append(f"catch_up tells a refit of unit={unit} what to aim at, repair=none has none")
    if parts.allocation.of_ranks and not parts.unit.ranks:
        name = registry.name_of("allocation", parts.allocation)
        faults.append(f"allocation={name} tries products: unit=rank")
    if parts.unit.slices:
        return faults + _misfits_of_slices(parts, pattern)
    if parts.unit.ranks:
        return faults + _misfits_of_ranks(parts, pattern)
    if not parts.unit.cuts:
        if parts.keep is not None:
            faults.append("keep means nothing for unit=weight: give a sparsity")
        if parts.allocation.units_only:
            faults.append(f"allocation={registry.name_of('allocation', parts.allocation)} is for units: unit=channel")
        return faults
    if parts.recover.acts and parts.recover.in_stream and not parts.unit.trains:
        name = registry.name_of("recover", parts.recover)
        faults.append(f"recover={name} does not follow a cut of {unit}s, it trains blocks as they are: use distill")
    if isinstance(pattern, NofM):
        faults.append(f"sparsity={pattern} means nothing for unit={unit}: give the share that goes (20%), or keep")
    elif not pattern.p and parts.keep is None:  # type: ignore[attr-defined]
        faults.append(f"sparsity={parts.sparsity} takes no {unit}s away")
    if parts.allocation.surveys and not parts.unit.uneven:
        name = registry.name_of("allocation", parts.allocation)
        hint = "add unit.uneven=true, or use uniform" if "uneven" in vars(parts.unit) else "use uniform"
        faults.append(f"allocation={name} gives blocks widths of their own: {hint}")
    if parts.allocation.surveys and parts.keep is not None:
        faults.append("keep is the same number in every block: with an allocation give a sparsity")
    if parts.propagate is Propagate.dense and not parts.unit.dense_inputs:
        faults.append(f"propagate=dense means nothing for unit={unit}: what is left runs without what went")
    reasons = dict.fromkeys(("include", "exclude"), "the weights that make and read units go together")
    for name, reason in {**reasons, "scope": "units of a block are compared"}.items():
        if getattr(parts, name) is not None:
            faults.append(f"{name} means nothing for unit={unit}: {reason}")
    return faults


def _misfits_of_slices(parts: Any, pattern: Pattern) -> list[str]:
    """What makes no sense where the residual stream gets narrower."""
    faults = []
    if isinstance(pattern, NofM):
        faults.append(f"sparsity={parts.sparsity} means nothing for unit=hidden: give the share that goes (20%)")
    if parts.allocation.surveys:
        name = registry.name_of("allocation", parts.allocation)
        faults.append(f"allocation={name} means nothing for unit=hidden: the stream is as wide everywhere")
    if parts.recover.acts:
        faults.append("recover does not follow unit=hidden: its blocks compute in another basis")
    for name in ("keep", "scope", "include", "exclude"):
        if getattr(parts, name) is not None:
            faults.append(f"{name} means nothing for unit=hidden: give the share that goes")
    if parts.pack:
        faults.append("pack keeps zeros small: unit=hidden makes none")
    if parts.export:
        faults.append("export=gguf: GGUF has no form for a residual stream that changes its basis (unit=hidden)")
    return faults


def _misfits_of_ranks(parts: Any, pattern: Pattern) -> list[str]:
    """What makes no sense where weights become products."""
    faults = []
    if isinstance(pattern, NofM) or not 0 < pattern.p < 1:  # type: ignore[attr-defined]
        faults.append(f"sparsity={parts.sparsity} means nothing for unit=rank: give the share that goes (20%)")
    if parts.keep is not None:
        faults.append("keep means nothing for unit=rank: give the share that goes")
    if parts.allocation.units_only or parts.allocation.of_states:
        name = registry.name_of("allocation", parts.allocation)
        faults.append(f"allocation={name} ranks units, not products: use sensitivity, uniform, owl, alpha, dlp or atp")
    if parts.scope is not None:
        faults.append("scope means nothing for unit=rank: every weight becomes a product of its own")
    if parts.recover.acts:
        faults.append("recover trains single weights: a product would not stay one")
    if parts.pack:
        faults.append("pack keeps zeros small: unit=rank makes none")
    return faults


def _globs(value: Any) -> tuple[Any, ...]:
    """One glob or a list of them."""
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def unfit(group: str, options: Any) -> list[str]:
    """Values that no option has, whatever it means, one line each; of a dataclass, and of those inside it."""
    faults = []
    for each in fields(options):
        value, name = getattr(options, each.name), f"{group}.{each.name}".lstrip(".")
        if is_dataclass(value):
            faults += unfit(name, value)
        elif isinstance(value, list) and each.type != "Any":
            odd = [item for item in value if not isinstance(item, str)]
            faults += [f"{name}={value}: every item must be text"] if odd else []
        elif problem := _problem(value):
            faults.append(f"{name}={value}: {problem}")
    return faults


def _problem(value: object) -> str | None:
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "must fit in 64 bits"
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if isinstance(value, str) and re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", value):
        return "must be one line of text, without control characters"
    if isinstance(value, str) and value.startswith("~"):
        try:
            Path(value).expanduser()
        except RuntimeError:
            return "there is no user of this name"
    return None


def _unchosen(config: DictConfig) -> list[str]:
    """Groups that a file set to something that is none of their choices."""
    return [
        f"{group}={config[group]}: must be one of {', '.join(registry.choices(group))}"
        for group in registry.PACKAGES
        if OmegaConf.is_missing(config, group)
        or OmegaConf.get_type(config, group) not in registry.choices(group).values()
    ]


def _unknown_options(config: DictConfig) -> list[str]:
    """Options that were added with + but that nothing reads."""
    faults = [f"{key!s}: there is no such option" for key in config if key not in Schema.__dataclass_fields__]
    for group in ("model", *SETTINGS, *registry.PACKAGES):
        fields = getattr(OmegaConf.get_type(config[group]), "__dataclass_fields__", {})
        faults += [f"{group}.{key!s}: there is no such option" for key in config[group] if key not in fields]
    return faults


#: Hydra's own plugins -> the extra of this package that brings them.
_PLUGINS = {
    ("hydra/launcher", "joblib"): "sweeps-joblib",
    ("hydra/launcher", "submitit_local"): "sweeps-slurm",
    ("hydra/launcher", "submitit_slurm"): "sweeps-slurm",
    ("hydra/launcher", "ray"): "sweeps-ray",
    ("hydra/sweeper", "optuna"): "search",
}


def explain(fault: Exception) -> AceError:
    """What made a composition fail, of Hydra, OmegaConf or the YAML parser, as one line with what to do."""
    text, cause = str(fault), _root(fault)
    if choice := hydra_api.choice_not_found(text):
        group, name = choice
        if extra := _PLUGINS.get((group, name)):
            return AceError(f"{group}={name} is not installed", f'pip install "ace-prune[{extra}]"')
        return AceError(f"{group}={name}: there is no such {group}.", did_you_mean(name, offered(group)))
    if key := hydra_api.key_not_in_class(str(cause)):
        return _unknown_key(*key)
    if option := hydra_api.key_not_overridden(text):
        reason = hydra_api.words(cause)
        if cause is fault or hydra_api.key_not_overridden(reason):
            return AceError(f"{option}: there is no such option.", _known_keys(option))
        return AceError(f"{option}: {reason}.", "See ace-prune --help.")
    if merged := hydra_api.merged_into_class(text):
        return _not_a_group(*merged)
    if isinstance(fault, OverrideParseException):
        return AceError(f"{fault.override} is no override that Hydra can read", "Quote its value: name='\"...\"'.")
    if isinstance(cause, UnicodeDecodeError):
        return AceError(f"A YAML file is not UTF-8: {cause}", "Save it as UTF-8; `file *.yaml` tells which one it is.")
    if isinstance(cause, RecursionError):
        return AceError("The configuration leads back into itself, or is nested too deep", "See ace-prune --help.")
    where = hydra_api.full_key(str(cause))
    return AceError(f"{where + ': ' if where else ''}{hydra_api.words(cause)}", "See ace-prune --help.")


def _root(fault: BaseException) -> BaseException:
    """The first cause; OmegaConf makes an error its own cause where it raises it twice."""
    passed = [fault]
    while (cause := passed[-1].__cause__) is not None and cause not in passed:
        passed.append(cause)
    return passed[-1]


def _unknown_key(where: str, class_name: str) -> AceError:
    """A key that no class has; as the name of a group, it is a file that landed there for want of a package."""
    if where in ("experiment", "schema", "hydra"):
        return AceError(
            f"A file of {where}/ does not say where its options belong",
            "Its very first line must be: # @package _global_ (with no byte order mark before it).",
        )
    return AceError(f"{where}: there is no such option.", _known_keys(where, class_name))


def _not_a_group(file: str, class_name: str, value: str) -> AceError:
    """``metric: wanda`` in a file, which is a choice on the command line and in a defaults list alone."""
    groups = [group for group in registry.PACKAGES for cls in registry.choices(group).values() if
              cls.__name__ == class_name]  # fmt: skip
    if not groups:
        return AceError(f"{file}.yaml: {value} where options are expected", "See ace-prune --cfg job.")
    line = f"defaults: [{{override /{groups[0]}: {value}}}]"
    return AceError(
        f"{file}.yaml: '{groups[0]}: {value}' gives no option, it names a choice",
        f"Write it as {line}, or give {groups[0]}={value} on the command line.",
    )


CONFIGURATION_ERRORS = (HydraException, OmegaConfBaseException)
# Of the folder that Hydra makes for a sweep; here, as a launcher's process that composes nothing reads its name, too.
OmegaConf.register_new_resolver("home", os.path.expanduser, replace=True)


def offered(group: str) -> list[str]:
    """The names that ``group=`` takes: registered choices and our own files."""
    names = set(registry.choices(group)) if group in registry.PACKAGES else set()
    return sorted(names | {file.stem for file in (config_folder() / group).glob("*.yaml")})


def _known_keys(where: str, class_name: str = "") -> str:
    """The options beside the unknown option ``where``, which was looked for in a class of this name."""
    group, _, name = where.partition(".")
    if group not in ("model", *SETTINGS, *registry.PACKAGES) or not name:
        return did_you_mean(name or group, Schema.__dataclass_fields__)
    single = {"model": ModelConfig, **SETTINGS}
    classes: list[Any] = [single[group]] if group in single else [*registry.choices(group).values()]
    known = {key for cls in classes if cls.__name__ == class_name for key in cls.__dataclass_fields__}
    return did_you_mean(name, known) if known else f"This {group} has no options."
