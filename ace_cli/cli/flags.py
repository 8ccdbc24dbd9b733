"""The flags of a command: what is wrong with them is one line, as everywhere."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from ace_cli.core.device import Dtype, device_faults
from ace_cli.core.errors import AceError


class Flags(argparse.ArgumentParser):
    """argparse's parser, which raises AceError where that one prints its usage and ends the process."""

    def error(self, message: str) -> NoReturn:
        """Raises AceError with argparse's words."""
        raise AceError(message, f"See {self.prog} --help.")

    def add_computing(self) -> None:
        """The flags of every command that computes: on what, in which dtype, and where its numbers go."""
        self.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
        dtypes = [dtype.value for dtype in Dtype]
        self.add_argument("--dtype", default="auto", choices=dtypes, help="of computation; auto: as stored")
        self.add_argument("--json", type=Path, metavar="OUT", help="also write the numbers to this file")


def computing_faults(arguments: argparse.Namespace) -> list[str]:
    """What is wrong with the values of ``add_computing``, a line each."""
    faults = device_faults(arguments.device)
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        faults.append(f"--json {arguments.json}: there is no such folder")
    if arguments.json and arguments.json.is_dir():
        faults.append(f"--json {arguments.json}: is a folder; name a file")
    return faults
