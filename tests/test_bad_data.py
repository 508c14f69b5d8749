"""Every bad dataset of bad_data.py is trained through with its counts, or refused with a sentence that names the fault."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from bad_data import KINDS, TRAIN, Kind, good
from conftest import SMALL
from fusedet import config as configs
from fusedet.api.image_check import check_images
from fusedet.api.train import open_data, train_transform
from fusedet.config import Config
from fusedet.data.bad_images import BadImageLog
from fusedet.data.dataset import DetectionDataset
from fusedet.data.loader import build_train_loader
from fusedet.data.readers.auto import read_dataset
from fusedet.errors import InputError
from fusedet.models.detectors import build_detector

BY_NAME = {kind.name: kind for kind in KINDS}
REFUSED = [kind for kind in KINDS if kind.refused]
TRAINED = [kind for kind in KINDS if not kind.refused]
REPLACED = [kind for kind in KINDS if kind.replaced]


def options(root: Path, *more: str) -> Config:
    return configs.load("retinanet_tiny", [*SMALL, f"data.path={root}", f"out={root}-out", *more])


def spoiled(kind: Kind, tmp_path: Path) -> Path:
    root = good(tmp_path / "data", kind.form)
    kind.spoil(root)
    return root


def prepared(config: Config) -> tuple[DetectionDataset, DetectionDataset]:
    """As a training does before its first step."""
    data, val = open_data(config, lambda text: None)
    check_images(config, data, val, lambda text: None)
    return data, val


@pytest.fixture(autouse=True)
def _patience() -> Iterator[None]:
    """What waits for ever, on a pipe, fails."""

    def give_up(*_: object) -> None:
        pytest.fail("waits for ever")

    former = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


def complaint(action: Callable[[], object]) -> str:
    """What is wrong, in a sentence; nothing where all is well."""
    try:
        action()
    except InputError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    return build_detector(options(Path("unused")), 2).train()


def steps(detector: nn.Module, data: DetectionDataset, config: Config, ledger: BadImageLog | None = None) -> int:
    """Losses of every batch of an epoch; gives how many there were."""
    count = 0
    for batch in build_train_loader(data, train_transform(config), batch=2, bad_image_log=ledger).epoch(0):
        losses = detector.loss(batch)
        assert all(bool(value.isfinite()) for value in losses.values()), losses
        count += 1
    return count


def test_the_matrix_is_wide() -> None:
    assert len(BY_NAME) == len(KINDS) >= 100, "names are told apart"
    assert min(len(REFUSED), len(TRAINED)) >= 40


@pytest.mark.parametrize("form", ["coco", "voc", "yolo"])
def test_the_data_is_good_before_it_is_spoiled(detector: nn.Module, tmp_path: Path, form: str) -> None:
    config = options(good(tmp_path / "data", form))
    data, val = prepared(config)
    assert not data.problems
    assert not val.problems
    assert len(data.labels) == 2 * TRAIN
    assert steps(detector, data, config) == TRAIN / 2


@pytest.mark.parametrize("kind", TRAINED, ids=lambda kind: kind.name)
def test_trained_through(detector: nn.Module, tmp_path: Path, kind: Kind) -> None:
    config = options(spoiled(kind, tmp_path))
    data, _ = prepared(config)
    assert data.problems == kind.problems
    assert steps(detector, data, config) == -(-len(data) // 2)


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.name)
def test_refused(detector: nn.Module, tmp_path: Path, kind: Kind) -> None:
    config = options(spoiled(kind, tmp_path))
    before = sorted(tmp_path.rglob("*"))
    said = complaint(lambda: prepared(config))
    assert bool(said) is not kind.met, "damage behind the header alone is met later"
    if kind.met:
        data, _ = prepared(config)
        said = complaint(lambda: steps(detector, data, config))
    assert all(word in said for word in kind.refused), said
    assert "\n" not in said
    assert len(said) < 6000
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written before the data are known to be good"


@pytest.mark.parametrize("kind", REPLACED, ids=lambda kind: kind.name)
def test_replaced(detector: nn.Module, tmp_path: Path, kind: Kind) -> None:
    config = options(spoiled(kind, tmp_path), "train.on_bad_image=skip", "train.max_bad_images=0.2")
    data, _ = prepared(config)
    ledger = BadImageLog(tmp_path / "out", len(data), 0.2)
    assert steps(detector, data, config, ledger) == TRAIN / 2
    assert len(ledger.close()) == kind.replaced
    listed = (tmp_path / "out" / "skipped.csv").read_text(encoding="utf-8", errors="surrogateescape")
    assert all(word in listed for word in kind.refused), listed


def test_a_file_that_vanishes_between_start_and_use(detector: nn.Module, tmp_path: Path) -> None:
    config = options(good(tmp_path / "data", "coco"))
    data, _ = prepared(config)
    (tmp_path / "data/train/p3.jpg").unlink()
    with pytest.raises(InputError, match=r"p3\.jpg does not exist"):
        steps(detector, data, config)
    ledger = BadImageLog(tmp_path / "out", len(data), 0.2)
    assert steps(detector, data, config, ledger) == TRAIN / 2
    assert [row.image_id for row in ledger.close()] == [3]


@pytest.mark.parametrize(
    ("form", "closed"),
    [("coco", "."), ("coco", "train"), ("coco", "annotations"), ("voc", "Annotations"), ("yolo", "images/train")],
)
def test_a_folder_without_permission(form: str, closed: str) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        os.chmod(place, 0o755)
        root = good(Path(place) / "data", form)
        os.chmod(root / closed, 0)
        root_user = os.geteuid() == 0
        if root_user:
            os.seteuid(65534)  # permissions do not hold for root
        try:
            with pytest.raises(InputError) as error:
                prepared(options(root))
        finally:
            if root_user:
                os.seteuid(0)
            os.chmod(root / closed, 0o755)
        assert "Permission denied" in str(error.value)
        assert str(root) in str(error.value)


def test_code_in_a_yaml_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = spoiled(BY_NAME["yaml-code"], tmp_path)
    with pytest.raises(InputError):
        read_dataset(root, "train")
    assert not (tmp_path / "pwned").exists()


def test_segmentations_that_were_dropped_are_refused_by_a_detector_of_masks(tmp_path: Path) -> None:
    root = spoiled(BY_NAME["polygon-far"], tmp_path)
    masks = build_train_loader(read_dataset(root, "train"), train_transform(options(root)), batch=2, masks=True)
    with pytest.raises(InputError, match="has no segment"):
        list(masks.epoch(0))


def test_masks_follow_a_polygon_that_leaves_its_image(tmp_path: Path) -> None:
    root = spoiled(BY_NAME["polygon-leaves-image"], tmp_path)
    config = options(root, "data.size=[48,64]", "data.flip=0")
    for batch in build_train_loader(
        read_dataset(root, "train"), train_transform(config), batch=TRAIN, masks=True
    ).epoch(0):
        masks = batch.targets[batch.ids.index(0)].masks
        assert masks is not None
        y, x = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
        assert (masks[0, :48, :64] == (x > y)).float().mean() > 0.97, (
            "what the triangle (-50,-50) (100,-50) (100,100) covers of it"
        )
