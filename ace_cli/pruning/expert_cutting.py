"""Experts that go: where they lie, which score least, and a model without them that the states go on through.

Zeros would not do here: a router whose rows are zero still chooses among them. So what comes after a block is computed
by the narrow model that the new configuration builds, its tensors sliced from the source.

Shapes: E experts, K of them that stay, R groups, H hidden size, T tokens, n those routed to an expert.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
from torch import Tensor

from ace_cli.core.errors import AceError
from ace_cli.methods.units import Units
from ace_cli.model.alike import differs
from ace_cli.model.blocks import Block
from ace_cli.model.calls import Batch
from ace_cli.model.cuts import Axis, Coupling, Numbered, Sliced
from ace_cli.model.experts import ExpertCall, Experts
from ace_cli.model.files import Checkpoint, hash_of_tensor
from ace_cli.model.header import TensorEntry
from ace_cli.model.slots import Slot, routers
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.cutting import kind_of
from ace_cli.pruning.facts import BlockFacts, SlotFacts
from ace_cli.pruning.observer import reached
from ace_cli.pruning.orders import Order
from ace_cli.pruning.recipe import Propagate
from ace_cli.pruning.slot_pruner import SlotPruner
from ace_cli.pruning.width_cutting import WidthCutting


@dataclass
class ExpertCutting(WidthCutting):
    """Experts of ``model``. ``chosen``: router's name -> which stay, bool (E,); the first, until they are scored."""

    by_slots = False
    repairs = False
    beside = 1  # the narrow block, through which states move on
    chosen: dict[str, Tensor] = field(init=False, default_factory=dict)
    narrow: StreamedModel | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        model = self.model
        config = model.skeleton.config.get_text_config()
        self._groups = getattr(config, "n_group", None) or 1
        self._group_choices = getattr(config, "topk_group", None) or self._groups
        self._routed = getattr(config, "num_experts_per_tok", None) or 1
        found = [_coupling(block, self._groups) for block in model.blocks]
        self.couplings = tuple(() if each is None else (each,) for each in found)
        self._take_all()

    @property
    def order(self) -> type[Order]:  # type: ignore[override]
        """Experts are scored while the block runs."""
        return Route

    @property
    def pruner(self) -> type[SlotPruner]:
        return ExpertPruner

    @property
    def planned(self) -> StreamedModel:
        return self.model

    @property
    def watched(self) -> StreamedModel:
        """The model whose only slots are the routers of the layers whose experts are cut."""
        other = self.model.watching(())
        other.blocks = [
            replace(block, slots=[_router(whole, each.name) for each in couplings], left={}, experts=whole.experts)
            for block, whole, couplings in zip(other.blocks, self.model.blocks, self.couplings, strict=True)
        ]
        return other

    def ask(self, share: Fraction, keep: int | None) -> None:
        if keep is not None and keep % self._groups:
            raise AceError(
                f"keep={keep}: the router chooses from {self._groups} groups, which keep equally many.",
                f"Use a multiple of {self._groups}.",
            )
        super().ask(share, None if keep is None else keep // self._groups)
        least = min(self.stay.values())
        free = self._group_choices * least
        if free < self._routed:
            raise AceError(
                f"{least * self._groups} experts stay, of which a token may choose among {free}: it is sent to "
                f"{self._routed}.",
                "Keep more experts.",
            )
        if self._groups > 1 and least < 2:
            raise AceError("One expert of a group stays, the router ranks groups by their best two.", "Keep more.")
        self.chosen = self.first_units

    @property
    def sizes(self) -> dict[int, int]:
        return {each.regions * each.width: each.regions * self.stay[each.name] for b in self.couplings for each in b}

    def computes(self, sliced: Checkpoint) -> bool:
        """Whether every block is the old one in all its settings but the number of experts, and runs."""
        assert isinstance(sliced, Sliced)
        sliced.kept = self.chosen
        narrow = StreamedModel(sliced, self.model.device, self.model.dtype)
        counts = {**self.sizes, **{each.width: self.stay[each.name] for b in self.couplings for each in b}}
        for old, new in zip(self.model.blocks, narrow.blocks, strict=True):
            if differs(old.module, new.module, counts):
                return False
        (batch,) = narrow.batches((torch.arange(8) % self.model.vocabulary).view(1, 8))
        kinds = {kind_of(block): index for index, block in reversed(list(enumerate(narrow.blocks)))}
        with torch.no_grad():
            for index in kinds.values():
                with narrow.loaded(narrow.blocks[index]):
                    if not bool(narrow.forward(index, batch).isfinite().all()):
                        return False
        self.narrow = narrow
        return True

    def replay(self, batches: list[Batch], blocks: list[BlockFacts], written: Checkpoint, dense: bool) -> None:
        """From the source, sliced as the finished blocks say: the bytes that were written."""
        self.chosen |= self.kept_units(blocks)
        model = self.model if dense else self.narrow
        assert model is not None
        with torch.no_grad():
            for index in model.one_by_one(len(blocks)):
                model.advance(index, batches)

    def moved(self, block: Block) -> dict[str, str]:
        """The block's tensors whose names change, or that are gone."""
        cut = self.cut()
        return {key: new for key in block.files if (new := cut.moved(key, self.chosen)) != key}

    def _fewer(self, each: Coupling, entries: Mapping[str, TensorEntry]) -> int:
        """Of the router and of everything that the experts have for themselves."""
        source = self.model.checkpoint.tensors
        keys = {axis.key for axis in each.axes}
        keys |= {key for key in source if each.numbered is not None and each.numbered.number(key) is not None}
        return sum(source[key].numel - (entries[key].numel if key in entries else 0) for key in keys)


def _router(block: Block, key: str) -> Slot:
    """The router as a slot, by its name in the files."""
    (name,) = (name for name, parts in block.parts.items() if [part.key for part in parts] == [key])
    return Slot(key, key, block.module.get_submodule(name.rpartition(".")[0]))


def _coupling(block: Block, groups: int) -> Coupling | None:
    """Where the experts of a block lie in the files; None if it has none. AceError where that cannot be told."""
    if not block.experts:
        return None
    (experts, *more), state = block.experts, block.module.state_dict()
    count = experts.count
    hint = "Choose another unit."
    if more or count % groups:
        raise AceError(f"{block.name}: its experts are not one layer of groups of equal size.", hint)
    holder = next(name for name, module in block.module.named_modules() if module is experts.module)
    chosen = [
        path for path in routers(block.module) if f"{path}.weight" in state and len(state[f"{path}.weight"]) == count
    ]
    if len(chosen) != 1:
        raise AceError(f"{block.name}: its router was not found.", hint)
    axes: list[Axis] = []
    own: dict[str, int | None] = {}
    for name, parts in block.parts.items():
        if name.rpartition(".")[0] not in (holder, *chosen) or len(state[name]) != count or not state[name].dim():
            continue
        if len(parts) == 1:
            axes.append(Axis(parts[0].key, 0, torch.arange(count)[:, None]))
        else:
            own |= {part.key: part.place.index for part in parts}
    router = block.parts[f"{chosen[0]}.weight"][0].key
    units_RWC = torch.arange(count).view(groups, -1, 1)
    return Coupling(router, units_RWC, tuple(axes), (), _numbered(block, own) if own else None)


def _numbered(block: Block, own: Mapping[str, int | None]) -> Numbered:
    """How the files number the experts: the last place where all names have their expert's number."""
    split = {key: key.split(".") for key in own}
    longest = min(map(len, split.values()))
    for place in reversed(range(1, longest)):
        if all(split[key][place] == str(number) for key, number in own.items()):
            before = {".".join(parts[:place]) + "." for parts in split.values()}
            if len(before) == 1:
                return Numbered(before.pop())
    raise AceError(f"{block.name}: the files do not number its experts.", "Choose another unit.")


class ExpertPruner(SlotPruner):
    """Chooses the experts of one loaded block."""

    def take(self, coupling: Coupling, total_E: Tensor, tokens_E: Tensor, index: int, seconds: float) -> None:
        """Choose, from what was added up of each expert."""
        start, cutting = time.perf_counter() - seconds, self.cutting
        with self._clock("score"):
            score_E = self._recipe.metric.score_experts(total_E, tokens_E, index)
        if not bool(score_E.isfinite().all()):
            raise AceError(f"The score of an expert of {self._block.name} is NaN or Inf.", "Try dtype=float32.")
        keep_E = Units(coupling.columns_RWC).best(score_E, cutting.stay[coupling.name])
        cutting.chosen[coupling.name] = keep_E
        idle, tokens = int((tokens_E == 0).sum()), int(tokens_E.sum())
        notes = [f"no token was routed to {idle} of {len(tokens_E)} experts"] if idle and tokens else []
        (slot,) = self._block.slots
        lost = float(tokens_E[~keep_E].sum()) / max(1, tokens)
        self.facts.append(
            SlotFacts(
                slot.name, slot.shape, f"{int(keep_E.sum())} of {len(keep_E)} {cutting.name}s", tokens,
                {"routed_elsewhere": lost}, notes, time.perf_counter() - start,
                kept=keep_E.nonzero().flatten().tolist(),
            )
        )  # fmt: skip

    @property
    def cutting(self) -> ExpertCutting:
        """What goes."""
        assert isinstance(self._recipe.cutting, ExpertCutting)
        return self._recipe.cutting

    def take_weights(self) -> dict[str, Tensor]:
        cutting, cut = self.cutting, self.cutting.cut()
        super().take_weights()
        self.moved = cutting.moved(self._block)
        source = self._model.checkpoint
        weights = {
            key: cut.sliced(key, source.read(key), cutting.chosen) for key in self._block.files if key in cut.keys
        }
        found = {key: hash_of_tensor(tensor) for key, tensor in weights.items()}
        found |= {new: source.digests[key] for key, new in self.moved.items() if new}
        same = cut.own_of(self._block.files) - self.moved.keys()
        found |= {key: source.digests[key] for key in same}
        self.facts = [replace(fact, digests=found) for fact in self.facts]
        return weights


class Route(Order):
    """Scores the experts of the dense block on the tokens routed to them; the narrow block moves the states on."""

    def run(self) -> None:
        pruner = self.pruner
        assert isinstance(pruner, ExpertPruner)
        cutting = pruner.cutting
        dense = self.recipe.propagate is Propagate.dense
        for coupling in cutting.couplings[self.index]:
            start = time.perf_counter()
            total_E, tokens_E = self._tally(coupling, dense)
            pruner.take(coupling, total_E, tokens_E, self.index, time.perf_counter() - start)
        if dense and not cutting.couplings[self.index]:
            self._advance()
        if self.last or dense:
            return
        with self.clock("forward"):
            assert cutting.narrow is not None
            with cutting.narrow.loaded(cutting.narrow.blocks[self.index]):
                cutting.narrow.advance(self.index, self.batches)

    def _tally(self, coupling: Coupling, dense: bool) -> tuple[Tensor, Tensor]:
        """Of each expert, float64 and int64 (E,): what its tokens add up to, and how many they are."""
        metric = self.recipe.metric
        count = coupling.regions * coupling.width
        total_E, tokens_E = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.int64)

        def note(experts: Experts, call: ExpertCall) -> None:
            for expert in range(experts.count):
                if routed := experts.tokens([call], expert):
                    tokens_E[expert] += routed
                    if metric.reads_outputs:
                        total_E[expert] += metric.of_routed(experts.gates(call, expert), experts.outputs(call, expert))

        if metric.of_states:
            with self.clock("observe"), reached(self.block.experts, note):
                for batch in self.batches:
                    out_BLH = self._forward(batch)
                    if dense and out_BLH is not None:
                        batch.hidden_BLH = out_BLH
        if metric.of_states and not int(tokens_E.sum()):
            raise AceError(f"No calibration token reached the experts of {self.block.name}.", "Use more windows.")
        return total_E, tokens_E
