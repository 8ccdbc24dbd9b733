"""Steps of a wait: how somebody who watches hears of them."""

from __future__ import annotations


class Steps:
    """Is called after each step, and told before how many there will be, once that is known. This one tells nobody."""

    def of(self, total: int) -> None:
        """``total`` steps are to come, counted from now on."""

    def __call__(self) -> None:
        """One more step is done."""


NOBODY = Steps()
