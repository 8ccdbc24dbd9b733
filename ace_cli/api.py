"""The same from Python: ``from ace_cli import prune, evaluate, load_report``.

    result = prune("smollm2", metric="ace", sparsity="2:4", calib={"seq_len": 16})
    print(result.perplexity.pruned, result.checkpoint)
    model = result.model()

Keywords and their values are the command line's (``ace-prune --help``); options of a choice stand in a dictionary, the
choice itself under "name": ``calib={"name": "text", "path": "pages.jsonl"}``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ace_cli.report.facts import Comparison, Perplexity, Report
    from ace_cli.report.terminal import Terminal

__all__ = ["Result", "evaluate", "load_report", "prune"]


@dataclass(frozen=True)
class Result:
    """What a run made: ``report`` has every number, ``checkpoint`` is the folder of the pruned model."""

    report: Report

    @property
    def checkpoint(self) -> Path:
        """A plain Hugging Face folder."""
        return Path(self.report.checkpoint)

    @property
    def perplexity(self) -> Perplexity:
        """Dense and pruned, under one protocol; None where nothing was measured."""
        return self.report.perplexity

    def model(self, **options: Any) -> Any:
        """The pruned model, loaded by transformers; ``options`` go to its ``from_pretrained``.

        One whose layers differ in width is loaded, too, without code from the folder.
        """
        from transformers import AutoConfig

        from ace_cli.model.loading import class_that_loads

        config = AutoConfig.from_pretrained(self.checkpoint, trust_remote_code=False)
        return class_that_loads(config).from_pretrained(self.checkpoint, trust_remote_code=False, **options)


def prune(
    model: Any, tokenizer: Any = None, *, output_dir: str | PathLike[str] | None = None, quiet: bool = False,
    **choices: Any,
) -> Result:  # fmt: skip
    """Prune ``model`` as ``ace-prune`` would, and measure it.

    ``model``: the name of a card, a folder, a hub id or a .gguf file; or a transformers model in memory, then with its
    ``tokenizer``: it is saved into a folder beside the result first, and is not changed. ``quiet`` prints nothing.
    Raises AceError for what the command line would mend: one sentence what is wrong and what to do.
    """
    from ace_cli.core.errors import AceError
    from ace_cli.evaluation.dense import DenseCache
    from ace_cli.run.pipeline import run

    folder = None if output_dir is None else Path(output_dir).expanduser().absolute()
    with _on_disk(model, tokenizer, folder) as source:
        overrides = [*_model_override(source), *_overrides(choices)]
        config = _parsed(overrides, folder)
        report = run(config, _command(overrides, folder), _terminal(quiet), DenseCache())
    if report is None:
        raise AceError("dry_run=true makes no result", "Leave it out, or use the command line.")
    return Result(report)


def evaluate(
    *models: str | PathLike[str], tasks: list[str] | None = None, text: str | PathLike[str] | None = None,
    limit: int | None = None, seq_len: int = 2048, max_windows: int | None = None, quiet: bool = False,
) -> Comparison:  # fmt: skip
    """Checkpoints side by side, as ``ace-eval``: perplexity on ``text`` (a file, "c4", ...), zero-shot tasks.

    Raises AceError for what is wrong with the arguments or the folders.
    """
    import contextlib
    import io

    from ace_cli.cli.evaluate import measure

    arguments = [fspath(model) for model in models]
    arguments += ["--tasks", ",".join(tasks) if tasks else "none", "--seq-len", str(seq_len)]
    arguments += ["--text", fspath(text)] if text is not None else []
    arguments += ["--limit", str(limit)] if limit is not None else []
    arguments += ["--max-windows", str(max_windows)] if max_windows is not None else []
    with contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext():
        return measure(arguments)


def load_report(folder: str | PathLike[str]) -> Report:
    """The report of a finished run: of its folder, or of its report.json. Raises AceError where there is none."""
    from ace_cli.core.errors import AceError
    from ace_cli.report.facts import load

    file = Path(folder).expanduser()
    file = file / "report.json" if file.is_dir() else file
    if not file.is_file():
        raise AceError(f"{file} is no report of a finished run.", "Name the folder of a run.")
    return load(file)


# --- from Python to the command line's words -------------------------------------------------------------------------


def _model_override(source: str) -> list[str]:
    from ace_cli.cli.arguments import for_hydra

    return for_hydra([f"model={source}"])


def _overrides(choices: Mapping[str, Any]) -> list[str]:
    """Keywords as overrides: a dictionary's "name" is the choice, the rest are its options."""
    found = []
    for group, value in choices.items():
        if isinstance(value, Mapping):
            found += [f"{group}={value['name']}"] if "name" in value else []
            found += [f"{group}.{name}={_word(each)}" for name, each in value.items() if name != "name"]
        else:
            found.append(f"{group}={_word(value)}")
    return found


def _word(value: Any) -> str:
    """A value in Hydra's grammar: strings quoted, so that no letter in them has a meaning."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_word, value))}]"
    if isinstance(value, (int, float)):
        return str(value)
    text = fspath(value) if isinstance(value, PathLike) else str(value)
    plain = text.replace("_", "").isalnum() and not text.isdigit()
    return text if plain else "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _parsed(overrides: list[str], folder: Path | None) -> Any:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from ace_cli.run.config import CONFIGURATION_ERRORS, config_folder, explain, parse, store_schemas

    store_schemas()
    GlobalHydra.instance().clear()
    given = [f"output_dir={_word(folder)}"] if folder is not None else []
    try:
        with initialize_config_dir(str(config_folder().absolute()), version_base="1.3"):
            config = compose("prune", [*overrides, *given])
        return parse(config, Path(config.output_dir).absolute(), folder is not None)
    except CONFIGURATION_ERRORS as fault:
        raise explain(fault) from fault
    finally:
        GlobalHydra.instance().clear()


def _command(overrides: list[str], folder: Path | None) -> str:
    import shlex

    from ace_cli.cli.arguments import as_typed

    given = [f"output_dir={folder}"] if folder is not None else []
    return shlex.join(["ace-prune", *map(as_typed, overrides), *given])


def _terminal(quiet: bool) -> Terminal:
    from ace_cli.report.terminal import Terminal

    return Terminal(quiet=quiet)


class _on_disk:  # noqa: N801 (used like a function)
    """The source as a name: what is in memory is saved for as long as the run reads it."""

    def __init__(self, model: Any, tokenizer: Any, folder: Path | None) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._parent = folder.parent if folder is not None else Path("outputs").absolute()
        self._kept: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> str:
        if isinstance(self._model, (str, PathLike)):
            return fspath(self._model)
        self._parent.mkdir(parents=True, exist_ok=True)
        self._kept = tempfile.TemporaryDirectory(prefix=".in-memory-", dir=self._parent)
        self._model.save_pretrained(self._kept.name)
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(self._kept.name)
        return self._kept.name

    def __exit__(self, *_: object) -> None:
        if self._kept is not None:
            self._kept.cleanup()
