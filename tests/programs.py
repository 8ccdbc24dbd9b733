"""Programs of ace_cli in processes of their own that start at once: a server has imported everything, and forks.

A process of its own shows what only that shows: exit codes, what is written where, signals, peak memory. What a fresh
interpreter imports is for ``subprocess``. No pytest here, and nothing that tests import: the server would hold it.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

#: What takes the seconds. torch is imported, and no thread of it started: a fork may only have one.
PRELOADED = ["shortcuts", "torch.distributed"]


def server() -> Any:
    """The context of processes that are forks of one that has imported these; it finds them by PYTHONPATH alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path)):
        forkserver.ensure_running()
    return context


def start(
    module: str, arguments: list[str], cwd: Path, out: Path | Connection, err: Path, env: dict[str, str] | None = None
) -> Any:
    """``python -m ace_cli.MODULE ARGUMENTS`` in ``cwd``, appending what it says to two files; a started Process.

    What it says on standard output may also go into a pipe.
    """
    process = server().Process(target=_be, args=(module, arguments, cwd, out, err, {**os.environ, **(env or {})}))
    process.start()
    return process


def done(module: str, *arguments: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The program, ended, with what it said. Fails after two minutes."""
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = start(module, words, cwd, out, err, env)
        process.join(120)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{module} {words}: {err.read_text()}")
        return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())


def _be(module: str, arguments: list[str], cwd: Path, out: Path | Connection, err: Path, env: dict[str, str]) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, file in ((1, out), (2, err)):
        given = isinstance(file, Connection)
        stream = file.fileno() if given else os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, number)
        os.close(stream)
    import shortcuts  # noqa: F401 (there already, unless the server was started for others)
    import torch

    torch.set_num_threads(1)
    sys.argv = [module, *arguments]
    runpy.run_module(f"ace_cli.{module}", run_name="__main__", alter_sys=True)
