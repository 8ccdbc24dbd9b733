"""The flags of a command: what is wrong with them is one line, as everywhere."""

from __future__ import annotations

import argparse
from typing import NoReturn

from ace_cli.core.errors import AceError


class Flags(argparse.ArgumentParser):
    """argparse's parser, which raises AceError where that one prints its usage and ends the process."""

    def error(self, message: str) -> NoReturn:
        """Raises AceError with argparse's words."""
        raise AceError(message, f"See {self.prog} --help.")
