"""Inputs of real users' kinds in the reference data: each is read right, or refused with what would be right."""

import json
from pathlib import Path
from typing import Any

import pytest

import fusedet
from fusedet.data.dataset import DetectionDataset
from fusedet.data.readers.auto import detect_format, read_dataset
from fusedet.data.validation import check_image_headers
from fusedet.errors import InputError

pytestmark = pytest.mark.usefixtures("unrendered")

FIRST = [("dog", [130, 62, 148, 94]), ("cat", [45, 74, 80, 120])]
"""The first objects of all cases, which hold one generated dataset in different forms."""


@pytest.fixture
def cases(shared: Path) -> Path:
    if not (shared / "cases").is_dir():
        pytest.skip("the reference data hold no cases")
    return shared / "cases"


def first_objects(dataset: DetectionDataset) -> list[tuple[str, list[float]]]:
    image = dataset[0]
    return [(dataset.names[k], box.round(3).tolist()) for k, box in zip(image.labels[:2], image.boxes[:2], strict=True)]


@pytest.mark.parametrize(
    ("folder", "dataset_format", "images"),
    [
        ("09-voc-xml-beside-images-folder/kaggle", "voc", 6),
        ("09-voc-xml-beside-images-folder/labelimg", "voc", 6),
        ("09-voc-xml-beside-images-folder/labelme2voc", "voc", 8),
        ("10-label-studio-yolo-export/data", "yolo", 6),
        ("11-label-studio-coco-paths/absolute", "coco", 5),
        ("11-label-studio-coco-paths/parent_paths", "coco", 5),
        ("11-label-studio-coco-paths/subfolder", "coco", 5),
        ("15-string-ids/digits", "coco", 5),
        ("15-string-ids/frame_names", "coco", 5),
        ("17-coco-without-sizes-or-boxes/no_bbox", "coco", 5),
        ("17-coco-without-sizes-or-boxes/no_size", "coco", 5),
        ("17-coco-without-sizes-or-boxes/via_minus_1", "coco", 5),
        ("25-cvat-default-split/darknet", "yolo", 6),
        ("25-cvat-default-split/yolo", "yolo", 6),
    ],
)
def test_cases_are_read(cases: Path, folder: str, dataset_format: str, images: int) -> None:
    path = cases / folder
    data: dict[str, Any] = {"path": str(path)}
    if folder.startswith("11"):
        data["images"] = str(path / "images")
    assert detect_format(path) == dataset_format
    dataset = read_dataset(path, "train", images=data.get("images"))
    assert len(dataset) == images
    assert dataset.names == ("cat", "dog")
    assert first_objects(dataset) == FIRST
    assert set(dataset.sizes.flatten().tolist()) == {120, 160}
    assert not dataset.problems
    share = {} if folder[:2] in ("15", "17") else {"val": 0.2}
    checked = fusedet.check_dataset(data=data | share, config="retinanet_tiny")
    assert checked.ok, checked.to_dict()


def test_absent_splits_of_roboflow(cases: Path, tmp_path: Path) -> None:
    folder = cases / "08-convert-stopped-by-absent-test"
    assert list(fusedet.convert_dataset(folder / "no_test", tmp_path / "a", "coco").splits) == ["train", "val"]
    with pytest.raises(InputError, match="no_valid/valid/images does not exist"):
        read_dataset(folder / "no_valid", "val")
    done = fusedet.convert_dataset(folder / "no_valid", tmp_path / "b", "coco")
    assert list(done.splits) == ["train"]
    assert len(done.notes) == 2
    assert done.next_command.endswith("data.val=0.2 out=runs/a")


def test_boxes_on_stored_pixels(cases: Path) -> None:
    folder = cases / "14-exif-turned-stored-labels" / "data"
    errors = check_image_headers(read_dataset(folder, "train"))
    assert errors
    assert all("is 120x160 pixels, but its annotation says 160x120" in text for text in errors)
    assert all(text.endswith("before EXIF turns them; add data.exif=false") for text in errors)
    assert not check_image_headers(read_dataset(folder, "train", exif=False))


def test_results_with_ids_in_quotes(cases: Path, tmp_path: Path) -> None:
    folder = cases / "15-string-ids"
    scored = fusedet.validate(folder / "results.json", f"data.path={folder / 'digits'}", out=tmp_path / "digits")
    assert scored.metrics["stamp"]["detections"] == 1
    content = json.loads((folder / "frame_names" / "annotations" / "instances_val.json").read_text())
    perfect = [
        {key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 1} for a in content["annotations"]
    ]
    (tmp_path / "perfect.json").write_text(json.dumps(perfect))
    names = fusedet.validate(tmp_path / "perfect.json", f"data.path={folder / 'frame_names'}", out=tmp_path / "names")
    assert names.metrics["AP"] == pytest.approx(1)
