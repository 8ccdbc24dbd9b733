"""``ace-prune --completion bash|zsh|fish``: what makes a shell complete the words of all five commands.

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
_BASH = r"""# eval "$(ace-prune --completion bash)"
_ace_words() {
  local line="${COMP_LINE:0:COMP_POINT}" current known="$*"
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
_ZSH = r"""# eval "$(ace-prune --completion zsh)"
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
_ace_words() {
  if [[ $PREFIX == (*path=*|output_dir=*|tracker.folder=*|[./~]*) ]]; then compset -P '*='; _files; return; fi
  local -a open=(${(M)@:#*=}) whole=(${@:#*=})
  compadd -S '' -a open
  compadd -a whole
  (( compstate[nmatches] )) || _files
}
"""
_FISH = r"""# ace-prune --completion fish | source
function __ace_file; string match -qr '^(.*path|output_dir|tracker\.folder)=|^[./~]' -- (commandline -ct); end
"""
#: Shell -> what its script begins with, and how a command says its words.
_SHELLS = {
    "bash": (_BASH, "{function}() {{ _ace_words {words}; }}\ncomplete -F {function} {command}"),
    "zsh": (_ZSH, "{function}() {{ _ace_words {words}; }}\ncompdef {function} {command}"),
    "fish": (_FISH, "complete -c {command} -n 'not __ace_file' {files}-a '{words}'"),
}


def script(words: Sequence[str]) -> str:
    """For the shell ``words[0]``. AceError for one that there is nothing for."""
    if len(words) != 1 or words[0] not in _SHELLS:
        raise AceError("--completion: names a shell", "bash, zsh or fish.")
    begin, line = _SHELLS[words[0]]
    parts = [begin]
    for command, known in {"ace-prune": _of_prune(), **_of_others()}.items():
        files = "-f " if command == "ace-prune" else ""  # the others' words are folders
        function = f"_{command.replace('-', '_')}"
        parts.append(line.format(command=command, function=function, words=" ".join(known), files=files))
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
