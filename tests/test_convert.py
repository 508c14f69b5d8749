"""Conversion between the dataset formats: round trips, losses, refusals."""

import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedet.data import annotation_cleaning, writers
from fusedet.data.conversion import convert_dataset
from fusedet.data.dataset import DetectionDataset, ImageAnnotations
from fusedet.data.readers.auto import detect_format, list_splits, read_dataset
from fusedet.errors import InputError
from tiny import coco_dict, image, write_coco, write_voc, write_yolo, xml

FORMATS = ("coco", "voc", "yolo")


def by_name(dataset: DetectionDataset) -> dict[str, ImageAnnotations]:
    return {r.path.stem: r for r in dataset}


def assert_same(a: DetectionDataset, b: DetectionDataset, flags: bool = True) -> None:
    assert a.names == b.names
    first, second = by_name(a), by_name(b)
    assert first.keys() == second.keys()
    for name, before in first.items():
        assert (before.height, before.width) == (second[name].height, second[name].width)
        np.testing.assert_allclose(before.boxes, second[name].boxes, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(before.labels, second[name].labels)
        if flags:
            np.testing.assert_array_equal(before.ignore, second[name].ignore)


@pytest.mark.parametrize(("source", "to"), itertools.product(FORMATS, FORMATS))
def test_every_pair(tmp_path: Path, source: str, to: str) -> None:
    makers: dict[str, Any] = {"coco": write_coco, "voc": write_voc, "yolo": write_yolo}
    src = makers[source](tmp_path / "src")
    report = convert_dataset(src, tmp_path / "dst", to)
    assert detect_format(tmp_path / "dst") == to
    assert set(list_splits(tmp_path / "dst")) == set(list_splits(src)) == set(report)
    for split, counts in report.items():
        before, after = read_dataset(src, split), read_dataset(tmp_path / "dst", split)
        assert_same(before, after, flags=to != "yolo")
        if source == to == "coco":
            assert before.fingerprint() == after.fingerprint(), "COCO's `ignore` and `iscrowd` are both kept"
        assert counts["images"] == len(after)
        assert counts["annotations"] == len(after.labels)
        assert all(
            after.path(i).read_bytes() == by_name(before)[after.path(i).stem].path.read_bytes()
            for i in range(len(after))
        )


coordinates = st.floats(-50, 700, allow_subnormal=False)
rows = st.lists(
    st.tuples(coordinates, coordinates, st.floats(0, 500), st.floats(0, 500), st.integers(0, 2)), max_size=6
)


@settings(max_examples=12, deadline=None)
@given(st.lists(rows, min_size=1, max_size=3))
def test_random_boxes_survive_a_round_trip(images: list[list[tuple[float, float, float, float, int]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data: dict[str, Any] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 3 * i, "name": f"class {i}"} for i in range(3)],
        }
        for i, boxes in enumerate(images):
            image(root / "a" / "images" / f"{i}.jpg", 640, 427)
            data["images"].append({"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 427})
            data["annotations"] += [{"id": 1, "image_id": i, "category_id": 3 * k, "bbox": box} for *box, k in boxes]
        (root / "a" / "train.json").write_text(json.dumps(data))
        for before, after, to in (("a", "b", "voc"), ("b", "c", "yolo"), ("c", "d", "coco")):
            convert_dataset(root / before, root / after, to, link=True)
            assert_same(read_dataset(root / "a", "train"), read_dataset(root / after, "train"))


def test_coco_to_coco_keeps_everything(tmp_path: Path) -> None:
    src = write_coco(tmp_path / "src")
    assert convert_dataset(src, tmp_path / "dst", "coco") == {"train": {"images": 2, "annotations": 4}}
    a, b = read_dataset(src, "train"), read_dataset(tmp_path / "dst", "train")
    assert a.fingerprint() == b.fingerprint()  # ids, names, sizes, boxes, labels, flags
    assert a.category_ids == b.category_ids == (2, 9)
    assert [r.segmentations for r in a] == [r.segmentations for r in b]
    assert a.area.tolist() == b.area.tolist()


def test_losses_are_counted(tmp_path: Path) -> None:
    data = coco_dict()
    data["annotations"][0]["segmentation"] = [[1, 2, 4, 2, 4, 6], [1, 2, 3, 2, 3, 3]]
    src = write_coco(tmp_path / "src", data)
    assert convert_dataset(src, tmp_path / "voc", "voc")["train"] == {
        "images": 2,
        "annotations": 4,
        writers.DROPPED_SEGMENTATIONS.format(format="VOC"): 3,
        writers.DROPPED_CROWDS: 1,
        writers.DROPPED_IGNORE: 1,
        writers.NEW_IDS.format(format="VOC"): 2,
    }
    assert convert_dataset(src, tmp_path / "yolo", "yolo")["train"] == {
        "images": 2,
        "annotations": 4,
        writers.DROPPED_SEGMENTATIONS.format(format="YOLO"): 2,
        writers.DROPPED_FLAGS: 2,
        writers.NEW_IDS.format(format="YOLO"): 2,
    }
    segmentation = by_name(read_dataset(tmp_path / "yolo", "train"))["b"].segmentations[0]
    np.testing.assert_allclose(segmentation, [[5, 6, 15, 6, 15, 18]], atol=1e-6)


def test_a_crowd_is_counted_by_its_flag(tmp_path: Path) -> None:
    """A crowd may have no segmentation, and an annotation with ignore=1 may have an RLE."""
    data = coco_dict()
    rle = data["annotations"][2].pop("segmentation")
    data["annotations"][0] |= {"ignore": 1, "segmentation": rle}
    counts = convert_dataset(write_coco(tmp_path / "src", data), tmp_path / "voc", "voc")["train"]
    assert (counts[writers.DROPPED_CROWDS], counts[writers.DROPPED_IGNORE]) == (1, 2)


def test_a_polygon_with_other_bounds_than_its_box_is_dropped(tmp_path: Path) -> None:
    data = coco_dict()
    data["annotations"][1]["bbox"][0] += 0.01
    src = write_coco(tmp_path / "src", data)
    convert_dataset(src, tmp_path / "dst", "yolo")
    assert_same(read_dataset(src, "train"), read_dataset(tmp_path / "dst", "train"), flags=False)


def test_bad_boxes_are_in_the_report(tmp_path: Path) -> None:
    data = coco_dict()
    data["annotations"][0]["bbox"][2] = -1
    report = convert_dataset(write_coco(tmp_path / "src", data), tmp_path / "dst", "coco")
    assert report["train"] == {"images": 2, "annotations": 3, annotation_cleaning.NEGATIVE: 1}


def test_same_names_in_several_folders(tmp_path: Path) -> None:
    data = coco_dict()
    data["images"] = [{"id": i, "file_name": f"{i}/a.jpg", "width": 40, "height": 30} for i in range(3)]
    data["images"].append({"id": 3, "file_name": "0/A.png", "width": 40, "height": 30})
    data["annotations"] = [{"image_id": i, "category_id": 2, "bbox": [i, i, 5, 5]} for i in range(4)]
    src = write_coco(tmp_path / "src", data)
    for entry in data["images"]:
        image(src / "train2017" / entry["file_name"])
    for to in FORMATS:
        report = convert_dataset(src, tmp_path / to, to)
        assert report["train"][writers.RENAMED] == 3
        after = read_dataset(tmp_path / to, "train")
        assert sorted(round(r.boxes[0, 0]) for r in after) == [0, 1, 2, 3]
        assert sorted(after.path(i).name for i in range(4)) == ["0_A.png", "1_a.jpg", "2_a.jpg", "a.jpg"]


def test_overlapping_splits_share_their_images(tmp_path: Path) -> None:
    src = write_voc(tmp_path / "src", lists={"train": "a", "val": "b", "trainval": "b\na"})
    for to, folder in writers.IMAGE_FOLDERS.items():
        convert_dataset(src, tmp_path / to, to)
        assert sorted(f.name for f in (tmp_path / to / folder).iterdir()) == ["a.jpg", "b.jpg"]
        assert [r.path.name for r in read_dataset(tmp_path / to, "trainval")] == ["b.jpg", "a.jpg"]


def test_one_image_with_two_annotations_is_refused(tmp_path: Path) -> None:
    src = write_coco(tmp_path / "src")
    data = coco_dict()
    data["annotations"].pop()
    (src / "annotations" / "val.json").write_text(json.dumps(data))
    convert_dataset(src, tmp_path / "coco", "coco")
    for to in ("voc", "yolo"):
        with pytest.raises(InputError, match="one annotation file per image"):
            convert_dataset(src, tmp_path / to, to)
        assert not (tmp_path / to).exists()
        convert_dataset(src, tmp_path / to, to, splits=["train"])


def test_links_share_the_file(tmp_path: Path) -> None:
    src = write_voc(tmp_path / "src")
    convert_dataset(src, tmp_path / "link", "yolo", link=True)
    convert_dataset(src, tmp_path / "copy", "yolo")
    assert os.path.samefile(src / "JPEGImages" / "a.jpg", tmp_path / "link" / "images" / "a.jpg")
    assert not os.path.samefile(src / "JPEGImages" / "a.jpg", tmp_path / "copy" / "images" / "a.jpg")


def test_chosen_splits(tmp_path: Path) -> None:
    src = write_voc(tmp_path / "src")
    assert set(convert_dataset(src, tmp_path / "dst", "coco", splits=["val"])) == {"val"}
    with pytest.raises(InputError, match="no split 'test'"):
        convert_dataset(src, tmp_path / "other", "coco", splits=["test"])


def test_split_names_stay_inside(tmp_path: Path) -> None:
    src = write_yolo(tmp_path / "src", yaml="../out: images/val\ntrain: images/train\nnames: [dog]")
    assert set(convert_dataset(src, tmp_path / "dst", "yolo")) == {"train"}


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    src = write_voc(tmp_path / "src")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    for dst in (tmp_path / "full", src, tmp_path / "full" / "mine"):
        with pytest.raises(InputError, match="nothing is overwritten"):
            convert_dataset(src, dst, "coco")
    assert (tmp_path / "full" / "mine").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    convert_dataset(src, tmp_path / "empty", "coco")
    assert len(read_dataset(tmp_path / "empty", "train")) == 1


def refused(src: Path, to: str, text: str) -> None:
    before = sorted(src.parent.iterdir())
    with pytest.raises(InputError, match=text):
        convert_dataset(src, src.parent / "dst", to)
    assert sorted(src.parent.iterdir()) == before  # no partial output is left


def test_unknown_format(tmp_path: Path) -> None:
    refused(write_voc(tmp_path / "src"), "coca", "unknown dataset format 'coca': did you mean 'coco'")


def test_missing_image(tmp_path: Path) -> None:
    src = write_coco(tmp_path / "src")
    (src / "train2017" / "a.jpg").unlink()
    refused(src, "voc", r"a\.jpg, which does not exist")


def test_wrong_sizes_cannot_become_yolo(tmp_path: Path) -> None:
    src = write_coco(tmp_path / "src")
    image(src / "train2017" / "a.jpg", 10, 20)
    refused(src, "yolo", "is 10x20 pixels .* say 20x10")


def test_splits_of_other_classes(tmp_path: Path) -> None:
    src = write_coco(tmp_path / "src")
    data = coco_dict()
    data["categories"][0]["name"] = "wolf"
    write_coco(src, data, "val")
    refused(src, "coco", r"'train' and 'val' of .* have different classes: 'dog' \(id 9\) against 'wolf' \(id 9\)")


@pytest.mark.parametrize("names", [("a\nb", "c"), (" a", "b"), ("a", "a")])
def test_names_that_voc_cannot_hold(tmp_path: Path, names: tuple[str, str]) -> None:
    data = coco_dict()
    for category, name in zip(data["categories"], names, strict=True):
        category["name"] = name
    src = write_coco(tmp_path / "src", data)
    refused(src, "voc", "the class name")
    convert_dataset(src, tmp_path / "yolo", "yolo")
    assert read_dataset(tmp_path / "yolo", "train").names == read_dataset(src, "train").names


@pytest.mark.parametrize("name", ["null", "no", "7", "a: b", "# x", "é ü", "<&>", "'"])
def test_odd_names_survive(tmp_path: Path, name: str) -> None:
    data = coco_dict()
    data["categories"][0]["name"] = name
    src = write_coco(tmp_path / "src", data)
    for to in FORMATS:
        convert_dataset(src, tmp_path / to, to)
        assert read_dataset(tmp_path / to, "train").names == ("cat", name)


def test_odd_file_names_survive(tmp_path: Path) -> None:
    names = ["a b.jpg", " c.jpg", "d 1.jpg", "é.jpg", "x<&>.jpg", "two\nlines.jpg", ".hidden.jpg"]
    data = coco_dict()
    data["images"] = [{"id": i, "file_name": name, "width": 40, "height": 30} for i, name in enumerate(names)]
    data["annotations"] = [{"image_id": i, "category_id": 2, "bbox": [i, i, 5, 5]} for i in range(len(names))]
    src = write_coco(tmp_path / "src", data)
    for name in names:
        image(src / "train2017" / name)
    for to in FORMATS:
        report = convert_dataset(src, tmp_path / to, to)
        assert report["train"][writers.RENAMED] == 3
        after = read_dataset(tmp_path / to, "train")
        assert [round(r.boxes[0, 0]) for r in after] == list(range(len(names)))
        assert all(after.path(i).is_file() for i in range(len(after)))


def test_background_images_survive(tmp_path: Path) -> None:
    src = write_voc(tmp_path / "src", {"a": xml(), "b": xml(("dog", 1, 1, 2, 2, 0), name="b")}, {"train": "a\nb"})
    for to in FORMATS:
        convert_dataset(src, tmp_path / to, to)
        assert [len(r.boxes) for r in read_dataset(tmp_path / to, "train")] == [0, 1]


@pytest.mark.slow
def test_real_data_survives_a_round_trip(shared: Path, tmp_path: Path) -> None:
    for name in ("bccd", "coco_tiny"):
        src = previous = shared / "data" / name
        for to in ("yolo", "voc", "coco"):
            convert_dataset(previous, tmp_path / f"{name}_{to}", to, splits=["val"])
            previous = tmp_path / f"{name}_{to}"
            assert_same(read_dataset(src, "val"), read_dataset(previous, "val"), flags=False)
