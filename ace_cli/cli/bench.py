"""``ace-bench MODEL...``: how fast checkpoints write, and what they take, side by side in one table."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ace_cli.cli.ending import LOADING, command
from ace_cli.cli.flags import Flags, computing_faults
from ace_cli.core.device import choose_device
from ace_cli.core.errors import AceError
from ace_cli.core.memory import lasting
from ace_cli.evaluation.speed.options import Bench


@command("ace-bench")
def main() -> None:
    """Exits 0 when done, 2 for what the user can mend."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported: our own bar is the only one
    arguments = parser().parse_args()
    bench = Bench(arguments.prompt, arguments.new, arguments.rounds)
    faults = computing_faults(arguments) + [f"--{fault.replace('=', ' ', 1)}" for fault in bench.faults()]
    if arguments.threads is not None and arguments.threads < 1:
        faults.append(f"--threads {arguments.threads}: must be 1 or more")
    if faults:
        raise AceError("; ".join(faults))
    _measure(arguments, bench)


def parser() -> Flags:
    """Of the command's arguments."""
    made = Flags(
        prog="ace-bench",
        description="Tokens a second, seconds to the first token, memory and bytes of checkpoints, side by side. Every "
        "engine that is here and takes a checkpoint is measured; ratios are against the first.",
        epilog="ace-bench smollm2 outputs/x/checkpoint outputs/x/packed outputs/x/gguf/model.gguf",
    )
    add = made.add_argument
    add("models", nargs="+", metavar="MODEL", help="folder (plain or packed), .gguf file, hub id, or a card: smollm2")
    add("--prompt", type=int, default=128, help="tokens of the prompt (128)")
    add("--new", type=int, default=32, help="tokens that are written (32)")
    add("--rounds", type=int, default=5, help="how often every model has its turn (5)")
    add("--threads", type=int, help="of a CPU; as torch has it if not said")
    made.add_computing()
    return made


def _measure(arguments: argparse.Namespace, bench: Bench) -> None:
    from ace_cli.report.terminal import Terminal, quiet_libraries

    terminal = Terminal()
    # torch and transformers take seconds to import; --help and faults must not wait for them
    with terminal.waiting(LOADING), lasting("ace_cli.evaluation.speed.measure"):
        import dataclasses
        import json

        import torch

        from ace_cli.evaluation.speed.engines import subjects
        from ace_cli.evaluation.speed.measure import measure, turns
        from ace_cli.report import facts

    quiet_libraries()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    dtype = None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    with terminal.waiting("opening the models"):
        places = {name: _place(name) for name in arguments.models}
        found = [each for name, path in places.items() for each in subjects(name, path, device, dtype, bench.context)]
    with terminal.progress("measuring", turns(found, bench)) as step:
        speed = measure(found, bench, device, step)
    terminal.speed(speed)
    if arguments.json:
        facts.write_whole(arguments.json, json.dumps(dataclasses.asdict(speed), indent=1, allow_nan=False) + "\n")
        terminal.say(f"Numbers: {arguments.json}")


def _place(name: str) -> Path:
    """The folder or GGUF file that is meant; what is packed stays so."""
    from ace_cli.model.packed import is_packed
    from ace_cli.model.quantised import is_quantised
    from ace_cli.model.source import open_model
    from ace_cli.run.config import named_model

    path = Path(name).expanduser()
    if is_packed(path) or is_quantised(path) or (path.suffix == ".gguf" and path.is_file()):
        return path
    return open_model(named_model(name)).folder


if __name__ == "__main__":
    main()
