"""COCO's test server: splits without annotations, its json and zip; and VOC data, evaluated in both ways."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fusedet import cli
from fusedet.api import coco_submission
from fusedet.data.dataset import DetectionDataset
from fusedet.data.readers.auto import read_dataset
from fusedet.errors import InputError
from fusedet.types import Detections
from shared_fixtures import SMALL

pytestmark = pytest.mark.usefixtures("unrendered")

IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
NAMES = dict(zip([1, 2, 3, 16, 17, 90], ["person", "bicycle", "car", "bird", "cat", "toothbrush"]))


@pytest.fixture(scope="module")
def coco(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic dataset in the layout of COCO 2017, with test-dev: images of test2017 without annotations."""
    root = tmp_path_factory.mktemp("coco")
    for old, name in (("train", "train2017"), ("val", "val2017"), ("val", "test2017")):
        shutil.copytree(scenes / old, root / name)
    (root / "annotations").mkdir()
    categories = [{"id": i, "name": NAMES.get(i, f"thing {i}")} for i in IDS]
    for split in ("train", "val"):
        data = json.loads((scenes / "annotations" / f"instances_{split}.json").read_text())
        old = sorted(c["id"] for c in data["categories"])
        for annotation in data["annotations"]:
            annotation["category_id"] = list(NAMES)[old.index(annotation["category_id"])]
        data["categories"] = categories
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(data))
    for image in data["images"]:
        image["id"] += 1000
        image["file_name"] = Path(image["file_name"]).name
    info = {"images": data["images"], "categories": categories}
    (root / "annotations" / "image_info_test-dev2017.json").write_text(json.dumps(info))
    return root


@pytest.fixture(scope="module")
def run(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "my_run 2"
    assert cli.run(["train", "retinanet_tiny", f"data={coco}", f"out={out}", *SMALL, "test.score=0"]) == 0
    return out


def content(file: Path) -> Any:
    """Return the content of the only file in a zip, at its top and with its name."""
    with zipfile.ZipFile(file) as archive:
        assert archive.namelist() == [f"{file.stem}.json"]
        text = archive.read(f"{file.stem}.json")
    assert text == file.with_suffix(".json").read_bytes()
    return json.loads(text)


def test_test_dev_is_written_and_not_evaluated(
    run: Path, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = read_dataset(coco, "test-dev2017")
    assert (len(dataset), len(dataset.labels), len(dataset.names)) == (8, 0, 80)
    out = tmp_path / "sent"
    assert cli.run(["val", str(run), "--submission", "--split", "test-dev2017", f"out={out}"]) == 0
    said = capsys.readouterr().out
    assert "AP" not in said
    assert "detections_test-dev2017_my-run-2_results.zip" in said
    assert sorted(str(f.relative_to(out)) for f in out.rglob("*.*")) == [
        "bbox/detections_test-dev2017_my-run-2_results.json",
        "bbox/detections_test-dev2017_my-run-2_results.zip",
    ]
    rows = content(out / "bbox" / "detections_test-dev2017_my-run-2_results.zip")
    assert len(rows) == 8 * 100
    for row in rows:
        assert list(row) == ["image_id", "category_id", "score", "bbox"]
        assert type(row["image_id"]) is int
        assert row["image_id"] in dataset.image_ids
        assert row["category_id"] in IDS
        assert 0 <= row["score"] <= 1
        assert all(value == round(value, 2) and value >= 0 for value in row["bbox"])


def test_submission_has_the_metrics_of_val(run: Path, coco: Path, tmp_path: Path) -> None:
    """pycocotools computes the same metrics from the written file, apart from rounding."""
    out = tmp_path / "val"
    assert cli.run(["val", str(run), "--submission", f"out={out}"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    truth = COCO(str(coco / "annotations" / "instances_val2017.json"))
    server = COCOeval(truth, truth.loadRes(str(out / "bbox" / "detections_val2017_my-run-2_results.json")), "bbox")
    server.evaluate()
    server.accumulate()
    server.summarize()
    assert server.stats[0] == pytest.approx(metrics["AP"], abs=1e-3)
    assert server.stats[8] == pytest.approx(metrics["AR100"], abs=1e-2)


def test_a_split_without_annotations_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["val", str(run), "--split", "test-dev2017"]) == 2
    said = capsys.readouterr().err
    assert "image_info_test-dev2017.json has no objects to score by" in said
    assert "--submission" in said
    assert not (run / "val-test-dev2017").exists()


def test_too_many_detections_are_refused_before_prediction(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["val", str(run), "--submission", "--split", "test-dev2017", "test.max_det=300"]) == 2
    assert "test.max_det=300: COCO's rules allow 100 detections of an image" in capsys.readouterr().err


def test_other_data_is_refused(trained: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["val", str(trained), "--submission"]) == 2
    assert "instances_val.json is no split that COCO's server scores" in capsys.readouterr().err
    file = shutil.copytree(scenes, tmp_path / "few") / "annotations" / "instances_val.json"
    file.rename(file.with_name("instances_val2017.json"))
    with pytest.raises(
        InputError,
        match="has 6 categories, but COCO's server wants COCO's 80: the ids differ in 7, 8, 9, 10, 11 and 69 more",
    ):
        coco_submission.server_split(read_dataset(tmp_path / "few", "val"), 100)


@pytest.mark.parametrize(("split", "whole"), [("val2017", 5000), ("test-dev2017", 20288)])
def test_incomplete_splits_are_warned_of(
    run: Path,
    coco: Path,
    split: str,
    whole: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset = read_dataset(coco, split)
    assert coco_submission.server_split(dataset, 100) == split
    capsys.readouterr()
    assert cli.run(["val", str(run), "--submission", "--split", split, f"out={tmp_path / 'out'}", "--json"]) == 0
    said = capsys.readouterr()
    printed = json.loads(said.out)
    assert "warning" not in printed
    if split == "test-dev2017":
        assert printed["detections"] == 800
        assert Path(printed["files"]["submission (bbox)"]).is_file()
    assert (
        said.err
        == f"warning: {dataset.source} has 8 images, but COCO's {split}, which the server evaluates as a whole, has {whole}\n"
    )
    monkeypatch.setitem(coco_submission.IMAGES, split, 8)
    assert coco_submission.warn_if_incomplete(dataset, split) is None


# -- the format


@pytest.fixture
def dataset(coco: Path) -> DetectionDataset:
    return read_dataset(coco, "test-dev2017")


def good(dataset: DetectionDataset, **changes: Any) -> dict[str, Any]:
    result = {
        "image_id": int(dataset.image_ids[0]),
        "category_id": 90,
        "bbox": [1.234, 2.0, 3.456, 4.0],
        "score": 0.12345678,
    }
    return {k: v for k, v in (result | changes).items() if v is not None}


def test_numbers_are_rounded(dataset: DetectionDataset) -> None:
    kinds = coco_submission.format_results(dataset, [good(dataset)])
    assert kinds == {"bbox": [good(dataset, bbox=[1.23, 2.0, 3.46, 4.0], score=0.123457)]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_id": 5}, "1 results have an unknown image_id, not in"),
        ({"image_id": None}, "result 1 lacks 'image_id'"),
        ({"image_id": "7"}, "'image_id' of result 1 must be an integer"),
        ({"category_id": 12}, "1 results have an unknown category_id, not in"),
        ({"category_id": None}, "result 1 lacks 'category_id'"),
        ({"score": float("nan")}, "'score' of result 1 must be a finite number"),
        ({"score": None}, "result 1 lacks 'score'"),
        ({"bbox": [0, 0, -1, 5]}, "'bbox' of result 1 must be four finite numbers"),
        ({"bbox": [0, 0, 1]}, "'bbox' of result 1 must be four finite numbers"),
        ({"bbox": None}, "result 1 lacks 'bbox'"),
        ({"segmentation": {"size": [1, 1], "counts": "01"}}, "result 0 lacks 'segmentation'"),
    ],
)
def test_wrong_fields_are_refused(dataset: DetectionDataset, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        coco_submission.format_results(dataset, [good(dataset), good(dataset, **changes)])
    assert message in str(error.value)


def test_wrong_numbers_of_results_are_refused(dataset: DetectionDataset) -> None:
    with pytest.raises(InputError, match="there are no detections"):
        coco_submission.format_results(dataset, [])
    with pytest.raises(InputError, match=r"image \d+ has 101 detections, COCO's rules allow 100"):
        coco_submission.format_results(dataset, [good(dataset)] * 101)


def test_masks_are_a_separate_file(dataset: DetectionDataset, tmp_path: Path) -> None:
    """It has no boxes, from which COCO's tools would take the areas."""
    height, width = dataset.sizes[0].tolist()
    masks = torch.rand(2, height, width) < 0.5
    detections = Detections(
        torch.tensor([[0.0, 0, 9, 9], [1, 2, 3, 4]]), torch.tensor([0.9, 0.1]), torch.tensor([0, 79]), masks
    )
    results = detections.to_coco(int(dataset.image_ids[0]), dataset.category_ids)
    files = coco_submission.write_submission(
        coco_submission.format_results(dataset, results), "test-dev2017", "a", tmp_path
    )
    assert [f.parent.name for f in files.values()] == ["bbox", "segm"]
    boxes, segments = (content(f) for f in files.values())
    assert boxes[0].keys() == {"image_id", "category_id", "score", "bbox"}
    assert segments[0].keys() == {"image_id", "category_id", "score", "segmentation"}
    assert [row["category_id"] for row in segments] == [1, 90]
    for row, mask in zip(segments, masks, strict=True):
        assert torch.equal(torch.from_numpy(rle.decode(row["segmentation"])).bool(), mask)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"size": [1, 1], "counts": "01"}, "must be the image's"),
        ({"counts": [5, 6]}, "must be a text"),
        ({"counts": None}, "must be a text"),
        ([[0, 0, 5, 0, 5, 5]], "lacks 'segmentation', it must be an RLE"),
    ],
)
def test_wrong_masks_are_refused(dataset: DetectionDataset, mask: Any, message: str) -> None:
    size = dataset.sizes[0].tolist()
    code = {"size": size} | mask if isinstance(mask, dict) else mask
    with pytest.raises(InputError, match=message):
        coco_submission.format_results(dataset, [good(dataset, segmentation=code)])


# -- VOC


@pytest.mark.slow
def test_voc_data_are_evaluated_both_ways(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in table 5 of MSIL: VOC's AP beside COCO's, after a training and from stored results."""
    data, out = tmp_path / "VOC2012", tmp_path / "run"
    assert cli.run(["convert", "data", str(scenes), str(data), "--to", "voc"]) == 0
    assert (data / "ImageSets" / "Main" / "train.txt").is_file()
    assert cli.run(["train", "fcos_tiny", f"data={data}", f"out={out}", *SMALL]) == 0
    assert "VOC_AP" in json.loads((out / "metrics.json").read_text())
    capsys.readouterr()
    assert cli.run(["val", str(out), f"out={tmp_path / 'val'}"]) == 0
    said = capsys.readouterr().out
    for figure in ("IoU 0.75", "VOC AP ", "VOC AP 11 point "):
        assert figure in said
    truth = read_dataset(data, "val")
    perfect = [
        {"image_id": r.image_id, "category_id": truth.category_ids[k], "bbox": [x1, y1, x2 - x1, y2 - y1], "score": 0.9}
        for r in truth
        for (x1, y1, x2, y2), k in zip(r.boxes.tolist(), r.labels.tolist())
    ]
    (tmp_path / "perfect.json").write_text(json.dumps(perfect))
    assert cli.run(["val", str(tmp_path / "perfect.json"), f"data={data}", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["AP"] == metrics["VOC_AP"] == metrics["VOC_AP_11_point"] == pytest.approx(1)
