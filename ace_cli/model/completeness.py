"""Whether the files hold the weights that the model needs; where not, why, in the order in which it helps to know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ace_cli.core.errors import AceError
from ace_cli.model.files import Checkpoint
from ace_cli.model.header import FLOATS
from ace_cli.model.mapping import Mapping

_AGAIN = "Fetch the files again."


def check_complete(
    checkpoint: Checkpoint, skeleton: Any, mapping: Mapping, missing: Sequence[str], blocks: Sequence[str]
) -> None:
    """Raises AceError if a parameter of ``skeleton`` has no tensor, or one of another shape or kind.

    ``missing``: parameters without a tensor; ``blocks``: the names of the decoder blocks.
    """
    state: dict[str, Tensor] = skeleton.state_dict()
    if missing:
        raise _without(checkpoint, skeleton, mapping, missing, blocks)
    for name, tensor in state.items():
        for key in mapping.keys(name):
            kind = checkpoint.tensors[key].dtype
            if tensor.is_floating_point() and kind not in FLOATS:
                raise AceError(
                    f"{checkpoint.folder}: {key} is stored as {kind}, which holds no weights to be pruned.",
                    "Give a 16- or 32-bit checkpoint.",
                )
    if misfits := mapping.misfits(state):
        raise AceError(f"{checkpoint.folder}: {misfits[0]}{_and_more(misfits)}.", _AGAIN)


def _without(
    checkpoint: Checkpoint, skeleton: Any, mapping: Mapping, missing: Sequence[str], blocks: Sequence[str]
) -> AceError:
    folder, kind = checkpoint.folder, type(skeleton).__name__
    if prefix := _common_prefix(missing, mapping.unused, skeleton.base_model_prefix):
        return AceError(
            f"{folder}: the names of its tensors begin with '{prefix}', as a model in a wrapper saves them.",
            "Take the wrapper off and save the model again, or rename the tensors.",
        )
    head = skeleton.get_output_embeddings()
    heads = {name for name in missing for path, module in skeleton.named_modules() if module is head
             and name.startswith(f"{path}.")}  # fmt: skip
    if heads == set(missing):
        made_as = checkpoint.config().get("architectures")
        made_as = f" ({', '.join(map(str, made_as))})" if isinstance(made_as, list) else ""
        return AceError(
            f"{folder}{made_as} has no {missing[0]}: a base or reward model, which predicts no words.",
            f"Give the folder of the language model it was made from ({kind}).",
        )
    empty = [block for block in blocks if all(name not in mapping for name in _inside(block, skeleton))]
    if empty and all(name.startswith(tuple(f"{block}." for block in empty)) for name in missing):
        return AceError(
            f"{folder}: config.json asks for {len(blocks)} blocks, the files hold {len(blocks) - len(empty)} "
            f"(no weight for {missing[0]}).",
            "Mend config.json, or fetch the files again.",
        )
    return AceError(f"{folder}: no weight for {missing[0]}{_and_more(missing)}.", _AGAIN)


def _common_prefix(missing: Sequence[str], unused: Sequence[str], base: str) -> str:
    """What stands before the names of most missing parameters in the files; empty if nothing does."""
    wanted = {*missing, *(name.removeprefix(f"{base}.") for name in missing)}
    found: Counter[str] = Counter()
    for key in unused:
        parts = key.split(".")
        ends = (".".join(parts[start:]) for start in range(1, len(parts)))
        found.update([key.removesuffix(end) for end in ends if end in wanted][:1])
    prefix, count = max(found.items(), key=lambda item: item[1], default=("", 0))
    return prefix if 2 * count > len(missing) else ""


def _inside(block: str, skeleton: Any) -> list[str]:
    return [f"{block}.{name}" for name in skeleton.get_submodule(block).state_dict()]


def _and_more(faults: Sequence[str]) -> str:
    return f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
