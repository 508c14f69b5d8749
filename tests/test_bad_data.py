"""Every malformed dataset of bad_data.py trains, with counted problems, or is refused with a clear message."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from bad_data import KINDS, TRAIN, Kind, write_dataset
from fusedet import config as configs
from fusedet.api.train_inputs import open_data, train_transform
from fusedet.config import Config
from fusedet.data.bad_images import BadImageLog
from fusedet.data.dataset import DetectionDataset
from fusedet.data.loader import build_train_loader
from fusedet.data.readers.auto import read_dataset
from fusedet.data.validation import require_usable_images
from fusedet.errors import InputError
from fusedet.models.detectors import build_detector
from shared_fixtures import SMALL

pytestmark = pytest.mark.usefixtures("unrendered")

BY_NAME = {kind.name: kind for kind in KINDS}
REFUSED = [kind for kind in KINDS if kind.refused]
SLOW = pytest.mark.slow
TRAINED = [pytest.param(kind, marks=SLOW if kind.name == "objects-60000" else ()) for kind in KINDS if not kind.refused]
REPLACED = [kind for kind in KINDS if kind.replaced]


def options(root: Path, *more: str) -> Config:
    return configs.load("retinanet_tiny", [*SMALL, f"data.path={root}", f"out={root}-out", *more])


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid dataset per format, in a folder of that name."""
    top = tmp_path_factory.mktemp("valid")
    for dataset_format in ("coco", "voc", "yolo"):
        write_dataset(top / dataset_format, dataset_format)
    return top


def corrupt(kind: Kind, valid: Path, tmp_path: Path) -> Path:
    root = Path(shutil.copytree(valid / kind.dataset_format, tmp_path / "data"))
    kind.corrupt(root)
    return root


def open_and_check(config: Config) -> tuple[DetectionDataset, DetectionDataset]:
    """Read and check both splits as a training does before its first step."""
    data, val = open_data(config, lambda text: None)
    share = config.train.max_bad_images if config.train.on_bad_image == "skip" else 0.0
    require_usable_images(data, val, max_bad_share=share, warn=lambda text: None)
    return data, val


@pytest.fixture(autouse=True)
def _limit_time() -> Iterator[None]:
    """Fail a test that waits without end, for example on a pipe."""

    def fail(*_: object) -> None:
        pytest.fail("does not end")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def error_of(action: Callable[[], object]) -> str:
    """The message of the InputError that an action raises; empty where it raises none."""
    try:
        action()
    except InputError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    return build_detector(options(Path("unused")), 2).train()


def run_epoch(detector: nn.Module, data: DetectionDataset, config: Config, log: BadImageLog | None = None) -> int:
    """Check the losses of every batch of an epoch; return the number of images."""
    count = 0
    for batch in build_train_loader(data, train_transform(config), batch=TRAIN // 2, bad_image_log=log).epoch(0):
        losses = detector.loss(batch)
        assert all(bool(value.isfinite()) for value in losses.values()), losses
        count += len(batch)
    return count


def test_kinds_have_unique_names() -> None:
    assert len(BY_NAME) == len(KINDS) >= 100
    assert min(len(REFUSED), len(TRAINED)) >= 40


@pytest.mark.parametrize("dataset_format", ["coco", "voc", "yolo"])
def test_uncorrupted_data_has_no_problems(detector: nn.Module, valid: Path, dataset_format: str) -> None:
    config = options(valid / dataset_format)
    data, val = open_and_check(config)
    assert not data.problems
    assert not val.problems
    assert len(data.labels) == 2 * TRAIN
    assert run_epoch(detector, data, config) == TRAIN


@pytest.mark.parametrize("kind", TRAINED, ids=lambda kind: kind.name)
def test_trained(detector: nn.Module, valid: Path, tmp_path: Path, kind: Kind) -> None:
    config = options(corrupt(kind, valid, tmp_path))
    data, _ = open_and_check(config)
    assert data.problems == kind.problems
    assert run_epoch(detector, data, config) == -(-len(data) // (TRAIN // 2)) * (TRAIN // 2)


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.name)
def test_refused(detector: nn.Module, valid: Path, tmp_path: Path, kind: Kind) -> None:
    config = options(corrupt(kind, valid, tmp_path))
    before = sorted(tmp_path.rglob("*"))
    message = error_of(lambda: open_and_check(config))
    assert bool(message) is not kind.fails_on_decode
    if kind.fails_on_decode:
        data, _ = open_and_check(config)
        message = error_of(lambda: run_epoch(detector, data, config))
    assert all(text in message for text in kind.refused), message
    assert "\n" not in message
    assert len(message) < 6000
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written before the dataset is checked"


@pytest.mark.parametrize("kind", REPLACED, ids=lambda kind: kind.name)
def test_replaced(detector: nn.Module, valid: Path, tmp_path: Path, kind: Kind) -> None:
    config = options(corrupt(kind, valid, tmp_path), "train.on_bad_image=skip", "train.max_bad_images=0.2")
    data, _ = open_and_check(config)
    log = BadImageLog(tmp_path / "out", len(data), 0.2)
    assert run_epoch(detector, data, config, log) == TRAIN
    assert len(log.close()) == kind.replaced
    rows = (tmp_path / "out" / "skipped.csv").read_text(encoding="utf-8", errors="surrogateescape")
    assert all(text in rows for text in kind.refused), rows


def test_image_deleted_after_the_start(detector: nn.Module, tmp_path: Path) -> None:
    config = options(write_dataset(tmp_path / "data", "coco"))
    data, _ = open_and_check(config)
    (tmp_path / "data/train/p3.jpg").unlink()
    with pytest.raises(InputError, match=r"p3\.jpg does not exist"):
        run_epoch(detector, data, config)
    log = BadImageLog(tmp_path / "out", len(data), 0.2)
    assert run_epoch(detector, data, config, log) == TRAIN
    assert [row.image_id for row in log.close()] == [3]


@pytest.mark.parametrize(
    ("dataset_format", "closed"),
    [("coco", "."), ("coco", "train"), ("coco", "annotations"), ("voc", "Annotations"), ("yolo", "images/train")],
)
def test_folder_without_permission(dataset_format: str, closed: str) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        root = write_dataset(Path(folder) / "data", dataset_format)
        config = options(root)
        open_and_check(config)  # imports what another user may not be able to read
        os.chmod(root / closed, 0)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)  # root ignores permissions
        try:
            with pytest.raises(InputError) as error:
                open_and_check(config)
        finally:
            if is_root:
                os.seteuid(0)
            os.chmod(root / closed, 0o755)
        assert "Permission denied" in str(error.value)
        assert str(root) in str(error.value)


def test_code_in_a_yaml_does_not_run(valid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = corrupt(BY_NAME["yaml-code"], valid, tmp_path)
    with pytest.raises(InputError):
        read_dataset(root, "train")
    assert not (tmp_path / "pwned").exists()


def test_a_detector_with_masks_refuses_dropped_segmentations(valid: Path, tmp_path: Path) -> None:
    root = corrupt(BY_NAME["polygon-far"], valid, tmp_path)
    masks = build_train_loader(read_dataset(root, "train"), train_transform(options(root)), batch=2, masks=True)
    with pytest.raises(InputError, match="has no segmentation"):
        list(masks.epoch(0))


def test_masks_of_a_polygon_that_leaves_its_image(valid: Path, tmp_path: Path) -> None:
    root = corrupt(BY_NAME["polygon-leaves-image"], valid, tmp_path)
    config = options(root, "data.size=[48,64]", "data.flip=0")
    for batch in build_train_loader(
        read_dataset(root, "train"), train_transform(config), batch=TRAIN, masks=True
    ).epoch(0):
        masks = batch.targets[batch.ids.index(0)].masks
        assert masks is not None
        y, x = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
        assert (masks[0, :48, :64] == (x > y)).float().mean() > 0.97, (
            "the part of the triangle (-50,-50) (100,-50) (100,100) inside the image"
        )
