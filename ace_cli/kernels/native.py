"""Small C files, compiled for the processor at hand when they are first used and kept in the user's cache.

For the few instructions that numba does not reach. Nothing is built when the package is installed, and a machine
without a compiler, or of another kind, does without.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from ace_cli.core.cache import cache_folder

_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")
_COMPILERS = ("cc", "gcc", "clang")


class NoKernel(Exception):
    """There is no compiled code here; says why in one line."""


@cache
def library(name: str) -> ctypes.CDLL:
    """The compiled ``name``.c of this folder. Raises NoKernel without a compiler, or where it does not compile."""
    source = Path(__file__).with_name(f"{name}.c")
    compiler = next(
        (found for each in (os.environ.get("CC"), *_COMPILERS) if each and (found := shutil.which(each))), ""
    )
    if not compiler:
        raise NoKernel(f"no C compiler is on the path ({', '.join(_COMPILERS)}, $CC)")
    # what the compiler takes the processor for: a cache may be shared by different machines
    target = _output(name, compiler, *_FLAGS, "-dM", "-E", "-x", "c", os.devnull)
    key = hashlib.sha256(source.read_bytes() + target + " ".join((compiler, *_FLAGS)).encode()).hexdigest()[:16]
    made = cache_folder() / "kernels" / f"{name}-{key}.so"
    try:
        if not made.is_file():
            _compile(name, compiler, source, made)
        return ctypes.CDLL(str(made))
    except OSError as fault:
        raise NoKernel(f"{made} cannot be made or loaded: {fault.strerror or fault}") from None


def _compile(name: str, compiler: str, source: Path, made: Path) -> None:
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=made.parent) as work:
        _output(name, compiler, *_FLAGS, str(source), "-o", f"{work}/new.so")
        Path(f"{work}/new.so").replace(made)  # whole or absent, whoever else compiles it now


def _output(name: str, *command: str) -> bytes:
    try:
        return subprocess.run(command, capture_output=True, timeout=120, check=True).stdout
    except subprocess.CalledProcessError as fault:
        lines = fault.stderr.decode(errors="replace").splitlines()
        why = next((line for line in lines if "error" in line), f"exit code {fault.returncode}")
        raise NoKernel(f"{name}.c does not compile with {command[0]}: {why.strip()}") from None
    except (OSError, subprocess.SubprocessError) as fault:
        raise NoKernel(f"{command[0]} does not run: {fault}") from None


@cache
def parallel() -> ctypes.c_void_p | None:
    """GOMP_parallel of the OpenMP runtime that torch computes with; None where it is not found.

    Threads of our own would wait for torch's, which keep their cores for a while after each of its loops.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    for file in dict.fromkeys(line.split(maxsplit=5)[5] for line in lines if "libgomp" in line):
        try:
            return ctypes.cast(ctypes.CDLL(file).GOMP_parallel, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue
    return None
