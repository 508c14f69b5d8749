"""Load the fixtures where tests run, and order the tests for several workers.

A process that only hands tests out to others would import torch for nothing.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

LONGEST = ("test_export.py", "test_weights.py", "test_together.py", "test_compile.py", "test_learning.py")
"""The modules whose slow tests take most of the time."""


def pytest_configure(config: pytest.Config) -> None:
    """Register the fixtures, except in the process that distributes tests to workers."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")


def order_for_workers(modules: dict[str, list[pytest.Item]], workers: int) -> list[pytest.Item]:
    """Begin the share of each worker with modules that have slow tests, and end it with fast ones.

    xdist gives each worker an equal number of consecutive tests at first. Workers that finish take tests from the end
    of others' shares, so that a slow test at an end would leave all other workers without work. A module with slow
    tests stays together; at the border of two shares the fixtures of a fast one are made twice.
    """
    slow = [name for name, items in modules.items() if any(item.get_closest_marker("slow") for item in items)]
    slow.sort(key=lambda name: LONGEST.index(name) if name in LONGEST else len(LONGEST))
    fast = [item for name, items in modules.items() if name not in slow for item in items]
    ordered: list[pytest.Item] = []
    left = sum(map(len, modules.values()))
    for worker in range(workers):
        share = left // (workers - worker)
        own = [item for name in slow[worker::workers] for item in modules[name]]
        added = len(fast) if worker == workers - 1 else max(0, share - len(own))
        ordered += own + fast[:added]
        del fast[:added]
        left -= share
    return ordered


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests that remain after the choice of marks, if several workers run some slow ones."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1 and any(item.get_closest_marker("slow") for item in items):
        modules: dict[str, list[pytest.Item]] = {}
        for item in items:
            modules.setdefault(item.path.name, []).append(item)
        items[:] = order_for_workers(modules, workers)


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Return a function that fills the folder of a name once for all workers; the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    top = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder, done = top / f"{name}-once", top / f"{name}-once.done"
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return make
