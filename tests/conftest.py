"""Only the processes that run tests import what these need: not the one that deals them to workers."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    deals = bool(getattr(config.option, "numprocesses", None)) and not hasattr(config, "workerinput")
    if not deals:
        config.pluginmanager.import_plugin("running")
