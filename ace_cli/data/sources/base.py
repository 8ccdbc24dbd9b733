"""What a source of text is, and how calibration and evaluation offer it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

from ace_cli.core.registry import choices, register
from ace_cli.core.steps import NOBODY, Steps
from ace_cli.data.documents import consecutive_windows, load_tokenizer, random_windows, text_start

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.model.files import Checkpoint


@dataclass
class TextSource:
    """Where windows of tokens come from. Its fields become options of ``calib`` and of ``eval``, beside their own."""

    #: Group -> option of the windows -> what is usual with this source, where that differs from the group's default.
    defaults: ClassVar[Mapping[str, Mapping[str, int]]] = {}
    #: Whether there is no end of it: evaluation must say how many windows it wants.
    endless: ClassVar[bool] = False

    @property
    def dataset(self) -> str:
        """Data set and split of what is evaluated, as the report names them."""
        raise NotImplementedError

    def faults(self, group: str) -> list[str]:
        """What is wrong with the fields, one line each, as options of ``group``; empty when all is well."""
        return []

    def draw(
        self, checkpoint: Checkpoint, count: int, length: int, seed: int, device: str, steps: Steps = NOBODY,
        further: int = 0,
    ) -> Tensor:  # fmt: skip
        """Windows to calibrate on, int64 (count, length), on the CPU. Raises AceError when there are not so many.

        ``steps`` hears how far it is. ``further``: so many more that follow; the first ones are the same without.
        """
        raise NotImplementedError

    def begin(self, ids_NL: Tensor, checkpoint: Checkpoint) -> Tensor:
        """``ids_NL`` with each first token made the one that begins texts, where texts begin with one."""
        raise NotImplementedError

    def cut(self, checkpoint: Checkpoint, length: int, most: int | None, device: str, steps: Steps = NOBODY) -> Tensor:
        """Windows to evaluate on, int64 (n, length), on the CPU; more than ``most`` of them do no harm."""
        raise NotImplementedError


@dataclass
class DocumentSource(TextSource):
    """A source that has documents: calibration draws windows from them, evaluation cuts one text into windows."""

    def documents(self) -> list[str]:
        """What calibration draws from. Raises AceError when it cannot be read."""
        raise NotImplementedError

    def text(self) -> str:
        """What evaluation measures. Raises AceError when it cannot be read."""
        raise NotImplementedError

    def draw(
        self, checkpoint: Checkpoint, count: int, length: int, seed: int, device: str, steps: Steps = NOBODY,
        further: int = 0,
    ) -> Tensor:  # fmt: skip
        return random_windows(self.documents(), load_tokenizer(checkpoint), count + further, length, seed, steps)

    def begin(self, ids_NL: Tensor, checkpoint: Checkpoint) -> Tensor:
        if (start := text_start(checkpoint)) is not None:
            ids_NL[:, 0] = start
        return ids_NL

    def cut(self, checkpoint: Checkpoint, length: int, most: int | None, device: str, steps: Steps = NOBODY) -> Tensor:
        return consecutive_windows(self.text(), load_tokenizer(checkpoint), length)


class FromSource:
    """What a choice of ``calib`` or ``eval`` is beside its own: it holds the fields of a text source."""

    source_class: ClassVar[type[TextSource]]

    @property
    def source(self) -> TextSource:
        """The source, made of the fields."""
        return self.source_class(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self.source_class)})


def offer(group: str, windows: type[FromSource]) -> None:
    """Offer every source as ``group=NAME``: a dataclass of the fields of ``windows``, then those of the source."""
    sources: dict[str, Any] = choices("source")
    for name, source in sources.items():
        types = get_type_hints(windows) | get_type_hints(source)
        own = {field.name for field in dataclasses.fields(windows)}  # type: ignore[arg-type]  # it is a dataclass
        fields = [(option, types[option], value) for option, value in source.defaults.get(group, {}).items()]
        fields += [(f.name, types[f.name], f.default) for f in dataclasses.fields(source) if f.name not in own]
        inside = {"source_class": source, "__doc__": source.__doc__, "__module__": windows.__module__}
        made = dataclasses.make_dataclass(
            source.__name__ + windows.__name__, fields, bases=(windows,), namespace=inside
        )
        setattr(sys.modules[made.__module__], made.__name__, made)  # found there by processes that are sent one
        register(group, name)(made)
