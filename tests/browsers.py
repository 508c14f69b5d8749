"""A real browser for the tests of pages: Chromium or Chrome as it is installed, which reaches this machine only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


def find_browser() -> str:
    """The path of the browser; without one, the test is skipped."""
    names = [os.environ["FUSEDET_BROWSER"]] if "FUSEDET_BROWSER" in os.environ else PROGRAMS
    program = next((path for name in names if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("no browser: install chromium, or name one in FUSEDET_BROWSER")
    return program


@contextmanager
def open_browser() -> Iterator[Any]:
    """Start the browser, driven by Playwright; without either, the test is skipped."""
    program = find_browser()
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with playwright.sync_playwright() as driver:
        own = driver.chromium.launch(executable_path=program, args=FLAGS)
        yield own
        own.close()
