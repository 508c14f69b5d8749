"""Load the fixtures where tests run: a process that only hands tests out to others would import torch for nothing."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Register the fixtures, except in the process that distributes tests to workers."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")
