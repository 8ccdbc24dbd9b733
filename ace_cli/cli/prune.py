"""The command line: Hydra in, exit code out. A known error is one printed line and exit code 2."""

from __future__ import annotations

import sys

import hydra

from ace_cli import __version__
from ace_cli.cli.arguments import for_hydra
from ace_cli.cli.ending import command, mend
from ace_cli.cli.job import WORSE, job, known, prepare
from ace_cli.cli.launching import Launched
from ace_cli.core import workers
from ace_cli.core.errors import AceError
from ace_cli.run.config import config_folder, explain, store_schemas

DONE, FAILED = 0, 1
NOTHING_YET = "No block was finished: nothing is kept."
_BRIEFLY = """\
ace-prune makes a language model sparse or smaller, and proves what it did.

  ace-prune model=smollm2 experiment=best sparsity=0.5   a first look, offline
  ace-prune model=FOLDER metric=ace sparsity=2:4         yours, or a hub id
  ace-prune model=FOLDER sparsity=0.5 dry_run=true       what it would need
  ace-prune -m metric=wanda,varp,ace sparsity=0.5,2:4    a table

  ace-prune --help                                       every choice and option
  ace-eval, ace-bench, ace-report, ace-verify            judge, time, compare"""


@command("ace-prune")
def main() -> None:
    """``ace-prune``: exits 0 when done, 1 when a job of a sweep failed, 2 for what the user can mend, 3 at the gate."""
    if sys.argv[1:] in ([], ["--version"]):
        print(f"ace-prune {__version__}" if sys.argv[1:] else _BRIEFLY)
        return
    if (code := workers.ended()) is not None:
        sys.exit(code)
    if workers.size() > 1 and {"-m", "--multirun"} & {*sys.argv}:
        raise AceError("Several workers make one model, -m makes many", "Use a launcher of Hydra's, or leave -m out.")
    prepare()
    sys.argv[1:] = for_hydra(sys.argv[1:])
    store_schemas()
    launched, code = Launched(), DONE
    start = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="prune")(job)
    with launched.watching():
        try:
            start()
        except Exception as fault:  # before a job begins, all that fails is the configuration
            code = mend("ace-prune", known(fault) or explain(fault))
        except KeyboardInterrupt as stop:  # a run that has something to lose says what becomes of it
            kept = "Repeat the command: finished jobs are kept." if launched.jobs else NOTHING_YET
            code = mend("ace-prune", AceError("Interrupted", str(stop) or kept))
        finally:
            worst = _gathered(launched)
    sys.exit(code or worst)


def _gathered(launched: Launched) -> int:
    """Tables and page of a sweep, and its exit code."""
    sweep = launched.gathered()
    if sweep is None or not sweep.jobs:
        return DONE
    print("\n" + sweep.write())
    sweep.finish(launched.search)
    print(f"\nSweep: {sweep.folder}")
    for objection in sweep.objections:
        print(f"ace-prune: {objection}", file=sys.stderr)
    return FAILED if sweep.failed else WORSE if sweep.objections else DONE


if __name__ == "__main__":
    main()
