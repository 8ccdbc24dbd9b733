"""Documents from the hub, through ``datasets``; and how windows are cut from documents.

Shared by calibration and evaluation.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ace_cli.core.errors import AceError, first_line
from ace_cli.core.steps import NOBODY, Steps

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.model.files import Checkpoint


def wikitext2_documents(split: str) -> list[str]:
    """The lines of WikiText-2 (raw) from the hub, joined by two line breaks for the usual perplexity."""
    return _column("wikitext2", "text", "Salesforce/wikitext", name="wikitext-2-raw-v1", split=split)


def c4_documents(split: str) -> list[str]:
    """The first shard of English C4 from the hub: the calibration set of SparseGPT and Wanda."""
    file = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
    return _column("c4", "text", "allenai/c4", data_files={split: file[split]}, split=split)


def _column(what: str, column: str, *args: str, **kwargs: Any) -> list[str]:
    """Column ``column`` of a data set of the hub."""
    import datasets

    datasets.utils.logging.disable_progress_bar()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would tell a server of every reading
    try:
        rows = datasets.load_dataset(*args, **kwargs)
    except Exception as fault:  # files, hub and network each fail with errors of their own
        hint = "The hub cannot be reached: use calib=text or calib=self (eval=text or eval=self)."
        raise AceError(f"Cannot read {what}: {first_line(fault)}.", hint) from fault
    return [text for text in rows[column] if isinstance(text, str)]


#: What the files are called that hold a tokenizer's words.
_TOKENIZERS = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "spm", "tekken")


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer. Raises AceError when the folder has none."""
    stamps = tuple(sorted((file.name, file.stat().st_mtime_ns) for file in checkpoint.folder.glob("*token*")))
    return _tokenizer(checkpoint.folder, stamps)


@functools.lru_cache(maxsize=2)  # a tokenizer that is dropped keeps some 10 MB: a sweep would grow with every job
def _tokenizer(folder: Path, stamps: tuple[tuple[str, int], ...]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as fault:  # tokenizer backends fail with errors of their own
        named = any(file.name.startswith(_TOKENIZERS) or file.suffix == ".tiktoken" for file in folder.iterdir())
        reason = f"no usable tokenizer: {first_line(fault)}" if named else "no tokenizer (tokenizer.json, say)"
        raise AceError(f"{folder} has {reason}.", "Put it there; only calib=self needs none.") from fault


def text_start(checkpoint: Checkpoint) -> int | None:
    """The token that the tokenizer puts before every text; None if it puts none."""
    tokenizer = load_tokenizer(checkpoint)
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    return int(whole[0]) if bare and whole[1 : 1 + len(bare)] == bare else None


class TooFewWindows(AceError):
    """A text has not as many windows as were asked for."""


def random_windows(
    documents: Sequence[str], tokenizer: Any, count: int, length: int, seed: int, steps: Steps = NOBODY
) -> Tensor:
    """Windows drawn as SparseGPT and Wanda draw them: int64 (count, length); a step each.

    Repeat: a document at random; skip it unless it has more than ``length`` tokens; a start at random in
    [0, tokens - length - 1]. Documents may be drawn again. Raises TooFewWindows when there are not ``count`` different
    windows to draw.
    """
    import torch

    generator = random.Random(seed)
    encoded: dict[int, list[int]] = {}
    rejected: set[int] = set()
    windows: list[list[int]] = []
    steps.of(count)
    while len(windows) < count:
        index = generator.randint(0, len(documents) - 1)
        if index in rejected:
            if len(rejected) == len(documents):
                break
            continue
        if index not in encoded:
            encoded[index] = tokenizer(documents[index])["input_ids"]
        ids = encoded[index]
        if len(ids) <= length:
            rejected.add(index)
            continue
        start = generator.randint(0, len(ids) - length - 1)
        windows.append(ids[start : start + length])
        steps()
    longest = max((len(ids) for ids in encoded.values()), default=0)
    available = sum(max(0, len(ids) - length) for ids in encoded.values())
    if len(windows) < count or (len(encoded) == len(documents) and available < count):
        raise TooFewWindows(
            f"Too few long documents: {available if windows else 0} different windows of {length} tokens, "
            f"{count} asked for; the longest of {len(documents)} documents has {longest} tokens.",
            "Give longer documents, or lower calib.seq_len or calib.n_samples.",
        )
    return torch.tensor(windows, dtype=torch.int64)


def consecutive_windows(text: str, tokenizer: Any, length: int) -> Tensor:
    """The text's tokens cut into windows without overlap, int64 (n, length); the remainder is dropped."""
    import torch

    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    count = len(ids) // length
    if not count:
        raise AceError(
            f"The evaluation text has {len(ids)} tokens, fewer than one window of {length}.",
            "Lower eval.seq_len or give more text.",
        )
    return torch.as_tensor(ids[: count * length].view(count, length))


def fingerprint(ids_NL: Tensor) -> str:
    """sha256 of token windows."""
    return hashlib.sha256(ids_NL.numpy().tobytes()).hexdigest()
