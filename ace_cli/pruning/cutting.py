"""What a run asks of units that are cut out: how many stay, what happens to a block, what the files become.

The order of this room: `Cutting` is asked; `width_cutting` keeps so many units of each kind and says what the tensors
become; `unit_cutting` does that with channels and heads, `expert_cutting` with experts; `depth` takes whole blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar

from ace_cli.methods.units import Units
from ace_cli.model.blocks import Block
from ace_cli.model.calls import Batch
from ace_cli.model.cuts import Coupling
from ace_cli.model.files import Checkpoint
from ace_cli.model.header import TensorEntry
from ace_cli.model.proven_config import Place
from ace_cli.model.streamed import StreamedModel
from ace_cli.pruning.facts import BlockFacts

if TYPE_CHECKING:
    from ace_cli.methods.metrics.base import Metric
    from ace_cli.methods.statistics import Seen
    from ace_cli.pruning.orders import Order
    from ace_cli.pruning.slot_pruner import SlotPruner
    from ace_cli.pruning.units.base import Unit


@dataclass
class Cutting:
    """The units of ``model`` of the kind ``unit``; ``couplings`` of each block. ``name``: the unit's, as asked for.

    ``stay``: coupling's name -> how many of each region's units stay; all, until an allocation said otherwise.

    Raises AceError, when it is made, if there are no such units.
    """

    model: StreamedModel
    unit: Unit
    name: str
    couplings: tuple[tuple[Coupling, ...], ...] = field(init=False)
    stay: dict[str, int] = field(init=False)

    #: How the slots of a block are observed and pruned; None where that is as for single weights.
    order: ClassVar[type[Order] | None] = None
    #: Whether slots are repaired one by one: what that costs is planned from their shapes.
    by_slots = True
    #: Whether ``repair`` refits weights, and so holds what it holds.
    repairs = True
    #: How many further blocks are loaded while one is worked on.
    beside = 0
    #: How often the dense model is run before anything is cut, for the unit itself.
    looks = 0
    #: Why ``changes`` found none, where more is known than that.
    why_not = ""

    # --- before work begins ----------------------------------------------------------------------------------------

    def ask(self, share: Fraction, keep: int | None) -> None:
        """Every block keeps the same number: all but a share of its units, or ``keep``. AceError if that cannot be."""
        raise NotImplementedError

    def words(self) -> str:
        """What is cut: "1216 of 1536 channels stay in 30 blocks"."""
        raise NotImplementedError

    def described(self, on_average: bool) -> str:
        """The same, and whether of each block or ``on_average``."""
        return f"{self.words()}, {'on average' if on_average else 'each'}"

    @property
    def speeds(self) -> bool:
        """Whether a token is computed with so many weights fewer as the files have."""
        return not any(block.experts for block in self.model.blocks)

    @property
    def planned(self) -> StreamedModel:
        """The model whose slots say what a run computes."""
        return self.watched

    # --- while blocks are pruned -----------------------------------------------------------------------------------

    @property
    def pruner(self) -> type[SlotPruner]:
        """What happens to a block."""
        raise NotImplementedError

    @property
    def watched(self) -> StreamedModel:
        """The model whose only slots are what is observed, scored and repaired."""
        raise NotImplementedError

    def choose(self, batches: list[Batch], metric: Metric, on_block: Callable[[int], None]) -> list[int]:
        """Where ``looks`` are needed: find what goes, which is returned, from the states of the dense model."""
        raise NotImplementedError

    def units(self, block: str, each: Coupling, gradients: Mapping[str, Seen]) -> Units:
        """The units of ``each`` as methods see them; ``block``, by name, is loaded when they ask for rows.

        ``gradients``: slot's name -> what was seen of its gradients.
        """
        raise NotImplementedError

    def runs(self, index: int) -> bool:
        """Whether block ``index`` is part of the smaller model."""
        return True

    def taught(self, index: int, of_model: bool) -> list[int] | None:
        """The blocks whose work block ``index`` learns beside its own; None where it has nothing to learn.

        ``of_model``: from the dense model's states, in which errors made before show.
        """
        return []

    def replay(self, batches: list[Batch], blocks: list[BlockFacts], written: Checkpoint, dense: bool) -> None:
        """Bring ``batches`` to where they were after the finished ``blocks``, which are read from ``written``.

        ``dense``: what came after saw the dense model.
        """
        raise NotImplementedError

    # --- what is written -------------------------------------------------------------------------------------------

    @property
    def uneven(self) -> bool:
        """Whether blocks of equal width keep different numbers of units."""
        return False

    def entries(self) -> dict[str, TensorEntry]:
        """The tensors of the new files."""
        raise NotImplementedError

    def resized(self) -> set[str]:
        """Those of them that another number of units gives another shape."""
        return set()

    def changes(self) -> dict[Place, Any] | None:
        """The change of config.json that says it, proven; None if there is none."""
        raise NotImplementedError

    def manifest(self, blocks: Iterable[BlockFacts], entries: Mapping[str, TensorEntry]) -> list[dict[str, Any]]:
        """What pruning.json tells of every cut: the units kept, and the tensors as they were written."""
        raise NotImplementedError


def kind_of(block: Block) -> Any:
    """Blocks of one kind have the same code and shapes."""
    return type(block.module), tuple((name, value.shape) for name, value in block.module.state_dict().items())
