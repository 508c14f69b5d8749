"""Masks from the data through training, scoring and prediction to files, in the pixels of the images as they are."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coco_mask
from PIL import Image

import fusedet
from fusedet import cli, evaluation
from fusedet.api.detector_evaluation import compute_mask_metrics, detect
from fusedet.data.loader import build_eval_loader
from fusedet.data.readers.auto import read_dataset
from fusedet.data.transforms import EvalTransform
from fusedet.models.roi.mask import crop_masks
from fusedet.types import BatchDetections, Detections
from shared_fixtures import SMALL
from tiny import coco_dict, write_coco

pytestmark = pytest.mark.usefixtures("unrendered")

SMALL_MASKS = [
    *(option for option in SMALL if not option.startswith("model.head")),
    "model.backbone.pretrained=false",
    "model.backbone.frozen_stages=-1",
    "model.head={type: rpn, proposals: 20, train_proposals: 40}",
    "model.roi.stages=[{type: box, channels: 16, num: 32}]",
    "model.roi.branches=[{type: mask, convs: 1, channels: 8}]",
    "test.max_det=5",
]


@pytest.fixture(scope="module")
def run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "masks"
    assert (
        cli.run(["train", "mask_rcnn_r18", f"data={scenes}", f"out={out}", "train.monitor=mask_AP", *SMALL_MASKS]) == 0
    )
    return out


def test_training_writes_losses_figures_and_results_of_masks(run: Path, scenes: Path) -> None:
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert any(float(row["loss_mask"] or 0) > 0 for row in rows)
    assert any(row["mask_AP50"] for row in rows)
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"mask_AP", "mask_AP50"} <= metrics.keys() & metrics["classes"][0].keys()
    boxes, masks = (json.loads((run / f"val.{kind}.json").read_text()) for kind in ("bbox", "segm"))
    assert len(boxes) == len(masks) > 0
    assert boxes[0].keys() == {"image_id", "category_id", "score", "bbox"}
    assert masks[0].keys() == {"image_id", "category_id", "score", "segmentation"}
    dataset = read_dataset(scenes, "val")
    sizes = dict(zip(dataset.image_ids.tolist(), dataset.sizes.tolist()))
    assert all(result["segmentation"]["size"] == sizes[result["image_id"]] for result in masks)
    again = compute_mask_metrics(dataset, masks)
    assert again["mask_AP"] == pytest.approx(metrics["mask_AP"], nan_ok=True)


def test_scoring_prints_masks_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["val", str(run), "device=cpu"]) == 0
    text = capsys.readouterr().out
    assert "mask AP" in text
    assert "val.segm.json" in text


def test_results_with_masks_only_are_scored(tmp_path: Path) -> None:
    content = coco_dict()
    rectangle = {"bbox": [1, 2, 3, 4], "segmentation": [[1, 2, 4, 2, 4, 6, 1, 6]]}
    content["annotations"] = [content["annotations"][1], content["annotations"][0] | rectangle]
    root = write_coco(tmp_path / "data", content, "val")
    mask = np.zeros((30, 40), dtype=np.uint8)
    mask[6:18, 5:15] = 1
    compressed = coco_mask.encode(np.asfortranarray(mask))
    if isinstance(compressed["counts"], bytes):
        compressed["counts"] = compressed["counts"].decode()
    masks = [compressed, {"size": [10, 20], "counts": [12, 4, 6, 4, 6, 4, 164]}]
    results = [
        {"image_id": image, "category_id": category, "score": 0.9, "segmentation": segmentation}
        for image, category, segmentation in zip((7, 3), (2, 9), masks)
    ]
    (tmp_path / "val.segm.json").write_text(json.dumps(results))
    said: list[str] = []
    scored = fusedet.validate(tmp_path / "val.segm.json", data=root, out=tmp_path / "out", say=said.append)
    assert scored.metrics["AP"] == pytest.approx(1)
    assert 0 < scored.metrics["mask_AP"] < 1, "the first mask is its box, the object is a triangle"
    boxes = [row["bbox"] for row in json.loads((tmp_path / "out" / "val.bbox.json").read_text())]
    assert boxes == [[5, 6, 10, 12], [1, 2, 3, 4]]
    assert any("holds masks only" in text for text in said)


def test_predictions_hold_masks(run: Path, scenes: Path, tmp_path: Path) -> None:
    path = next((scenes).rglob("*.jpg"))
    predicted = fusedet.load(run, "test.score=0", device="cpu").predict(path)
    width, height = Image.open(path).size
    assert predicted.masks.shape == (len(predicted), height, width)
    assert predicted.masks.dtype == torch.bool
    assert len(predicted) > 0
    assert predicted.plot(score=0).tobytes() != Image.open(path).convert("RGB").tobytes()
    out = tmp_path / "found"
    assert cli.run(["predict", str(run), str(path), f"out={out}", "test.score=0", "device=cpu"]) == 0
    written = json.loads((out / "predictions.json").read_text())["annotations"]
    for one, mask in zip(written, predicted.masks, strict=True):
        assert np.array_equal(coco_mask.decode(one["segmentation"]).astype(bool), mask.numpy())
        assert one["area"] == int(mask.sum())


def test_masks_are_pasted_in_the_images_own_pixels(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the network's size differs: a mask whose left half is set ends at the middle of its box, to the pixel."""
    model = fusedet.load(run, device="cpu")
    half = torch.zeros(1, 2, 28, 28)
    half[..., :14] = 1

    def fake(images: torch.Tensor, sizes: torch.Tensor, padded: bool = True) -> BatchDetections:
        h, w = sizes[0].tolist()
        boxes = torch.tensor([[[0.0, 0, w, h / 2], [0, 0, 0, 0]]])
        return BatchDetections(boxes, torch.tensor([[0.9, 0]]), torch.tensor([[1, 0]]), torch.tensor([1]), half)

    monkeypatch.setattr(model.detector, "detect", fake)
    for height, width in ((40, 50), (400, 500), (64, 96)):
        predicted = model.predict(np.zeros((height, width, 3), np.uint8))
        assert predicted.masks.shape == (1, height, width)
        assert torch.equal(predicted.masks[0, height // 4], torch.arange(width) < width // 2)
        assert torch.equal(predicted.masks[0, :, width // 4], torch.arange(height) < height // 2)


class Knowing(torch.nn.Module):
    """A detector that finds every object of a batch, with its mask."""

    def __init__(self, batches: list) -> None:
        super().__init__()
        self.selection: dict = {}
        self.targets = iter(batch.targets for batch in batches)

    def detect(self, images: torch.Tensor, sizes: torch.Tensor, padded: bool = True) -> BatchDetections:
        targets = next(self.targets)
        counts = torch.tensor([len(t) for t in targets])
        boxes, labels, masks = (
            torch.nn.utils.rnn.pad_sequence(column, batch_first=True)
            for column in zip(*((t.boxes, t.labels, self.cut(targets, i)) for i, t in enumerate(targets)))
        )
        return BatchDetections(boxes, (torch.arange(boxes.shape[1]) < counts[:, None]).float(), labels, counts, masks)

    def cut(self, targets: tuple, image: int) -> torch.Tensor:
        boxes = targets[image].boxes
        return crop_masks(targets, boxes, torch.full((len(boxes),), image), torch.arange(len(boxes)), 28)


def test_what_is_known_scores_well(scenes: Path) -> None:
    """The data's own masks, through the loader, 28 x 28 cells and pasting, are recovered: mask AP50 is 1."""
    dataset = read_dataset(scenes, "val")
    batches = list(build_eval_loader(dataset, EvalTransform(128, 192), batch=4, masks=True))
    results = detect(Knowing(batches), batches, dataset, torch.device("cpu"))
    metrics = compute_mask_metrics(dataset, results)
    assert metrics["mask_AP50"] == 1
    assert metrics["mask_AP"] > 0.8


def test_results_in_cocos_form_are_the_masks() -> None:
    masks = torch.rand(3, 7, 5) < 0.5
    predicted = Detections(torch.rand(3, 4), torch.rand(3), torch.zeros(3, dtype=torch.int64), masks)
    for mask, result in zip(masks, predicted.to_coco()):
        assert json.loads(json.dumps(result))["segmentation"]["size"] == [7, 5]
        assert np.array_equal(coco_mask.decode(result["segmentation"]).astype(bool), mask.numpy())
    none = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), masks[:0])
    assert none.to_coco() == []


def test_data_without_masks_is_refused_before_anything_is_written(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(scenes, tmp_path / "data")
    for file in data.rglob("*val*.json"):
        content = json.loads(file.read_text())
        for annotation in content["annotations"][:2]:
            del annotation["segmentation"]
        file.write_text(json.dumps(content))
    out = tmp_path / "run"
    assert cli.run(["train", "mask_rcnn_r18", f"data={data}", f"out={out}", *SMALL_MASKS]) == 2
    assert "2 of the" in capsys.readouterr().err
    assert not out.exists()
    assert len(evaluation.evaluate_coco(read_dataset(data, "val"), [])) > 0


def test_masks_cannot_be_monitored_without_masks(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli.run(
            ["train", "retinanet_tiny", f"data={scenes}", f"out={tmp_path / 'run'}", "train.monitor=mask_AP", *SMALL]
        )
        == 2
    )
    assert "train.monitor=mask_AP" in capsys.readouterr().err
