"""The YOLO reader: valid datasets, and the messages for malformed ones."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fusedet.data import annotation_cleaning
from fusedet.data.readers.yolo import get_label_path, list_yolo_splits, load_data_yaml, read_yolo
from fusedet.errors import InputError
from tiny import image, write_yolo


def test_boxes_in_pixels(tmp_path: Path) -> None:
    dataset = read_yolo(write_yolo(tmp_path, "1 0.5 0.5 0.5 0.4\n0 0.25 0.1 0.5 0.2\n"), "train")
    assert dataset.names == ("dog", "cat")
    assert dataset.category_ids == (0, 1)
    assert dataset.dataset_format == "yolo"
    (a,) = dataset
    np.testing.assert_allclose(a.boxes, [[10, 9, 30, 21], [0, 0, 20, 6]], atol=1e-12)
    assert a.labels.tolist() == [1, 0]
    assert (a.image_id, a.height, a.width) == (1, 30, 40)
    assert a.path == tmp_path / "images" / "train" / "a.jpg"
    assert not dataset.problems


def test_polygons_give_box_and_segmentation(tmp_path: Path) -> None:
    dataset = read_yolo(write_yolo(tmp_path, "0 0.25 0.5 0.5 0.1 0.75 0.9\n1 0.5 0.5 0.5 0.5\n"), "train")
    (a,) = dataset
    np.testing.assert_allclose(a.boxes[0], [10, 3, 30, 27])
    np.testing.assert_allclose(a.segmentations[0], [[10, 15, 20, 3, 30, 27]])
    assert a.segmentations[1] is None


@pytest.mark.parametrize(
    "text", ["\ufeff0 0.5 0.5 1 1", "\r\n0 .5 .5 1 1  \r\n\r\n", "0.0\t0.5  0.5 1e0 1\n   \n", "0 0.5 0.5 1 1"]
)
def test_blanks_and_byte_order_mark(tmp_path: Path, text: str) -> None:
    assert read_yolo(write_yolo(tmp_path, text), "train")[0].boxes.tolist() == [[0, 0, 40, 30]]


def test_images_without_labels_are_background(tmp_path: Path) -> None:
    file = write_yolo(tmp_path, "")
    assert read_yolo(file, "train").problems == {}
    val = read_yolo(file, "val")
    assert len(val) == 1
    assert len(val.labels) == 0
    assert val.problems == {annotation_cleaning.NO_LABELS: 1}


def test_sizes_are_of_the_rotated_image(tmp_path: Path) -> None:
    file = write_yolo(tmp_path, "0 0.5 0.5 1 1")
    exif = Image.Exif()
    exif[0x0112] = 6
    image(tmp_path / "images" / "train" / "a.jpg", 40, 30, exif=exif)
    dataset = read_yolo(file, "train")
    assert dataset.sizes.tolist() == [[40, 30]]
    assert dataset[0].boxes.tolist() == [[0, 0, 30, 40]]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("-1 0.5 0.5 0.5 0.5", "class -1 is not among"),
        ("0.5 0.5 0.5 0.5 0.5", "the class must be a whole number"),
        ("nan 0.5 0.5 0.5 0.5", "the class must be a whole number"),
        ("0 0.5 0.5 0.5 0.5 0.9", "6 values, but a line is"),
        ("0 0.5 0.5 0.5 0.5 0.9 0.1 0.1", "8 values, but a line is"),
        ("0", "1 values, but a line is"),
        ("0,0.5,0.5,0.5,0.5", "not a number"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, text: str) -> None:
    with pytest.raises(InputError, match=re.escape(text)) as error:
        read_yolo(write_yolo(tmp_path, f"0 0.5 0.5 1 1\n{line}\n"), "train")
    assert f"{tmp_path / 'labels' / 'train' / 'a.txt'}, line 2" in str(error.value)


@pytest.mark.parametrize(
    ("image_path", "label"),
    [
        ("d/images/val/a.jpg", "d/labels/val/a.txt"),
        ("d/train/images/a.b.png", "d/train/labels/a.b.txt"),
        ("images/x/images/a.jpg", "images/x/labels/a.txt"),
        ("d/obj/a.jpg", "d/obj/a.txt"),
        ("d/obj/images.jpg", "d/obj/images.txt"),
    ],
)
def test_label_paths(image_path: str, label: str) -> None:
    assert get_label_path(image_path) == label


def test_labels_beside_the_images(tmp_path: Path) -> None:
    file = write_yolo(tmp_path, yaml="train: obj\nnames: [dog]")
    image(tmp_path / "obj" / "sub" / "c.PNG")
    (tmp_path / "obj" / "sub" / "c.txt").write_text("0 0.5 0.5 1 1")
    dataset = read_yolo(file, "train")
    assert dataset.path(0).name == "c.PNG"
    assert len(dataset.labels) == 1


@pytest.mark.parametrize(
    ("names", "expected", "ids"),
    [
        ("[a, b]", ("a", "b"), (0, 1)),
        ("\n- a\n- 'no'\n- no", ("a", "no", "no"), (0, 1, 2)),
        ("{1: b, 0: a}", ("a", "b"), (0, 1)),
        ("\n  0: a\n  5: 12", ("a", "12"), (0, 5)),
    ],
)
def test_names(tmp_path: Path, names: str, expected: tuple[str, ...], ids: tuple[int, ...]) -> None:
    dataset = read_yolo(write_yolo(tmp_path, yaml=f"train: images/train\nnames: {names}"), "train")
    assert dataset.names == expected
    assert dataset.category_ids == ids


@pytest.mark.parametrize(
    "entry",
    [
        "images/train",
        "./images/train/",
        "../images/train",  # as some exports write it
        "[images/train]",
        "list.txt",
        "lists/here.txt",
        "{root}/images/train",
        "absolute.txt",
    ],
)
def test_entries_of_a_split(tmp_path: Path, entry: str) -> None:
    (tmp_path / "list.txt").write_text("./images/train/a.jpg\r\n\r\n")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "here.txt").write_text("images/train/a.jpg\n")
    (tmp_path / "absolute.txt").write_text(f"{tmp_path}/images/train/a.jpg\n")
    file = write_yolo(tmp_path, yaml=f"train: {entry.format(root=tmp_path)}\nnames: [dog]")
    dataset = read_yolo(file, "train")
    assert [p.name for p in map(dataset.path, range(len(dataset)))] == ["a.jpg"]
    assert len(dataset.labels) == 1


def test_several_folders_and_repeated_images(tmp_path: Path) -> None:
    file = write_yolo(tmp_path, yaml="train: [images/train, images/val, images]\nval:\ntest: null\nnames: [dog]")
    dataset = read_yolo(file, "train")
    assert len(dataset) == 2
    assert dataset.problems[annotation_cleaning.LISTED_TWICE] == 2
    assert set(list_yolo_splits(load_data_yaml(file))) == {"train"}


@pytest.mark.parametrize("key", ["val", "valid", "validation"])
def test_aliases(tmp_path: Path, key: str) -> None:
    file = write_yolo(tmp_path, yaml=f"{key}: images/val\nnames: [dog]")
    assert all(len(read_yolo(file, split)) == 1 for split in ("val", "valid", "validation"))


def test_path_is_relative_to_the_yaml(tmp_path: Path) -> None:
    write_yolo(tmp_path / "data")
    file = tmp_path / "set.yaml"
    file.write_text("path: data\ntrain: images/train\nnames: [dog]")
    assert len(read_yolo(file, "train")) == 1


@pytest.mark.parametrize(
    ("yaml", "text"),
    [
        ("train: [", "not valid YAML"),
        ('train: "\\UFFFFFFFF"', "not valid YAML"),
        ("- a", "not a YOLO data file"),
        ("train: images/train", "not a YOLO data file"),
        ("train: images/train\nnames: dog", "'names' must list"),
        ("train: images/train\nnames: []", "'names' must list"),
        ("train: images/train\nnames: [[a]]", "'names' must be a list"),
        ("train: images/train\nnames: &a [*a]", "not valid YAML"),
        ("train: images/train\nnames: {a: b}", "'names' must be a list"),
        ("train: images/train\nnames: {0: b, 00: c}", "gives class 0 twice"),
        ("val: images/val\nnames: [a]", "no split 'train': it has val"),
        ("train: nowhere\nnames: [a]", "does not exist: it must be a folder of images or a .txt list"),
        ("train: labels\nnames: [a]", "has no images"),
        ("train: up.txt\nnames: [a]", "outside the data folder"),
        ("train: gone.txt\nnames: [a]", "gone.jpg does not exist"),
        ("path: nowhere\ntrain: images\nnames: [a]", "its 'path' nowhere does not exist"),
        ("path: [x]\ntrain: images\nnames: [a]", "'path' must be the data folder"),
        (f"train: {'x' * 300}\nnames: [a]", "does not exist: it must be a folder of images or a .txt list"),
    ],
)
def test_malformed_yaml_is_refused(tmp_path: Path, yaml: str, text: str) -> None:
    (tmp_path / "up.txt").write_text("../../x.jpg")
    (tmp_path / "gone.txt").write_text("gone.jpg")
    with pytest.raises(InputError, match=re.escape(text)):
        read_yolo(write_yolo(tmp_path, yaml=yaml), "train")


def test_unreadable_images_are_counted_and_named(tmp_path: Path) -> None:
    file = write_yolo(tmp_path)
    (tmp_path / "images" / "train" / "b.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"b\.jpg"):
        read_yolo(file, "train")
    (tmp_path / "images" / "train" / "a.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"^2 of 2 images cannot be read, the first: .*a\.jpg"):
        read_yolo(file, "train")
