"""The VOC reader: valid folders, and the messages for malformed ones."""

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fusedet.data.readers.voc import list_voc_splits, read_voc
from fusedet.errors import InputError
from tiny import image, write_voc, xml


def test_boxes_count_from_zero_and_difficult_is_ignored(tmp_path: Path) -> None:
    dataset = read_voc(write_voc(tmp_path), "train")
    (a,) = dataset
    assert dataset.names == ("bird", "cat", "dog")  # over all splits, sorted
    assert dataset.category_ids == (1, 2, 3)
    assert dataset.dataset_format == "voc"
    assert a.boxes.tolist() == [[0, 0, 10, 20], [4.5, 5.5, 8.5, 9.5]]
    assert a.labels.tolist() == [2, 1]
    assert a.ignore.tolist() == [False, True]
    assert a.area.tolist() == [200, 16]
    assert (a.image_id, a.height, a.width) == (1, 30, 40)
    assert a.path == tmp_path / "JPEGImages" / "a.jpg"
    assert not dataset.problems


def test_splits_agree_in_their_classes(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    assert read_voc(root, "train").names == read_voc(root, "val").names


@pytest.mark.parametrize("name", ["labels.txt", "classes.txt"])
def test_class_list_sets_the_order(tmp_path: Path, name: str) -> None:
    root = write_voc(tmp_path)
    (root / name).write_text("__ignore__\r\ndog\r\nbird\r\n\r\ncat\r\nfish\r\n")
    dataset = read_voc(root, "train")
    assert dataset.names == ("dog", "bird", "cat", "fish")
    assert dataset[0].labels.tolist() == [0, 2]


def test_class_missing_from_the_list(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    (root / "labels.txt").write_text("dogs\nbird\ncat\n")
    with pytest.raises(InputError, match=r"a\.xml: unknown class 'dog': did you mean 'dogs'"):
        read_voc(root, "train")


def test_list_lines_may_hold_flags_extensions_and_spaces(tmp_path: Path) -> None:
    names = ["a", "b", "c d", "e 1"]
    files = {name: xml(("dog", 1, 1, 2, 2, 0), name=name) for name in names}
    root = write_voc(tmp_path, files, {"train": "\ufeffa  1\r\nb.jpg -1\n\n c d \ne 1\n"})
    assert [r.path.stem for r in read_voc(root, "train")] == names


def test_lists_per_class_are_not_splits(tmp_path: Path) -> None:
    root = write_voc(
        tmp_path, lists={"train": "a", "val": "b", "dog_train": "a 1", "dog_val": "b -1", "trainval": "a\nb"}
    )
    assert set(list_voc_splits(root)) == {"train", "val", "trainval"}
    assert len(read_voc(root, "trainval")) == 2


def test_names_and_list_files_as_splits(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    (tmp_path / "mine.txt").write_text("b\n")
    assert [r.path.name for r in read_voc(root, ["b", "a"])] == ["b.jpg", "a.jpg"]
    assert [r.path.name for r in read_voc(root, tmp_path / "mine.txt")] == ["b.jpg"]


def test_other_extensions_are_found(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    (root / "JPEGImages" / "a.jpg").unlink()
    image(root / "JPEGImages" / "a.PNG")
    assert read_voc(root, "train").path(0).name == "a.PNG"


@pytest.mark.parametrize(("width", "height"), [(0, 0), ("", ""), (0, 30)])
def test_missing_size_comes_from_the_rotated_image(tmp_path: Path, width: Any, height: Any) -> None:
    root = write_voc(tmp_path, {"a": xml(("dog", 1, 1, 2, 2, 0), width=width, height=height)}, {"train": "a"})
    exif = Image.Exif()
    exif[0x0112] = 6
    image(root / "JPEGImages" / "a.jpg", 40, 30, exif=exif)
    assert read_voc(root, "train").sizes.tolist() == [[40, 30]]


def test_floats_in_sizes(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"a": xml(("dog", 1, 1, 2, 2, 0), width="40.0", height="30.0")}, {"train": "a"})
    assert read_voc(root, "train").sizes.tolist() == [[30, 40]]


def test_folder_per_split(tmp_path: Path) -> None:
    for split, name in (("train", "dog"), ("valid", "cat")):
        image(tmp_path / split / f"{split}_1.rf.0a.jpg")
        (tmp_path / split / f"{split}_1.rf.0a.xml").write_text(xml((name, 1, 1, 5, 5, 0)))
    assert set(list_voc_splits(tmp_path)) == {"train", "val"}
    dataset = read_voc(tmp_path, "val")
    assert dataset.names == ("cat", "dog")
    assert dataset.path(0) == tmp_path / "valid" / "valid_1.rf.0a.jpg"


GOOD = xml(("dog", 1, 1, 10, 20, 0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("<difficult>0", "<difficult>so"), "<difficult> must be a number"),
        (GOOD.replace("<width>40", "<width>wide"), "<width> must be a number"),
        ('<?xml version="1.0" encoding="klingon"?>' + GOOD, "not valid xml"),
    ],
)
def test_bad_annotations_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_voc(write_voc(tmp_path, {"a": text}, {"train": "a"}), "train")
    assert str(tmp_path / "Annotations" / "a.xml") in str(error.value)


def test_entity_bomb_in_utf16_is_refused(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    bomb = '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a [<!ENTITY b "cc"><!ENTITY d "&b;&b;">]>' + GOOD
    (root / "Annotations" / "a.xml").write_bytes(bomb.encode("utf-16"))
    with pytest.raises(InputError, match="DOCTYPE"):
        read_voc(root, "train")


@pytest.mark.parametrize("missing", ["Annotations", "JPEGImages"])
def test_missing_folder_is_named(tmp_path: Path, missing: str) -> None:
    root = write_voc(tmp_path)
    (root / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"folder {missing} is missing"):
        read_voc(root, "train")


def test_missing_files_are_refused(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    with pytest.raises(InputError, match=r"no split 'test': it has train, val"):
        read_voc(root, "test")
    for file in (root / "JPEGImages").iterdir():
        file.unlink()
    with pytest.raises(InputError, match=r"none of the first images .*JPEGImages"):
        read_voc(root, ["a"])


def test_no_lists(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    for file in (root / "ImageSets" / "Main").iterdir():
        file.unlink()
    assert list_voc_splits(root) == {"train": str(root / "Annotations")}
    assert [r.path.name for r in read_voc(root, "train")] == ["a.jpg", "b.jpg"]


def test_no_annotations_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"labels\.txt"):
        read_voc(write_voc(tmp_path, {"a": xml()}, {"train": "a"}), "train")


def test_images_without_annotations_are_kept(tmp_path: Path) -> None:
    dataset = read_voc(write_voc(tmp_path, {"a": xml(), "b": GOOD}, {"train": "a\nb"}), "train")
    assert [len(r.boxes) for r in dataset] == [0, 1]


def test_real_data(shared: Path) -> None:
    root = shared / "data" / "bccd"
    counts = {split: read_voc(root, split) for split in ("train", "val", "test")}
    assert {split: len(r) for split, r in counts.items()} == {"train": 205, "val": 87, "test": 72}
    assert all(r.names == ("Platelets", "RBC", "WBC") and not r.problems for r in counts.values())
    assert sum(len(r.labels) for r in counts.values()) == sum(
        f.read_text().count("<object>") for f in (root / "Annotations").iterdir()
    )
