"""Fixtures that all tests share."""

import copy
import gc
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from matplotlib.figure import Figure
from PIL import Image

from browsers import open_browser
from fusedet import cli, visualization
from fusedet.api import run_report
from fusedet.data.synthetic import generate_dataset
from fusedet.models.backbones import timm_backbone
from fusedet.models.backbones.pretrained import create_timm_model
from fusedet.models.modules import MSFMPlugin

# how long an example takes says more about the machine than about the code
settings.register_profile("fusedet", deadline=None)
settings.load_profile("fusedet")

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_finish() -> None:
    """Leave what is imported out of garbage collection: the fewer objects it walks, the less time it takes."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser of Playwright; one per module, since its event loop runs until it ends."""
    with open_browser() as own:
        yield own


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the project.

    Without it a test skips; in CI it fails, unless the setting is "none".
    """
    setting = os.environ.get("FUSEDET_SHARED")
    folder = Path(setting or ROOT.parent / "shared")
    if not folder.is_dir():
        text = f"no reference data at {folder}: set FUSEDET_SHARED"
        if os.environ.get("CI") == "true" and setting != "none":
            pytest.fail(text)
        pytest.skip(text)
    return folder


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seed the CPU's generator only: torch.manual_seed records the stack for each kind of device, 1 ms in all."""
    torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _no_flush() -> Iterator[None]:
    """Leave files to the page cache: a flush waits milliseconds for the disk, and no test survives a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


render = Figure.savefig
PLOTS = {
    name: getattr(visualization, name)
    for name in ("plot_precision_recall", "plot_confusion_matrix", "plot_ap_by_size", "plot_training")
}
"""The plots of a training and a validation."""


def save_unrendered(figure: Figure, file: Any, **options: Any) -> None:
    """Write an empty image in the place of a PNG; other formats are written as usual."""
    if options.get("format") == "png":
        Image.new("RGB", (8, 8)).save(file, format="png")
    else:
        render(figure, file, **options)


def save_empty(*arguments: Any) -> None:
    """Write an empty image in the place of one of `PLOTS`."""
    Image.new("RGB", (8, 8)).save(next(x for x in arguments if isinstance(x, Path) and x.suffix == ".png"))


@contextmanager
def without_rendering() -> Iterator[None]:
    """Draw none of `PLOTS`, and render no other PNG: that takes half of the time of a small training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save_unrendered)
        for name in PLOTS:
            patch.setattr(visualization, name, save_empty)
        patch.setattr(run_report, "write_report_page", lambda file, *_, **__: file.write_text("", encoding="utf-8"))
        yield


@pytest.fixture(scope="module")
def unrendered() -> Iterator[None]:
    """Render no plot in a module."""
    with without_rendering():
        yield


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Render plots in a module that does not."""
    monkeypatch.setattr(Figure, "savefig", render)
    for name, plot in PLOTS.items():
        monkeypatch.setattr(visualization, name, plot)


_built: dict[str, Any] = {}


def _copying(build: Callable[..., Any]) -> Callable[..., Any]:
    """Build once per device and arguments, then copy."""

    def copy_of(*args: Any) -> Any:
        key = f"{build.__qualname__} {torch.get_default_device()} {args}"
        if key not in _built:
            _built[key] = build(*args)
        return copy.deepcopy(_built[key])

    return copy_of


@pytest.fixture
def copied_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy backbones and MSFM modules that were built before: they take most of a build on the meta device."""
    monkeypatch.setattr(timm_backbone, "create_timm_model", _copying(create_timm_model))
    monkeypatch.setattr(MSFMPlugin, "make", _copying(MSFMPlugin.make))


SMALL = [
    "model.backbone.name=test_resnet",
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
    with without_rendering():
        assert cli.run(["train", "retinanet_tiny", f"data={scenes}", f"out={out}", *SMALL]) == 0
    return out


@pytest.fixture
def run_copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "copied_run"))
