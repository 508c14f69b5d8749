"""Test-time augmentation at several sizes and with flips: detections are mapped back and merged by one NMS."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

import fusedet
from fusedet import cli, config
from fusedet.api.detection import build_tta_transforms, detect_batch
from fusedet.data.collate import collate_tta_samples, make_samples
from fusedet.data.dataset import ImageAnnotations
from fusedet.data.loader import build_eval_loader
from fusedet.data.readers.auto import read_dataset
from fusedet.data.synthetic import generate_dataset
from fusedet.data.transforms import EvalTransform
from fusedet.models.detectors.tta import ImageDetections, merge_detections
from fusedet.types import Batch, BatchDetections
from shared_fixtures import SMALL
from small import DETECTORS, make

pytestmark = pytest.mark.usefixtures("unrendered")

CPU = torch.device("cpu")


def made(*overrides: str) -> tuple[EvalTransform, ...]:
    return build_tta_transforms(config.parse(config.apply_overrides({}, ["data.size=[800,1333]", *overrides])))


def batch(images: list[Tensor], transforms: tuple[EvalTransform, ...]) -> Batch:
    none = np.zeros(0)
    dataset = [
        ImageAnnotations(0, Path(), *p.shape[1:], np.zeros((0, 4)), none.astype(int), none > 0, none, [], none > 0)
        for p in images
    ]
    return collate_tta_samples([make_samples(*pair, transforms) for pair in zip(images, dataset)], transforms[1:])


# -- the config


def test_transforms_of_a_config() -> None:
    """Long sides keep data.size's proportion; mirrored copies come after the others."""
    assert made() == made("test.scales=[800]") == (EvalTransform(800, 1333),)
    assert made("data.antialias=false") == (EvalTransform(800, 1333, antialias=False),)
    assert made("test.flip=true") == (EvalTransform(800, 1333), EvalTransform(800, 1333, flip=True))
    both = made("test.scales=[400,1200]", "test.flip=true")
    assert both == (
        EvalTransform(400, 666),
        EvalTransform(1200, 2000),
        EvalTransform(400, 666, flip=True),
        EvalTransform(1200, 2000, flip=True),
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("test.scales=[]", "test.scales=[] must be different short sides"),
        ("test.scales=[16,800]", "test.scales=[16, 800] must be different short sides of at least 32 pixels"),
        ("test.scales=[600,600]", "test.scales=[600, 600] must be different"),
        ("test.scales=600", "test.scales must be a list, such as [600], got 600"),
        ("test.scales=[[400,666]]", "test.scales.0 must be int"),
        ("test.flip=0.5", "test.flip must be bool"),
    ],
)
def test_wrong_values_are_refused(override: str, message: str) -> None:
    with pytest.raises(fusedet.InputError) as error:
        made(override)
    assert message in str(error.value)


# -- the images


def test_a_batch_holds_every_copy_of_its_images(scenes: Path) -> None:
    """Each copy equals that of a loader of this transform only; a flip mirrors image and objects inside the padding."""
    dataset = read_dataset(scenes, "val")
    transforms = (EvalTransform(32, 48), EvalTransform(64, 96), EvalTransform(64, 96, flip=True))
    together = list(build_eval_loader(dataset, transforms[0], batch=3, tta_transforms=transforms[1:], workers=1))
    for number, transform in enumerate(transforms):
        alone = list(build_eval_loader(dataset, transform, batch=3))
        assert len(alone) == len(together)
        for ours, wanted in zip(((b, *b.tta_batches)[number] for b in together), alone):
            assert torch.equal(ours.images, wanted.images)
            assert torch.equal(ours.sizes, wanted.sizes)
            assert torch.equal(ours.scales, wanted.scales)
            assert (ours.ids, ours.flipped) == (wanted.ids, transform.flip)
    for one in together:
        plain, mirrored = one.tta_batches
        for i, (h, w) in enumerate(plain.sizes.tolist()):
            assert torch.equal(mirrored.images[i, :, :h, :w], plain.images[i, :, :h, :w].flip(2))
            assert not mirrored.images[i, :, h:].any()
            boxes, turned = plain.targets[i].boxes, mirrored.targets[i].boxes
            assert torch.allclose(
                turned, torch.stack([w - boxes[:, 2], boxes[:, 1], w - boxes[:, 0], boxes[:, 3]], 1), atol=1e-4
            )


# -- the merging


class Scripted:
    """A detector with given detections, one copy after the other: rows (x1, y1, x2, y2, score, label)."""

    def __init__(self, *finds: list[tuple[float, ...]], masks: list[Tensor] | None = None, **selection: Any) -> None:
        self.finds, self.masks, self.selection = iter(finds), iter(masks or []), selection
        self.has_masks = masks is not None

    def detect(self, images: Tensor, sizes: Tensor, padded: bool = True) -> Any:
        rows = torch.tensor(next(self.finds)).reshape(1, -1, 6)
        detections = BatchDetections(rows[..., :4], rows[..., 4], rows[..., 5].long(), torch.tensor([rows.shape[1]]))
        return detections._replace(masks=next(self.masks)[None]) if self.has_masks else detections


TABLE = [
    [(10, 10, 20, 20, 0.9, 0), (30, 5, 50, 25, 0.6, 1)],  # as it is
    [(20, 20, 40, 40, 0.8, 0), (20, 20, 40, 40, 0.7, 1)],  # twice as large
    [(40, 10, 50, 20, 0.95, 0), (0, 0, 6, 8, 0.3, 0)],  # mirrored in a width of 60
    [],  # both
]


def test_merging_by_hand() -> None:
    """The best of three detections of an object stays, per class; mirrored boxes are mapped back."""
    transforms = made("data.size=[40,60]", "test.scales=[40,80]", "test.flip=true")
    images = batch([torch.zeros(3, 40, 60, dtype=torch.uint8)], transforms)
    wanted = [(10, 10, 20, 20, 0.95, 0), (10, 10, 20, 20, 0.7, 1), (30, 5, 50, 25, 0.6, 1), (54, 0, 60, 8, 0.3, 0)]
    for most in (100, 3):
        (detections,) = detect_batch(Scripted(*TABLE, iou=0.5, max_det=most), images, CPU)
        rows = torch.cat([detections.boxes, detections.scores[:, None], detections.labels[:, None]], dim=1)
        assert torch.allclose(rows, torch.tensor(wanted[:most]))
    (detections,) = detect_batch(Scripted(*TABLE, iou=1.0), images, CPU)  # nothing overlaps by more than that
    assert sorted(detections.scores.tolist()) == pytest.approx([0.3, 0.6, 0.7, 0.8, 0.9, 0.95])


def test_masks_follow_their_boxes() -> None:
    """The mirrored copy's detection wins, and its mask is mirrored back."""
    transforms = made("data.size=[40,60]", "test.flip=true")
    images = batch([torch.zeros(3, 40, 60, dtype=torch.uint8)], transforms)
    left = torch.zeros(1, 4, 4)
    left[..., :2] = 1
    rows = [[(10, 10, 30, 20, 0.5, 2)], [(30, 10, 50, 20, 0.9, 2)]]
    (detections,) = detect_batch(Scripted(*rows, masks=[torch.ones(1, 4, 4), left]), images, CPU)
    assert detections.boxes.tolist() == [[10, 10, 30, 20]]
    assert detections.masks.shape == (1, 40, 60)
    columns = torch.arange(60)
    assert torch.equal(detections.masks[0, 15], (columns >= 20) & (columns < 30))
    assert not detections.masks[0, :10].any()


class Bright:
    """A detector of the bright region, which is the same in every copy."""

    selection: ClassVar[dict[str, Any]] = {}

    def detect(self, images: Tensor, sizes: Tensor, padded: bool = True) -> BatchDetections:
        boxes = []
        for image in images:
            y, x = (image.amax(dim=0) > 127).nonzero().unbind(1)
            boxes.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
        n = len(images)
        return BatchDetections(
            torch.tensor(boxes).float()[:, None],
            torch.full((n, 1), 0.8),
            torch.zeros(n, 1).long(),
            torch.ones(n).long(),
        )


def test_an_object_in_every_copy_is_detected_once() -> None:
    """With padding, because the width is no multiple of 32, and with two images of different shapes."""
    images = [torch.zeros(3, 50, 77, dtype=torch.uint8), torch.zeros(3, 64, 40, dtype=torch.uint8)]
    images[0][:, 4:30, 8:21] = 255
    images[1][:, 40:64, 0:9] = 255
    wanted = [[8, 4, 21, 30], [0, 40, 9, 64]]
    for options in (["test.flip=true"], ["test.flip=true", "test.scales=[128,64,32]"]):
        for detections, box in zip(
            detect_batch(Bright(), batch(images, made("data.size=[64,128]", *options)), CPU), wanted, strict=True
        ):
            assert len(detections) == 1
            assert torch.allclose(
                detections.boxes, torch.tensor([box]).float(), atol=1.5
            )  # the resize rounds to whole pixels
    flat = batch(images[:1], (EvalTransform(50, 77), EvalTransform(50, 77, flip=True)))
    assert detect_batch(Bright(), flat, CPU)[0].boxes.tolist() == wanted[:1]


def test_merging_is_greedy_nms() -> None:
    """Per class, written out."""
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        parts = []
        for count in (0, 7, 12):
            corner = torch.rand(count, 2, generator=draw) * 40
            box = torch.cat([corner, corner + 5 + torch.rand(count, 2, generator=draw) * 30], dim=1)
            scores = torch.rand(count, generator=draw).sort(descending=True).values
            parts.append(ImageDetections(box, scores, torch.randint(0, 2, (count,), generator=draw), None))
        boxes, scores, labels = (torch.cat(column) for column in list(zip(*parts))[:3])
        kept: list[int] = []
        for i in scores.argsort(descending=True).tolist():
            if all(labels[i] != labels[j] or box_iou(boxes[i][None], boxes[j][None]) <= 0.4 for j in kept):
                kept.append(i)
        detections = merge_detections(parts, iou=0.4, max_det=6)
        assert len(kept) > 6
        assert torch.equal(detections.boxes, boxes[kept[:6]])
        assert torch.equal(detections.labels, labels[kept[:6]])


def test_no_detection_in_any_copy() -> None:
    nothing = ImageDetections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long(), torch.zeros(0, 28, 28))
    detections = merge_detections([nothing, nothing])
    assert [len(column) for column in detections[:4]] == [0, 0, 0, 0]


# -- every detector, and the commands


DISTINCT = ("retinanet", "fcos", "mask_rcnn", "grid_rcnn")
"""Detectors of all kinds of outputs: boxes of anchors and of points, masks, and boxes that may leave the image."""


@pytest.mark.parametrize(
    "name", [name if name in DISTINCT else pytest.param(name, marks=pytest.mark.slow) for name in DETECTORS]
)
def test_every_detector(name: str) -> None:
    """The highest score of all copies stays, no two boxes of a class overlap, and no mask or box leaves its image."""
    detector = make(name, "test.score=0", "test.max_det=15").eval()
    images = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in ((50, 70), (90, 60))]
    transforms = made("data.size=[64,96]", "test.scales=[64,96]", "test.flip=true")
    every = batch(images, transforms)
    detections = detect_batch(detector, every, CPU)
    alone = [detect_batch(detector, replace(copy, tta_batches=()), CPU) for copy in (every, *every.tta_batches)]
    for i, (one, image) in enumerate(zip(detections, images, strict=True)):
        assert 0 < len(one) <= 15
        assert one.scores[0] == max(copy[i].scores[0] for copy in alone)
        assert (one.scores.diff() <= 0).all()
        same = one.labels[:, None] == one.labels
        assert (
            "grid" in name
            or (box_iou(one.boxes, one.boxes).fill_diagonal_(0)[same] <= detector.selection["iou"] + 1e-4).all()
        )
        height, width = image.shape[1:]
        limit = torch.tensor([width, height, width, height])
        assert "grid" in name or ((one.boxes >= 0) & (one.boxes <= limit + 1e-3)).all()
        assert (one.masks is None) == (name != "mask_rcnn")
        assert one.masks is None or one.masks.shape == (len(one), height, width)


def test_one_copy_changes_nothing(trained: Path, scenes: Path) -> None:
    path = sorted((scenes / "val").iterdir())[0]
    plain, same, more = (
        fusedet.load(trained, *overrides, device="cpu").predict(path)
        for overrides in ([], ["test.scales=[64]", "test.flip=false"], ["test.scales=[64,96]", "test.flip=true"])
    )
    assert torch.equal(plain.boxes, same.boxes)
    assert torch.equal(plain.scores, same.scores)
    assert more.scores[0] >= plain.scores[0]
    assert not torch.equal(plain.scores[: len(more)], more.scores[: len(plain)])


def test_train_val_and_predict_agree(tmp_path: Path) -> None:
    """The evaluation at the end of a training, `val` and `predict` use the same test-time augmentation."""
    out, splits = tmp_path / "run", {"train": 0.5, "val": 0.5}
    scenes = generate_dataset(tmp_path / "data", images=4, seed=0, size=(64, 96), splits=splits)
    overrides = ["test.scales=[48,64]", "test.flip=true", "test.batch=1"]
    overrides += ["model.pyramid.finest=5", "model.pyramid.coarsest=5"]
    assert cli.run(["train", "retinanet_tiny", f"data={scenes}", f"out={out}", *SMALL, *overrides]) == 0
    assert cli.run(["val", str(out), f"out={tmp_path / 'val'}"]) == 0
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (out, tmp_path / "val")]
    assert metrics[0]["AP"] == pytest.approx(metrics[1]["AP"], abs=1e-6)
    dataset = read_dataset(scenes, "val")
    detections = fusedet.load(out, device="cpu").predict(dataset.path(0))
    results = json.loads((tmp_path / "val" / "val.bbox.json").read_text())
    scored = [r["score"] for r in results if r["image_id"] == int(dataset.image_ids[0])]
    assert scored
    assert detections.scores.tolist() == pytest.approx(scored, abs=1e-5)
