"""What a person types -> what Hydra's grammar reads: any path is a value, and ``model=`` may be a path, too."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString

from ace_cli.core.errors import AceError, did_you_mean
from ace_cli.core.registry import PACKAGES
from ace_cli.run import hydra_api
from ace_cli.run.config import offered

#: Options whose values are paths: quoted here, as Hydra's grammar gives a meaning to = , ( # and most other letters.
_PATHS = re.compile(r"\+{0,2}(model\.path|calib\.path|eval\.path|eval\.task_data|tracker\.folder|output_dir)")
#: What Hydra reads as a string that says just this.
_PLAIN = re.compile(r"(?!(?:true|false|null|nan|inf)\Z)[a-zA-Z_./][a-zA-Z0-9_./-]*|", re.IGNORECASE)
_SWEEP = re.compile(r"(choice|glob|range|interval|shuffle|sort|tag)\(")
_GROUPS = ("model", *PACKAGES)
#: No file system has longer names of files; a group's choice is looked for as one.
_LONGEST_NAME = 200


def for_hydra(arguments: list[str]) -> list[str]:
    """The arguments of ``ace-prune``, flags first, with every path quoted and ``model=PATH`` as ``model.path=PATH``.

    In a sweep (``--multirun``) commas separate values: a path with a comma is quoted by the person there. Raises
    AceError for what can name nothing.
    """
    many = "-m" in arguments or "--multirun" in arguments
    for argument in arguments:
        _check(argument)
    arguments = hydra_api.flags_first(arguments)
    if fault := hydra_api.unreadable_flags(arguments):
        raise AceError(fault, "See ace-prune --help.")
    arguments = _with_custom_model([_model_by_path(argument, arguments, many) for argument in arguments])
    return [_with_quoted_path(argument, many) for argument in arguments]


def as_typed(override: str) -> str:
    """An override as a person would type it: without the quotes of ``for_hydra`` and a sweep's escapes."""
    name, _, value = override.partition("=")
    if _PATHS.fullmatch(name) and value[:1] in ("'", '"'):
        return f"{name}={OverridesParser.create().parse_override(override).value()}"
    return override.replace("\\:", ":")


def config_folders(arguments: list[str]) -> list[str]:
    """The user's ``--config-dir``, as given: part of the command that repeats a run."""
    for index, argument in enumerate(arguments):
        if argument in ("--config-dir", "-cd"):
            return arguments[index : index + 2]
        if argument.startswith("--config-dir="):
            return [argument]
    return []


def _check(argument: str) -> None:
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise AceError(f"{argument!r} is not UTF-8", "Rename the file, or set the terminal to UTF-8.") from None
    name, _, value = argument.partition("=")
    if len(name) > _LONGEST_NAME:
        raise AceError(f"{name}: there is no such option", "See ace-prune --help.")
    if name in _GROUPS and (value == "null" or value.startswith("[")):
        raise AceError(f"{argument}: takes one name", did_you_mean("", offered(name)))
    if name in _GROUPS and any(len(part) > _LONGEST_NAME for part in value.split(",")):
        hint = "A path is given as model.path=..." if name == "model" else did_you_mean("", offered(name))
        raise AceError(f"{argument}: there is no such {name}", hint)


def _model_by_path(argument: str, arguments: list[str], many: bool) -> str:
    """``model=org/name`` and ``model=folder``, where no card has that name: ``model.path=...``."""
    name, _, value = argument.partition("=")
    if name != "model" or value.startswith(("'", '"', "{")) or _SWEEP.match(value):
        return argument
    cards = {*offered("model"), *_own_cards(arguments)}
    values = value.split(",") if many else [value]
    paths = [each for each in values if each not in cards and _is_path(each)]
    if paths and len(paths) < len(values):
        raise AceError(f"{argument} mixes cards and paths", "In one sweep, name all models by model.path=...")
    return f"model.path={value}" if paths else argument


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith(".gguf") or os.path.isdir(name)  # noqa: PTH112 (never raises)


def _own_cards(arguments: list[str]) -> list[str]:
    folders = [argument.removeprefix("--config-dir=") for argument in config_folders(arguments)]
    cards = [(folder, file) for folder in map(Path, folders) for file in (folder / "model").rglob("*.yaml")]
    return [file.relative_to(folder / "model").with_suffix("").as_posix() for folder, file in cards]


def _with_custom_model(arguments: list[str]) -> list[str]:
    """``model.path=...`` alone means no card: the default card's choices are for its own model."""
    names = [argument.partition("=")[0] for argument in arguments]
    if "model.path" not in names or "model" in names:
        return arguments
    place = names.index("model.path")
    return [*arguments[:place], "model=custom", *arguments[place:]]


def _with_quoted_path(argument: str, many: bool) -> str:
    name, _, value = argument.partition("=")
    if not _PATHS.fullmatch(name) or (many and _SWEEP.match(value)):
        return argument
    return f"{name}={','.join(map(_quoted, _parts(value) if many else [value]))}"


def _parts(value: str) -> list[str]:
    """A sweep's values: commas inside quotes are no separators."""
    return re.findall(r"""(?:^|(?<=,))('(?:\\.|[^'])*'|"(?:\\.|[^"])*"|[^,]*)(?=,|$)""", value)


def _quoted(path: str) -> str:
    if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":
        return path
    path = os.path.expanduser(path)  # noqa: PTH111 (never raises)
    if path == "null" or _PLAIN.fullmatch(path):
        return path
    return QuotedString(path, Quote.single).with_quotes()
