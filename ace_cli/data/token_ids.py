"""Token ids and the embedding they look up: compared before work begins, the token named."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ace_cli.core.errors import AceError

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.model.files import Checkpoint


def check_ids(ids: Tensor, rows: int, checkpoint: Checkpoint, where: str) -> None:
    """AceError if an id of ``ids`` (any shape, not empty) is none of the ``rows`` of the embedding of ``checkpoint``.

    ``where`` says what the ids are of. As happens where a token was added to the tokenizer but not to the model.
    """
    for index in (int(ids.max()), int(ids.min())):
        if not 0 <= index < rows:
            raise AceError(
                f"Token {index}{_word(index, checkpoint)} of {where} is not in the model, which knows {rows:,} tokens.",
                "Give text without it, or the tokenizer that belongs to the model.",
            )


def _word(index: int, checkpoint: Checkpoint) -> str:
    from ace_cli.data.documents import load_tokenizer

    try:
        word = load_tokenizer(checkpoint).convert_ids_to_tokens(index)
    except (AceError, IndexError, OverflowError, ValueError):
        word = None
    return f" ({word!r})" if word is not None else ""
