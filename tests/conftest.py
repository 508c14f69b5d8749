"""Fixtures that all tests share."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from fusedet import cli
from fusedet.data.synthetic import generate_dataset

# how long an example takes says more about the machine than about the code
settings.register_profile("fusedet", deadline=None)
settings.load_profile("fusedet")

ROOT = Path(__file__).resolve().parents[1]
LONG = (
    "together",
    "ablate",
    "kill",
    "two_ranks",
    "cli",
    "contracts",
    "flat_memory",
    "together_two_stage",
    "edge_cases",
)
"""Long files, first in the order of collection."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}.py": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


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


@pytest.fixture
def no_initialization(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the weights of convolutions and linear layers as they lie in memory, for models that load all of them."""
    for name in ("kaiming_normal_", "kaiming_uniform_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *args, **options: tensor)


SMALL = [
    "model.backbone.name=lcnet_050",
    "model.pyramid.channels=16",
    "model.head.convs=1",
    "model.head.norm=false",
    "data.size=[64,96]",
    "data.workers=0",
    "train.epochs=1",
    "train.batch=4",
    "train.base_batch=4",
    "train.warmup_steps=0",
    "test.score=0.001",
    "device=cpu",
]
"""Overrides of retinanet_tiny that make a training a matter of a second."""


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated data: 8 images to train on, 8 to validate on, of 64 to 96 pixels. Not to be changed."""
    folder = tmp_path_factory.mktemp("scenes") / "data"
    return generate_dataset(folder, images=16, seed=0, size=(64, 96), splits={"train": 0.5, "val": 0.5})


@pytest.fixture(scope="session")
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on `scenes`. Not to be changed: use `run_copy`."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert cli.run(["train", "retinanet_tiny", f"data={scenes}", f"out={out}", *SMALL]) == 0
    return out


@pytest.fixture
def run_copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "copied_run"))
