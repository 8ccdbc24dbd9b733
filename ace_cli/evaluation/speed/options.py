"""What is asked of every model whose speed is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Bench:
    """``new`` tokens after a prompt of ``prompt`` tokens, ``rounds`` times."""

    prompt: int = 128
    new: int = 32
    rounds: int = 5

    def faults(self) -> list[str]:
        """What is wrong with the numbers."""
        found = [f"{name}={value}: must be 1 or more" for name, value in vars(self).items() if value < 1]
        return found + (["new=1: decoding needs 2 tokens or more"] if self.new == 1 else [])

    @property
    def context(self) -> int:
        """Tokens that a model must hold at once."""
        return self.prompt + self.new + 1
