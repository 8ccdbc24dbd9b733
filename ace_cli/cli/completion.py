"""``ace-prune --completion bash|zsh``: what makes a shell complete the words of all five commands.

The script holds the words themselves: no key press waits for Python.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from ace_cli.core import registry
from ace_cli.core.errors import AceError
from ace_cli.run.config import SETTINGS, Schema, offered

_FLAGS = ("--help", "--version", "--cfg", "--multirun", "--config-dir", "--completion")
_BASH = r"""# eval "$(ace-prune --completion %(shell)s)"
_ace_words() {
  local line="${COMP_LINE:0:COMP_POINT}" current known="$1"
  current="${line##* }"
  case "$current" in
    *path=*|output_dir=*|tracker.folder=*|[./~]*)
      COMPREPLY=($(compgen -f -- "${current##*=}")); compopt -o filenames; return;;
  esac
  COMPREPLY=($(compgen -W "$known" -- "$current"))
  case "${COMPREPLY[0]}" in *=) compopt -o nospace;; esac
  # bash takes = for the end of a word: what is before it is typed already
  case "$current" in *=*) COMPREPLY=("${COMPREPLY[@]#"${current%%=*}="}");; esac
  [ ${#COMPREPLY[@]} -gt 0 ] || { COMPREPLY=($(compgen -f -- "$current")); compopt -o filenames; }
}
"""


def script(words: Sequence[str]) -> str:
    """For the shell ``words[0]``. AceError for one that there is nothing for."""
    if len(words) != 1 or words[0] not in ("bash", "zsh"):
        raise AceError("--completion: names a shell", "bash, or zsh.")
    parts = ["autoload -U +X bashcompinit && bashcompinit"] if words[0] == "zsh" else []
    parts.append(_BASH % {"shell": words[0]})
    for command, known in {"ace-prune": _of_prune(), **_of_others()}.items():
        function = f"_{command.replace('-', '_')}"
        parts.append(f"{function}() {{ _ace_words '{' '.join(known)}'; }}\ncomplete -F {function} {command}")
    return "\n".join(parts)


def _of_prune() -> list[str]:
    """Every override that has no free value, the names of all others, and the flags."""
    groups = ("model", "preset", "recipe", "experiment", *registry.PACKAGES)
    found = [f"{group}={name}" for group in groups for name in offered(group)]
    classes = {**{name: [cls] for name, cls in SETTINGS.items()}, "model": [Schema().model.__class__]}
    classes |= {group: list(registry.choices(group).values()) for group in registry.PACKAGES}
    for group, of_group in classes.items():
        names = dict.fromkeys(each.name for cls in of_group for each in dataclasses.fields(cls))
        found += [f"{group}.{name}=" for name in names]
    for each in dataclasses.fields(Schema):
        if each.name not in classes:
            found += [f"{each.name}=true", f"{each.name}=false"] if each.type == "bool" else [f"{each.name}="]
    return [*found, *_FLAGS]


def _of_others() -> dict[str, list[str]]:
    from ace_cli.cli import bench, evaluate, report, verify

    parsers: list[argparse.ArgumentParser] = [each.parser() for each in (bench, evaluate, report, verify)]
    cards = {"ace-bench": offered("model"), "ace-eval": offered("model")}
    return {
        each.prog: [*(word for word in each.format_usage().replace("[", " ").replace("]", " ").split() if
                      word.startswith("--")), "--help", *cards.get(each.prog, [])]
        for each in parsers
    }  # fmt: skip
