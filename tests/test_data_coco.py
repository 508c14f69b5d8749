"""The COCO reader: valid files, and the messages for malformed ones."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusedet.data.dataset import DetectionDataset
from fusedet.data.readers.coco import read_coco
from fusedet.errors import InputError
from tiny import coco_dict, write_coco


def load(root: Path, data: Any = None) -> DetectionDataset:
    write_coco(root, data)
    return read_coco(root / "annotations" / "instances_train2017.json", root / "train2017")


def changed(index: int, **values: Any) -> dict[str, Any]:
    data = coco_dict()
    data["annotations"][index] |= values
    return data


def test_labels_follow_sorted_category_ids(tmp_path: Path) -> None:
    dataset = load(tmp_path)
    assert dataset.names == ("cat", "dog")
    assert dataset.category_ids == (2, 9)
    assert dataset.image_ids.tolist() == [7, 3]
    assert dataset.sizes.tolist() == [[30, 40], [10, 20]]
    b, a = dataset
    assert b.path == tmp_path / "train2017" / "b.jpg"
    assert b.boxes.tolist() == [[5, 6, 15, 18], [1.5, 2.5, 4.75, 7.25]]
    assert b.labels.tolist() == [0, 1]
    assert a.labels.tolist() == [1, 0]
    assert not dataset.problems


def test_crowds_are_ignored_and_ignore_entries_in_training_only(tmp_path: Path) -> None:
    b, a = load(tmp_path)
    assert a.ignore.tolist() == a.eval_ignore.tolist() == [False, True]
    assert b.ignore.tolist() == [False, True]
    assert b.eval_ignore.tolist() == [False, False]


def test_area_is_annotated_or_of_the_box(tmp_path: Path) -> None:
    b, a = load(tmp_path)
    assert a.area.tolist() == [11.5, 200]
    assert b.area.tolist() == [120, 3.25 * 4.75]


def test_segmentations_are_kept(tmp_path: Path) -> None:
    b, a = load(tmp_path, changed(0, segmentation={"size": [10, 20], "counts": "X6"}))
    assert b.segmentations == [[[5.0, 6.0, 15.0, 6.0, 15.0, 18.0]], None]
    assert a.segmentations == [{"size": [10, 20], "counts": "X6"}, {"size": [10, 20], "counts": [0, 200]}]


def test_several_polygons(tmp_path: Path) -> None:
    segmentation = [[0.1, 0, 1, 0, 1, 1], [2, 2, 3, 2, 3, 3, 2, 3.7]]
    assert load(tmp_path, changed(0, segmentation=segmentation))[1].segmentations[0] == segmentation


def test_without_annotations_as_in_test_dev(tmp_path: Path) -> None:
    data = coco_dict()
    del data["annotations"]
    dataset = load(tmp_path, data)
    assert len(dataset) == 2
    assert len(dataset.labels) == 0


def test_numbers_in_quotes(tmp_path: Path) -> None:
    dataset = load(tmp_path, changed(0, bbox=["1.5", 2, "3", 4], image_id="3", category_id=9.0, area="7"))
    assert dataset[1].boxes[0].tolist() == [1.5, 2, 4.5, 6]
    assert dataset[1].area[0] == 7


@pytest.mark.parametrize(
    ("index", "values", "text"),
    [
        (1, {"bbox": [1, 2, 10**400, 4]}, "annotation 2 must hold numbers"),
        (2, {"area": "big"}, "'area' of annotation 3"),
        (2, {"image_id": 1.5}, "'image_id' of annotation 3 must be an integer"),
        (2, {"category_id": None}, "'category_id' of annotation 3"),
    ],
)
def test_wrong_annotations_are_named(tmp_path: Path, index: int, values: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=re.escape(text)):
        load(tmp_path, changed(index, **values))


@pytest.mark.parametrize("key", ["id", "file_name"])
def test_missing_image_keys_are_named(tmp_path: Path, key: str) -> None:
    data = coco_dict()
    del data["images"][1][key]
    with pytest.raises(InputError, match=f"image (3|number 1) has no '{key}'"):
        load(tmp_path, data)


def with_image(**values: Any) -> dict[str, Any]:
    data = coco_dict()
    data["images"][1] |= values
    return data


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("null", "must be an object"),
        ({"images": []}, "'categories' is missing"),
        (coco_dict() | {"images": {}}, "'images' must be a list"),
        (coco_dict() | {"images": []}, "lists no images"),
        (coco_dict() | {"images": [3]}, "entry 0 of 'images' must be an object"),
        (coco_dict() | {"annotations": ["a"]}, "entry 0 of 'annotations'"),
        (coco_dict() | {"categories": [{"id": 2, "name": "\ud800"}]}, "not valid Unicode"),
        (with_image(width=-2), "both must be above 0"),
        (with_image(height=-30), "both must be above 0"),
        (with_image(height="tall"), "'height' of image 3"),
        (with_image(file_name=5), "'file_name' of image 3 must be a text"),
        (with_image(file_name="..\\..\\x.jpg"), "outside the data folder"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, data: Any, text: str) -> None:
    with pytest.raises(InputError, match=re.escape(text)) as error:
        load(tmp_path, data)
    assert "instances_train2017.json" in str(error.value)


def test_missing_file_and_wrong_encoding(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no\.json cannot be read"):
        read_coco(tmp_path / "no.json", tmp_path)
    (tmp_path / "x.json").write_bytes(b"\xff\xfe{\x00")
    with pytest.raises(InputError, match="UTF-8"):
        read_coco(tmp_path / "x.json", tmp_path)


def test_images_are_required_by_default(tmp_path: Path) -> None:
    write_coco(tmp_path)
    file = tmp_path / "annotations" / "instances_train2017.json"
    with pytest.raises(InputError, match="none of the first images"):
        read_coco(file, tmp_path / "annotations")
    assert len(read_coco(file, tmp_path / "annotations", need_images=False)) == 2


def test_one_missing_image_is_accepted(tmp_path: Path) -> None:
    write_coco(tmp_path)
    (tmp_path / "train2017" / "a.jpg").unlink()
    assert len(read_coco(tmp_path / "annotations" / "instances_train2017.json", tmp_path / "train2017")) == 2


def test_agrees_with_pycocotools_on_real_data(shared: Path) -> None:
    pycocotools = pytest.importorskip("pycocotools.coco")
    root = shared / "data" / "coco_tiny"
    file = root / "annotations" / "instances_val2017.json"
    reference, dataset = pycocotools.COCO(str(file)), read_coco(file, root / "val2017")
    assert dataset.category_ids == tuple(sorted(reference.getCatIds()))
    assert len(dataset) == len(reference.imgs)
    for image in dataset:
        rows = reference.imgToAnns[image.image_id]
        boxes = np.array([r["bbox"] for r in rows]).reshape(-1, 4)
        np.testing.assert_array_equal(image.boxes, np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1))
        assert [dataset.category_ids[k] for k in image.labels] == [r["category_id"] for r in rows]
        assert image.ignore.tolist() == [bool(r["iscrowd"]) for r in rows]
        assert image.area.tolist() == [r["area"] for r in rows]
        assert image.segmentations == [r["segmentation"] for r in rows]
