"""tokenizer.json -> what a GGUF file says of a tokenizer.

Two kinds have a form there: byte-level BPE ("gpt2"), whose way of splitting text must have a name in llama.cpp, and
SentencePiece's BPE with bytes for what it does not know ("llama"), whose merges are told as scores of tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ace_cli.core.json_reader import read_object
from ace_cli.export.gguf_families import NoForm

if TYPE_CHECKING:
    from gguf import GGUFWriter

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: How text is split before merging -> llama.cpp's name for it.
_SPLITS = {
    ("regex of gpt2",): "gpt-2",
    ("single digits", "regex of gpt2"): "smollm",
    (_CONTRACTIONS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_CONTRACTIONS + r"\p{N}" + _REST,): "qwen2",
}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # gguf.TokenType


@dataclass
class Vocabulary:
    """``model`` and ``pre`` are llama.cpp's names; ``special`` maps bos, eos, ... to a token's number."""

    model: str
    pre: str = ""
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    space_prefix: bool = False

    def add_to(self, writer: GGUFWriter, folder: Path) -> None:
        """Say all of it in the file; special tokens and chat template are read from ``folder`` by gguf itself."""
        from gguf import SpecialVocab

        writer.add_tokenizer_model(self.model)
        if self.model == "none":
            return
        writer.add_tokenizer_pre(self.pre or "default")
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.space_prefix)
        if self.merges:
            writer.add_token_merges(self.merges)
        SpecialVocab(folder, load_merges=False, n_vocab=len(self.tokens)).add_to_gguf(writer, quiet=True)


def vocabulary_of(folder: Path, rows: int) -> Vocabulary:
    """The tokenizer of ``folder`` for an embedding of ``rows`` rows; "none" where there is none. Raises NoForm."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        if others := [each.name for each in folder.glob("tokenizer*") if each.name != "tokenizer_config.json"]:
            raise NoForm(f"a tokenizer without tokenizer.json ({', '.join(others)})")
        return Vocabulary("none")
    told = read_object(file)
    model = told["model"]
    if model.get("type") != "BPE":
        raise NoForm(f"a tokenizer of the type {model.get('type')}")
    tokens, types = _tokens(told, rows)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        scores = _scores(tokens, [merge.split(" ") for merge in merges])
        return Vocabulary("llama", "", tokens, types, scores, space_prefix=_prefixes(told))
    return Vocabulary("gpt2", _split_of(told.get("pre_tokenizer")), tokens, types, merges=merges)


def _tokens(told: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Every token in order, and its type. What the tokenizer leaves of the embedding is filled up."""
    tokens, types = [f"[PAD{number}]" for number in range(rows)], [_UNUSED] * rows
    model, added = told["model"], told.get("added_tokens", [])
    known = {number: token for token, number in model["vocab"].items()} | {
        each["id"]: each["content"] for each in added
    }
    if known and max(known) >= rows:
        raise NoForm(f"{max(known) + 1} tokens for {rows} embeddings")
    for number, token in known.items():
        is_byte = model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
        tokens[number], types[number] = token, _BYTE if is_byte else _NORMAL
    for each in added:
        types[each["id"]] = _CONTROL if each.get("special") else _USER_DEFINED
    if (unknown := model.get("unk_token")) in model["vocab"]:
        types[model["vocab"][unknown]] = _UNKNOWN
    return tokens, types


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """llama.cpp joins the pair first whose token has the highest score: of an earlier merge a higher one."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _prefixes(told: dict[str, Any]) -> bool:
    """Whether a space is put before the text."""
    text = json.dumps([told.get("normalizer"), told.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "always"' in text or '"prepend_scheme": "first"' in text


def _split_of(pre_tokenizer: dict[str, Any] | None) -> str:
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    found = []
    for step in steps:
        kind = (step or {}).get("type")
        if kind == "Split":
            found.append(step["pattern"].get("Regex", "?"))
        elif kind == "Digits" and step.get("individual_digits"):
            found.append("single digits")
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            found += ["regex of gpt2"] if step.get("use_regex", True) else []
        else:
            found.append(f"{kind}")
    if tuple(found) not in _SPLITS:
        raise NoForm(f"a tokenizer that splits text by {' and '.join(found) or 'nothing'}")
    return _SPLITS[tuple(found)]
