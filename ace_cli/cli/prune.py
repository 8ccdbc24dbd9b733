"""The command line: Hydra in, exit code out. A known error is one printed line and exit code 2."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import hydra
from hydra.core.hydra_config import HydraConfig

from ace_cli import __version__
from ace_cli.cli.arguments import for_hydra
from ace_cli.cli.completion import script
from ace_cli.cli.ending import command, mend
from ace_cli.cli.help import BRIEFLY, show
from ace_cli.cli.job import WORSE, job, known, prepare
from ace_cli.cli.launching import Launched
from ace_cli.core.errors import AceError
from ace_cli.run.config import config_folder, explain, store_schemas

DONE, FAILED = 0, 1
NOTHING_YET = "No block was finished: nothing is kept."


@command("ace-prune")
def main() -> None:
    """``ace-prune``: exits 0 when done, 1 when a job of a sweep failed, 2 for what the user can mend, 3 at the gate."""
    if (told := _told(sys.argv[1:])) is not None:
        print(told)
        return
    _work()


def _told(arguments: list[str]) -> str | None:
    """What only wants to be read; None where there is something to do."""
    if not arguments:
        return BRIEFLY
    if "--version" in arguments:
        return f"ace-prune {__version__}"
    if "--completion" in arguments:
        return script(arguments[arguments.index("--completion") + 1 :])
    if {"--help", "-h"} & set(arguments):
        return show([name for name in arguments if "=" not in name and not name.startswith("-")])
    return None


def _work() -> None:
    prepare()
    sys.argv[1:] = for_hydra(sys.argv[1:])
    store_schemas()
    launched, code = Launched(), DONE
    start = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="prune")(job)
    with launched.watching():
        try:
            with _choices_named(sys.argv[1:]):
                start()
        except Exception as fault:  # before a job begins, all that fails is the configuration
            code = mend("ace-prune", known(fault) or explain(fault))
        except KeyboardInterrupt as stop:  # a run that has something to lose says what becomes of it
            kept = "Repeat the command: finished jobs are kept." if launched.jobs else NOTHING_YET
            code = mend("ace-prune", AceError("Interrupted", str(stop) or kept))
        finally:
            worst = _gathered(launched)
    sys.exit(code or worst)


@contextmanager
def _choices_named(arguments: list[str]) -> Iterator[None]:
    """What ``--cfg job`` prints says which choice the options of a group belong to."""
    if not {"--cfg", "-c"} & set(arguments) and not any(each.startswith("--cfg=") for each in arguments):
        yield
        return
    with redirect_stdout(io.StringIO()) as printed:
        yield
    chosen = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    for line in printed.getvalue().splitlines():
        name, _, rest = line.partition(":")
        named = isinstance(chosen.get(name), str) and rest.strip() in ("", "{}")
        print(f"{line}  # {name}={chosen[name]}" if named else line)


def _gathered(launched: Launched) -> int:
    """Tables and page of a sweep, and its exit code."""
    sweep = launched.gathered()
    if sweep is None or not sweep.jobs:
        return DONE
    sweep.write()
    from ace_cli.report.terminal import Terminal

    with Terminal().waiting("writing sweep.html"):
        sweep.finish(launched.search)
    sweep.show()
    for objection in sweep.objections:
        print(f"ace-prune: {objection}", file=sys.stderr)
    return FAILED if sweep.failed else WORSE if sweep.objections else DONE


if __name__ == "__main__":
    main()
