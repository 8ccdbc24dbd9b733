"""What the workers of test_workers.py run. No pytest here: they start from a server that has imported everything."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any


def set_up(rank: int, size: int, port: int, log: Path) -> None:
    """What torchrun would do; output goes to a file."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1", "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    with open(log, "a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    import torch

    torch.set_num_threads(1)


def command(rank: int, size: int, port: int, log: Path, arguments: list[str], dies_after: int | None = None) -> None:
    """ace-prune as torchrun starts it. ``dies_after``: worker 1 is killed when so many blocks are done."""
    set_up(rank, size, port, log)
    from ace_cli.cli.prune import main
    from ace_cli.core.workers import Workers

    if dies_after is not None and rank == 1:
        agree, done = Workers.agree, []

        def dying(workers: Workers, what: str, held: dict[str, Any]) -> None:
            done.append(what)
            if len(done) > dies_after + 1:  # the first time is before the first block
                os.kill(os.getpid(), signal.SIGKILL)
            agree(workers, what, held)

        Workers.agree = dying  # type: ignore[method-assign]
    sys.argv = ["ace-prune", *arguments]
    main()


def unlike(rank: int, size: int, port: int, log: Path, arguments: list[str]) -> None:
    """ace-prune by workers whose processors, say, do not compute alike."""
    from ace_cli.pruning import engine, shares

    original = shares.held
    engine.held = lambda *given: {**original(*given), "the hidden states": str(rank)}  # type: ignore[assignment]
    command(rank, size, port, log, arguments)


def evaluate(rank: int, size: int, port: int, log: Path, arguments: list[str]) -> None:
    """ace-eval as torchrun starts it."""
    set_up(rank, size, port, log)
    from ace_cli.cli.evaluate import main

    sys.argv = ["ace-eval", *arguments]
    main()


def jobs(rank: int, size: int, port: int, log: Path, each: list[list[str]], results: Path) -> None:
    """Several runs by the same workers; the first one leaves its reports in ``results``."""
    set_up(rank, size, port, log)
    from hydra import compose, initialize_config_dir

    from ace_cli.core import workers
    from ace_cli.evaluation.dense import DenseCache
    from ace_cli.report.terminal import Terminal
    from ace_cli.run.config import config_folder, parse, store_schemas
    from ace_cli.run.pipeline import run

    store_schemas()
    group, found = workers.join("cpu"), []
    for overrides in each:
        with initialize_config_dir(str(config_folder().absolute()), version_base="1.3"):
            config = compose("prune", overrides)
        report = run(parse(config, Path(config.output_dir)), "test", Terminal(), DenseCache(), group)
        if report is not None:
            found.append(dataclasses.asdict(report))
    workers.leave()
    if rank == 0:
        results.write_text(json.dumps(found))
