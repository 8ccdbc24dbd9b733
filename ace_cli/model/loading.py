"""The class of transformers that loads a folder, whatever of ours its config.json asks for, without code from it."""

from __future__ import annotations

from typing import Any

from ace_cli.model.auto import auto_class
from ace_cli.model.factored import factor, ranks_of
from ace_cli.model.sliced import add_shortcuts, shortcuts_of
from ace_cli.model.transformers_api import class_for
from ace_cli.model.uneven import resize, shapes_of


def shape(model: Any, config: Any) -> None:
    """Give a stock model, its weights not yet read, the widths, changes of basis and products that ``config`` has."""
    resize(model, shapes_of(config))
    add_shortcuts(model, shortcuts_of(config))
    factor(model, ranks_of(config))


def class_that_loads(config: Any) -> Any:
    """The stock class; where layers differ in width, change their basis or are products, a subclass that has them so.

    ``class_that_loads(config).from_pretrained(folder, config=config)``: ``config`` is the folder's own, as
    ``transformers_config`` reads it.
    """
    if not (shapes_of(config) or shortcuts_of(config) or ranks_of(config)):
        return auto_class(config)
    stock: Any = class_for(auto_class(config), config)

    class Shaped(stock):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            shape(self, config)

    return Shaped
