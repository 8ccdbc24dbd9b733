"""A headless Chromium for tests; they are skipped where there is none."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def browser() -> Iterator[Any]:
    """selenium's driver. Skips where selenium, Chromium or its driver is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no chromium with chromedriver on this machine")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield session
    finally:
        session.quit()


def look(session: Any, page: Path, width: int, scheme: str = "light", picture: Path | None = None) -> dict[str, Any]:
    """Open a page at a width; what a visitor meets, and a picture of it if asked for."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    session.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    session.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    session.get(page.resolve().as_uri())
    if picture is not None:
        height = session.execute_script("return document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": width, "height": min(height, 6000), "scale": 1}
        shot = session.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        picture.write_bytes(base64.b64decode(shot["data"]))
    return {
        "errors": session.get_log("browser"),
        "width": session.execute_script("return document.documentElement.scrollWidth"),
        "text": session.execute_script("return document.body.innerText"),
        "paper": session.execute_script("return getComputedStyle(document.body).backgroundColor"),
        "ink": session.execute_script("return getComputedStyle(document.querySelector('svg.plot text')).fill"),
        "requests": session.execute_script("return performance.getEntriesByType('resource').map(r => r.name)"),
    }
