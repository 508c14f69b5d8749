"""Fixtures that all tests share."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the project; absent, the test skips, and fails in CI."""
    folder = Path(os.environ.get("FUSEDET_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        text = f"no reference data at {folder}: set FUSEDET_SHARED"
        if os.environ.get("CI") == "true":
            pytest.fail(text)
        pytest.skip(text)
    return folder


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
