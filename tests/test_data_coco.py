"""The COCO reader: valid files, and the messages for malformed ones."""

import json
import math
import random
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedet.data import annotation_cleaning
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


@pytest.mark.parametrize(
    "segmentation", [[[1, 2, 3]], [[1, 2, 3, 4]], ["a"], "x", {"counts": 3}, [[1, 2, 3, 4, 5, None]], 5, [[[1, 2]]]]
)
def test_broken_segmentations_are_dropped_and_counted(tmp_path: Path, segmentation: Any) -> None:
    dataset = load(tmp_path, changed(0, segmentation=segmentation))
    assert dataset.problems == {annotation_cleaning.BAD_SEGMENTATION: 1}
    assert dataset[1].segmentations[0] is None
    assert len(dataset.labels) == 4


def test_without_annotations_as_in_test_dev(tmp_path: Path) -> None:
    data = coco_dict()
    del data["annotations"]
    dataset = load(tmp_path, data)
    assert len(dataset) == 2
    assert len(dataset.labels) == 0


@pytest.mark.parametrize(
    ("bbox", "kept", "text"),
    [
        ([math.nan, 0, 1, 1], False, annotation_cleaning.NOT_FINITE),
        ([0, 0, math.inf, 1], False, annotation_cleaning.NOT_FINITE),
        ([1, 1, -1, 2], False, annotation_cleaning.NEGATIVE),
        ([1, 1, 0, 2], True, annotation_cleaning.NO_AREA),
        ([25, 1, 2, 2], True, annotation_cleaning.OUTSIDE),
        ([-5, 1, 5, 2], True, annotation_cleaning.OUTSIDE),
        ([-5, 1, 6, 2], True, annotation_cleaning.CLIPPED),
        ([15, 1, 6, 2], True, annotation_cleaning.CLIPPED),
    ],
)
def test_bad_boxes_are_counted(tmp_path: Path, bbox: list[float], kept: bool, text: str) -> None:
    dataset = load(tmp_path, changed(0, bbox=bbox))
    assert dataset.problems == {text: 1}
    assert len(dataset[1].boxes) == 1 + kept


def test_repeated_boxes_are_counted_and_kept(tmp_path: Path) -> None:
    data = coco_dict()
    data["annotations"] += [data["annotations"][0] | {"id": i} for i in (10, 11)]
    dataset = load(tmp_path, data)
    assert dataset.problems == {annotation_cleaning.REPEATED: 2}
    assert len(dataset.labels) == 6


def test_annotations_of_unlisted_images_are_dropped(tmp_path: Path) -> None:
    dataset = load(tmp_path, changed(1, image_id=99))
    assert dataset.problems == {annotation_cleaning.NO_IMAGE: 1}
    assert len(dataset.labels) == 3


def test_bad_areas(tmp_path: Path) -> None:
    dataset = load(tmp_path, changed(0, area=-3))
    assert dataset.problems == {annotation_cleaning.BAD_AREA: 1}
    assert dataset[1].area[0] == 12


def test_numbers_in_quotes(tmp_path: Path) -> None:
    dataset = load(tmp_path, changed(0, bbox=["1.5", 2, "3", 4], image_id="3", category_id=9.0, area="7"))
    assert dataset[1].boxes[0].tolist() == [1.5, 2, 4.5, 6]
    assert dataset[1].area[0] == 7


@pytest.mark.parametrize(
    ("index", "values", "text"),
    [
        (0, {"category_id": 5}, "annotation 1 has the category id 5"),
        (0, {"bbox": [1, 2, 3]}, "annotation 1 must be [x, y, width, height]"),
        (1, {"bbox": "1234"}, "annotation 2 must be [x, y, width, height]"),
        (1, {"bbox": [1, 2, "wide", 4]}, "annotation 2 must hold numbers, not 'wide'"),
        (1, {"bbox": [1, 2, None, 4]}, "annotation 2 must hold numbers, not None"),
        (1, {"bbox": [1, 2, 10**400, 4]}, "annotation 2 must hold numbers"),
        (2, {"area": "big"}, "'area' of annotation 3"),
        (2, {"iscrowd": "yes"}, "'iscrowd' of annotation 3 must be an integer"),
        (2, {"image_id": 1.5}, "'image_id' of annotation 3 must be an integer"),
        (2, {"image_id": 10**30}, "'image_id' of annotation 3 is too large"),
        (2, {"category_id": None}, "'category_id' of annotation 3"),
        (2, {"category_id": True}, "'category_id' of annotation 3"),
    ],
)
def test_wrong_annotations_are_named(tmp_path: Path, index: int, values: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=re.escape(text)):
        load(tmp_path, changed(index, **values))


@pytest.mark.parametrize("key", ["bbox", "image_id", "category_id"])
def test_missing_annotation_keys_are_named(tmp_path: Path, key: str) -> None:
    data = coco_dict()
    del data["annotations"][0][key]
    with pytest.raises(InputError, match=f"annotation 1 has no '{key}'"):
        load(tmp_path, data)


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
        ("", "not valid json"),
        ('{"images": [', "not valid json: line 1"),
        ("[" * 100_000, "not valid json"),
        ("[]", "must be an object"),
        ("null", "must be an object"),
        ({"annotations": [], "categories": []}, "'images' is missing"),
        ({"images": []}, "'categories' is missing"),
        (coco_dict() | {"images": {}}, "'images' must be a list"),
        (coco_dict() | {"images": []}, "lists no images"),
        (coco_dict() | {"images": [3]}, "entry 0 of 'images' must be an object"),
        (coco_dict() | {"annotations": None}, "'annotations' must be a list"),
        (coco_dict() | {"annotations": ["a"]}, "entry 0 of 'annotations'"),
        (coco_dict() | {"categories": []}, "has no classes"),
        (
            coco_dict() | {"categories": [{"id": 2, "name": "a"}, {"id": 2, "name": "b"}]},
            "category id 2 is given more than once",
        ),
        (coco_dict() | {"categories": [{"id": 2, "name": 3}]}, "'name' of category 2 must be a text"),
        (coco_dict() | {"categories": [{"id": 2, "name": "\ud800"}]}, "not valid Unicode"),
        (with_image(id=7), "image id 7 is given more than once"),
        (with_image(width=-2), "both must be above 0"),
        (with_image(height=-30), "both must be above 0"),
        (with_image(height="tall"), "'height' of image 3"),
        (with_image(file_name=5), "'file_name' of image 3 must be a text"),
        (with_image(file_name="../../x.jpg"), "outside the data folder"),
        (with_image(file_name="..\\..\\x.jpg"), "outside the data folder"),
        (with_image(file_name="/etc/x.jpg"), "must be a path relative"),
        (with_image(file_name="C:\\x.jpg"), "must be a path relative"),
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


def test_byte_order_mark(tmp_path: Path) -> None:
    assert len(load(tmp_path, "\ufeff" + json.dumps(coco_dict()))) == 2


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


def test_windows_separators_in_file_names(tmp_path: Path) -> None:
    data = with_image(file_name="train2017\\a.jpg")
    write_coco(tmp_path, data)
    dataset = read_coco(tmp_path / "annotations" / "instances_train2017.json", tmp_path, need_images=False)
    assert dataset.path(1) == tmp_path / "train2017" / "a.jpg"


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


JUNK = [
    None,
    True,
    -1,
    0,
    3,
    2.5,
    1e308,
    -1e308,
    math.nan,
    math.inf,
    10**30,
    "",
    "x",
    "12",
    "../..",
    "\ud800",
    "\0",
    [],
    {},
    [[]],
    [1],
    {"id": 1},
]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_only_input_errors_whatever_the_entries(seed: int, count: int) -> None:
    rng = random.Random(seed)
    data: Any = coco_dict()
    for _ in range(count):
        nodes: list[tuple[Any, Any]] = []
        queue = [data]
        while queue:
            node = queue.pop()
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            nodes += [(node, key) for key in keys]
            queue += [node[key] for key in keys if isinstance(node[key], dict | list)]
        if not nodes:
            break
        node, key = rng.choice(nodes)
        if rng.random() < 0.2:
            del node[key]
        else:
            node[key] = json.loads(json.dumps(rng.choice(JUNK)))
    _only_input_errors(json.dumps(data))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5))
def test_only_input_errors_whatever_the_bytes(seed: int, count: int) -> None:
    rng = random.Random(seed)
    text = json.dumps(coco_dict())
    for _ in range(count):
        at = rng.randrange(len(text))
        text = (
            text[:at]
            + rng.choice(["", "}", "]", '"', ",", "9" * 5000, "-", "e9", "é", "null"])
            + text[at + rng.randrange(3) :]
        )
    _only_input_errors(text)


def _only_input_errors(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "b.jpg").touch()
        (Path(folder) / "x.json").write_text(text)
        try:
            dataset = read_coco(Path(folder) / "x.json", folder)
        except InputError:
            return
        assert all(np.isfinite(r.boxes).all() for r in dataset)
        assert len(dataset.fingerprint()) == 16
