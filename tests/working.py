"""What the workers of test_workers.py run. No pytest here: they start from a server that has imported everything."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ace_cli.run.config import RunConfig


def set_up(rank: int, size: int, port: int, log: Path) -> None:
    """What torchrun would do; output goes to a file."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1", "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    with open(log, "a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    import shortcuts  # noqa: F401 (there already, unless the server was started for others)
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


def joins(rank: int, size: int, port: int, log: Path) -> None:
    """Statistics of some tokens each: what all workers gather, the same bytes, is what one would see of all tokens."""
    set_up(rank, size, port, log)
    from dataclasses import replace

    import torch
    from test_statistics import KINDS, OF_TOKENS, data, observed, results

    from ace_cli.core import workers
    from ace_cli.methods.statistics import Gram, SecondMoment, Seen
    from ace_cli.model.files import hash_of_tensor

    group = replace(workers.join("cpu"), apart=True)
    x_TI, y_TO, weight_OI = data()
    kinds = [kind for kind in KINDS if kind in OF_TOKENS and not hasattr(kind, "most")]
    assert SecondMoment() in kinds
    for kind in kinds:
        whole = observed(kind, [7, len(x_TI) - 7], x_TI, y_TO, weight_OI)
        for first in (7, 0):  # of the second worker; then it sees all, and the first one nothing
            mine = Seen([kind])[kind]
            mine.share_with(group)
            if tokens := [slice(0, first), slice(first, None)][rank] if first or rank else None:
                beside_TO = x_TI.square() if kind.needs_dense else y_TO
                mine.update(x_TI[tokens], beside_TO[tokens], weight_OI)
            mine.gather()
            assert mine.tokens == whole.tokens, kind
            for name, value in results(whole).items():
                torch.testing.assert_close(results(mine)[name], value, rtol=1e-5, atol=1e-6)
            group.agree("at the end", {name: hash_of_tensor(value) for name, value in results(mine).items()})
    x_TI = torch.randn(20, 300, generator=torch.Generator().manual_seed(1))  # several parts of a matrix
    gram = Seen([Gram()])[Gram()]
    gram.share_with(group)
    gram.update(x_TI[rank::2], x_TI, x_TI)
    gram.gather()
    torch.testing.assert_close(gram.total_II, x_TI.T @ x_TI, rtol=1e-5, atol=1e-4)
    assert torch.equal(gram.total_II, gram.total_II.T)
    workers.leave()


def jobs(
    rank: int, size: int, port: int, log: Path, each: list[RunConfig], results: Path, batch_tokens: int | None = None
) -> None:
    """Several runs by the same workers; the first one leaves its reports in ``results``."""
    set_up(rank, size, port, log)
    from ace_cli.core import workers
    from ace_cli.evaluation.dense import DenseCache
    from ace_cli.model import streamed
    from ace_cli.report.terminal import Terminal
    from ace_cli.run.pipeline import run

    streamed.BATCH_TOKENS = batch_tokens or streamed.BATCH_TOKENS
    group, found = workers.join("cpu"), []
    for config in each:
        report = run(config, "test", Terminal(), DenseCache(), group)
        if report is not None:
            found.append(dataclasses.asdict(report))
    workers.leave()
    if rank == 0:
        results.write_text(json.dumps(found))
