"""Layouts as annotation tools write them: the same small dataset in each is read with the same boxes and classes."""

import contextlib
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fusedet.data import annotation_cleaning
from fusedet.data.readers.auto import detect_format, list_splits, read_dataset
from fusedet.errors import InputError
from layouts import (
    CLASSES,
    IMAGES,
    LAYOUTS,
    coco,
    contents,
    cvat,
    labelme,
    put_images,
    put_labels,
    put_xml,
    via,
    write_json,
)
from tiny import image, write_coco, write_voc, write_yolo, xml


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_data(tmp_path: Path, layout: str) -> None:
    dataset_format, write = LAYOUTS[layout]
    write(tmp_path)
    assert detect_format(tmp_path) == dataset_format
    assert len(list_splits(tmp_path)) == 1
    dataset = read_dataset(tmp_path, "train")
    assert dataset.dataset_format == dataset_format
    assert list(dataset.names) == CLASSES
    assert contents(dataset) == IMAGES
    assert not dataset.problems
    with pytest.raises(InputError, match=r"has no split 'val': it has \w+; data\.val=0\.2 holds out a fifth of it"):
        read_dataset(tmp_path, "val")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_of_the_system_are_never_data(tmp_path: Path, layout: str) -> None:
    LAYOUTS[layout][1](tmp_path)
    before = read_dataset(tmp_path, "train")
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    for file in files:
        (file.parent / f"._{file.name}").write_bytes(b"\0\x05\x16\x07\0\2\0\0Mac OS X")
    for folder in {file.parent for file in files}:
        for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
            (folder / name).write_bytes(b"\0\1\2")
        for name in ("__MACOSX", "@eaDir", ".ipynb_checkpoints"):
            shutil.copytree(
                folder, tmp_path.parent / "copy", ignore=shutil.ignore_patterns("__MACOSX", "@eaDir", ".ipynb*")
            )
            shutil.move(tmp_path.parent / "copy", folder / name)
    after = read_dataset(tmp_path, "train")
    assert after.fingerprint() == before.fingerprint()
    assert after.problems == before.problems


@pytest.mark.parametrize(
    "write", [write_coco, write_voc, lambda root: write_yolo(root).parent], ids=["coco", "voc", "yolo"]
)
def test_files_of_the_system_in_the_usual_folders(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    root = write(tmp_path)
    before = list_splits(root), read_dataset(root, "train").fingerprint()
    for file in [file for file in root.rglob("*") if file.is_file()]:
        (file.parent / f"._{file.name}").write_bytes(b"\0\x05\x16\x07")
    assert (list_splits(root), read_dataset(root, "train").fingerprint()) == before


@pytest.mark.parametrize("folders", ["{split}", "annotations/{split}", "{split}/xml"])
def test_folders_of_splits(tmp_path: Path, folders: str) -> None:
    for split, name in (("train", "a"), ("valid", "b"), ("Test", "c")):
        folder = tmp_path / folders.format(split=split)
        folder.mkdir(parents=True)
        image(tmp_path / "images" / split / f"{name}.png")
        (folder / f"{name}.xml").write_text(xml(("dog", 1, 1, 5, 5, 0), name=name))
    assert set(list_splits(tmp_path)) == {"train", "val", "test"}
    assert [r.path.name for r in read_dataset(tmp_path, "val")] == ["b.png"]
    assert [r.path.name for r in read_dataset(tmp_path, "validation")] == ["b.png"]


def test_equal_names_in_the_folders_of_splits(tmp_path: Path) -> None:
    for split, width in (("train", 10), ("val", 20)):
        image(tmp_path / "images" / split / "1.jpg", width, 10)
        (tmp_path / "labels" / split).mkdir(parents=True)
        (tmp_path / "labels" / split / "1.xml").write_text(xml(("dog", 1, 1, 5, 5, 0), width=width, height=10))
    assert [read_dataset(tmp_path, split).path(0).parent.name for split in ("train", "val")] == ["train", "val"]
    (tmp_path / "labels" / "train" / "1.xml").rename(tmp_path / "1.xml")
    shutil.rmtree(tmp_path / "labels")
    with pytest.raises(InputError, match=r"1\.xml belongs to an image '1', but there are several"):
        read_dataset(tmp_path, "train")


def test_a_folder_of_any_name_can_be_a_split(tmp_path: Path) -> None:
    for fold, name in (("fold1", "a"), ("fold2", "b")):
        image(tmp_path / fold / f"{name}.jpg")
        (tmp_path / fold / f"{name}.xml").write_text(xml(("dog", 1, 1, 5, 5, 0), name=name))
    assert len(read_dataset(tmp_path, "train")) == 2
    assert [r.path.stem for r in read_dataset(tmp_path, "fold2")] == ["b"]


def test_the_xml_decides_between_images_of_one_stem(tmp_path: Path) -> None:
    image(tmp_path / "a.jpg", 40, 30)
    image(tmp_path / "a.png", 20, 10)
    (tmp_path / "a.xml").write_text(xml(("dog", 1, 1, 5, 5, 0), width=20, height=10).replace("a.jpg", "a.png"))
    assert read_dataset(tmp_path, "train").path(0).name == "a.png"


def test_renamed_images_are_found_by_the_name_in_the_xml(tmp_path: Path) -> None:
    put_images(tmp_path / "images")
    put_xml(tmp_path / "xml", written=lambda name: name)
    for file in sorted((tmp_path / "xml").iterdir()):
        file.rename(file.with_name(f"label_{file.name}"))
    assert contents(read_dataset(tmp_path, "train")) == IMAGES


def test_files_without_a_partner_are_counted(tmp_path: Path) -> None:
    put_images(tmp_path / "images")
    put_xml(tmp_path / "annotations")
    image(tmp_path / "images" / "not_annotated.jpg")
    (tmp_path / "images" / "d.jpg").unlink()
    dataset = read_dataset(tmp_path, "train")
    assert len(dataset) == 3
    assert dataset.problems == {annotation_cleaning.NO_IMAGE_FILE: 1, annotation_cleaning.NO_ANNOTATION_FILE: 1}
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(InputError, match="none of the images of its 4 annotation files is there"):
        read_dataset(tmp_path, "train")


def test_two_annotations_of_one_image_are_refused(tmp_path: Path) -> None:
    put_images(tmp_path)
    put_xml(tmp_path / "one")
    put_xml(tmp_path / "two")
    with pytest.raises(InputError, match=r"one/a\.xml and .*two/a\.xml both annotate the image .*a\.jpg"):
        read_dataset(tmp_path, "train")


def test_lists_per_class_are_one_split(tmp_path: Path) -> None:
    lists = {
        "dog_train": "a.jpg 1\nb.jpg -1",
        "cat_train": "a.jpg -1\nb.jpg 1",
        "dog_val": "c.jpg 1",
        "cat_val": "c.jpg -1",
    }
    root = write_voc(tmp_path, {name: xml(("dog", 1, 1, 5, 5, 0), name=name) for name in "abc"}, lists)
    assert set(list_splits(root)) == {"train", "val"}
    assert [r.path.stem for r in read_dataset(root, "train")] == ["a", "b"]
    assert [r.path.stem for r in read_dataset(root, "val")] == ["c"]
    assert not read_dataset(root, "train").problems


def test_cvat_default_list_is_train(tmp_path: Path) -> None:
    root = write_voc(tmp_path, lists={"default": "a\nb\n"})
    assert set(list_splits(root)) == {"train"}
    assert len(read_dataset(root, "train")) == len(read_dataset(root, "default")) == 2
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    assert set(list_splits(root)) == {"train", "default"}
    assert len(read_dataset(root, "train")) == 1


# -- shapes, by hand


def test_labelme_shapes(tmp_path: Path) -> None:
    image(tmp_path / "a.jpg", 100, 80)
    shapes = [
        {"label": "circle", "shape_type": "circle", "points": [[50, 40], [53, 44]]},  # radius 5
        {"label": "old", "points": [[1, 1], [9, 2], [4, 7]]},
        {"label": "four", "shape_type": "rectangle", "points": [[1, 2], [11, 2], [11, 22], [1, 22]]},
        {"label": "group", "shape_type": "polygon", "group_id": 1, "points": [[0, 0], [4, 0], [4, 4]]},
        {"label": "group", "shape_type": "polygon", "group_id": 1, "points": [[10, 10], [14, 10], [14, 14]]},
        {"label": "line", "shape_type": "line", "points": [[0, 0], [4, 0]]},
        {"label": "point", "shape_type": "point", "points": [[0, 0]]},
    ]
    write_json(tmp_path / "a.json", {"shapes": shapes, "imagePath": "a.jpg", "imageHeight": None, "imageWidth": None})
    dataset = read_dataset(tmp_path, "train")
    (a,) = dataset
    boxes = {dataset.names[k]: box for k, box in zip(a.labels, a.boxes.tolist(), strict=True)}
    assert boxes == {"circle": [45, 35, 55, 45], "old": [1, 1, 9, 7], "four": [1, 2, 11, 22], "group": [0, 0, 14, 14]}
    assert (a.height, a.width) == (80, 100)
    assert a.segmentations[3] == [
        [0, 0, 4, 0, 4, 4],
        [10, 10, 14, 10, 14, 14],
    ]
    assert dataset.problems == {annotation_cleaning.NO_REGION: 2}


def test_cvat_shapes(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.jpg", 100, 80)
    shapes = (
        '<box label="turned" xtl="20" ytl="30" xbr="40" ybr="40" rotation="90"/>'
        '<ellipse label="ellipse" cx="50" cy="40" rx="20" ry="10"/>'
        '<mask label="mask" rle="1, 2" left="3" top="4" width="10" height="20"/>'
        '<polyline label="line" points="1,2;3,4"/><points label="points" points="1,2"/><tag label="tag"/>'
    )
    (tmp_path / "annotations.xml").write_text(
        f'<annotations><image name="a.jpg" width="100" height="80">{shapes}</image></annotations>'
    )
    dataset = read_dataset(tmp_path, "train")
    boxes = {
        dataset.names[k]: box for k, box in zip(dataset[0].labels, np.round(dataset[0].boxes, 9).tolist(), strict=True)
    }
    assert boxes == {"turned": [25, 25, 35, 45], "ellipse": [30, 30, 70, 50], "mask": [3, 4, 13, 24]}
    assert dataset.problems == {annotation_cleaning.NO_REGION: 2}


def test_a_file_per_split(tmp_path: Path) -> None:
    for split in ("train", "val"):
        put_images(tmp_path / "images" / split)
        (tmp_path / f"{split}.xml").write_text(cvat(f"{split}/{{}}.jpg".format))
    assert set(list_splits(tmp_path)) == {"train", "val"}
    assert {r.path.parent.name for r in read_dataset(tmp_path, "val")} == {"val"}


def test_other_files_in_annotations_are_no_split(tmp_path: Path) -> None:
    put_images(tmp_path / "images")
    write_json(tmp_path / "annotations" / "instances_train.json", coco())
    write_json(tmp_path / "annotations" / "bbox_labels_600_hierarchy.json", {"LabelName": "/m/0bl9f"})
    assert set(list_splits(tmp_path)) == {"train"}
    (tmp_path / "annotations" / "instances_train.json").unlink()
    with pytest.raises(InputError, match=r"hierarchy\.json is not COCO, it lacks 'images'"):
        read_dataset(tmp_path, "train")


def test_cvat_subsets_are_splits(tmp_path: Path) -> None:
    image(tmp_path / "images" / "Train" / "a.jpg")
    image(tmp_path / "images" / "Validation" / "a.jpg")
    box = '<box label="dog" xtl="1" ytl="2" xbr="3" ybr="4"/>'
    rows = "".join(
        f'<image name="a.jpg" subset="{subset}" width="40" height="30">{box}</image>'
        for subset in ("Train", "Validation")
    )
    (tmp_path / "annotations.xml").write_text(f"<annotations>{rows}</annotations>")
    assert set(list_splits(tmp_path)) == {"train", "val"}
    assert read_dataset(tmp_path, "val").path(0).parent.name == "Validation"
    assert read_dataset(tmp_path / "annotations.xml", "train").path(0).parent.name == "Train"


def test_cvat_images_of_one_name_in_several_folders(tmp_path: Path) -> None:
    for folder, width in (("day", 40), ("night", 20)):
        image(tmp_path / "images" / folder / "1.jpg", width, 30)
    rows = "".join(
        f'<image name="{folder}/1.jpg" width="{width}" height="30"/>' for folder, width in (("night", 20), ("day", 40))
    )
    labels = "<meta><task><labels><label><name>dog</name></label></labels></task></meta>"
    for prefix in ("", "old/"):
        text = f"<annotations>{labels}{rows}</annotations>".replace('name="', f'name="{prefix}')
        (tmp_path / "annotations.xml").write_text(text)
        assert [r.path.parent.name for r in read_dataset(tmp_path, "train")] == ["night", "day"]


def test_via_shapes_and_attributes(tmp_path: Path) -> None:
    image(tmp_path / "a.jpg", 100, 80)

    def write(*regions: tuple[dict[str, Any], dict[str, Any]]) -> None:
        rows = [{"shape_attributes": shape, "region_attributes": attributes} for shape, attributes in regions]
        mapping = {str(i): row for i, row in enumerate(rows)}  # as version 1 writes them
        write_json(tmp_path / "via.json", {"a.jpg9": {"filename": "a.jpg", "size": 9, "regions": mapping}})

    circle = {"name": "circle", "cx": 50, "cy": 40, "r": 10}
    turned = {"name": "ellipse", "cx": 50, "cy": 40, "rx": 20, "ry": 10, "theta": np.pi / 2}
    write((circle, {"name": "ball", "color": "red"}), (turned, {"name": {"egg": True, "ball": False}}))
    dataset = read_dataset(tmp_path, "train")
    assert dataset.names == ("ball", "egg")
    np.testing.assert_allclose(dataset[0].boxes, [[40, 30, 60, 50], [40, 20, 60, 60]], atol=1e-9)
    write((circle, {}))
    assert read_dataset(tmp_path, "train").names == ("object",)
    write((circle, {"color": "red", "size": "big"}))
    with pytest.raises(
        InputError, match="the regions have the attributes color, size, and none is called label or class"
    ):
        read_dataset(tmp_path, "train")
    write(({"name": "point", "cx": 1, "cy": 2}, {"name": "ball"}), (circle, {"name": "ball"}))
    assert read_dataset(tmp_path, "train").problems == {annotation_cleaning.NO_REGION: 1}


def test_via_file_per_split(tmp_path: Path) -> None:
    for split in ("train", "val"):
        put_images(tmp_path / split)
        write_json(tmp_path / split / "via_region_data.json", via())
    assert set(list_splits(tmp_path)) == {"train", "val"}
    assert {r.path.parent.name for r in read_dataset(tmp_path, "val")} == {"val"}
    assert contents(read_dataset(tmp_path, "val")) == IMAGES
    shutil.rmtree(tmp_path / "val")
    content = via()
    for row in content.values():
        row["filename"] = f"absent_{row['filename']}"
    write_json(tmp_path / "val" / "via_region_data.json", content)
    assert list_splits(tmp_path) == {"train": str(tmp_path / "train")}
    with pytest.raises(InputError, match="has no split 'val': it has train"):
        read_dataset(tmp_path, "val")


def test_imagefolder_names_and_splits(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        image(tmp_path / split / "1.png", 20, 10)
    lines = [
        {"file_name": f"{split}/1.png", "objects": {"bbox": [[1, 2, 3, 4], [0, 0, 5, 5]], "category": [10, 2]}}
        for split in ("train", "validation")
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    dataset = read_dataset(tmp_path, "val")
    assert dataset.names == ("2", "10")  # numbers without names, in their order
    assert dataset[0].boxes.tolist() == [[1, 2, 4, 6], [0, 0, 5, 5]]
    assert dataset[0].labels.tolist() == [1, 0]
    rows = {"file_name": "train/1.png", "objects": [{"bbox": [1, 2, 3, 4], "category": "owl"}]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(rows))
    assert read_dataset(tmp_path, "train").names == ("owl",)


# -- COCO's dialects


def test_coco_without_optional_keys(tmp_path: Path) -> None:
    content = coco()
    for row in content["annotations"]:
        row |= dict.fromkeys(("iscrowd", "area", "segmentation", "id", "ignore"))
    for row in content["images"]:
        row |= dict.fromkeys(("width", "height", "license", "date_captured"))
    content |= {"info": None, "licenses": None}
    write_json(tmp_path / "train.json", content)
    put_images(tmp_path / "images")
    dataset = read_dataset(tmp_path, "train")
    assert contents(dataset) == IMAGES
    assert not dataset.problems
    assert not dataset.ignore.any()


@pytest.mark.parametrize("value", [None, -1, 0])
def test_coco_sizes_come_from_the_turned_image(tmp_path: Path, value: int | None) -> None:
    content = coco()
    for row in content["images"]:
        row |= {"width": value, "height": value}
    write_json(tmp_path / "train.json", content)
    put_images(tmp_path / "images")
    exif = Image.Exif()
    exif[0x0112] = 6
    image(tmp_path / "images" / "a.jpg", 30, 40, exif=exif)
    assert contents(read_dataset(tmp_path, "train")) == IMAGES
    assert read_dataset(tmp_path, "train", exif=False).sizes[0].tolist() == [40, 30]


def test_coco_boxes_come_from_segmentations(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.jpg", 40, 30)
    mask = np.zeros((30, 40), dtype=np.uint8)
    mask[4:9, 3:8] = 1
    runs, counts, last = mask.T.ravel().tolist(), [0], 0
    for value in runs:
        if value != last:
            counts.append(0)
            last = value
        counts[-1] += 1
    segmentations = [
        [[1, 2, 11, 2, 11, 22]],
        [[0, 0, 4, 0, 4, 4], [10, 10, 14, 10, 14, 14]],
        {"size": [30, 40], "counts": counts},
    ]
    rows = [
        {"id": i, "image_id": 1, "category_id": 1, "segmentation": s, "bbox": b}
        for i, (s, b) in enumerate(zip(segmentations, (None, [], None), strict=True))
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}],
        "categories": [{"id": 1, "name": "dog"}],
    }
    write_json(tmp_path / "train.json", content | {"annotations": rows})
    assert read_dataset(tmp_path, "train")[0].boxes.tolist() == [[1, 2, 11, 22], [0, 0, 14, 14], [3, 4, 8, 9]]


def test_coco_images_in_several_folders(tmp_path: Path) -> None:
    put_images(tmp_path / "day")
    (tmp_path / "night").mkdir()
    for name in ("b", "c"):
        (tmp_path / "day" / f"{name}.jpg").rename(tmp_path / "night" / f"{name}.jpg")
    write_json(tmp_path / "annotations.json", coco())
    dataset = read_dataset(tmp_path, "train")
    assert contents(dataset) == IMAGES
    assert [r.path.parent.name for r in dataset] == ["day", "night", "night", "day"]


@pytest.mark.parametrize(
    "name",
    [
        "..\\..\\label-studio\\media\\upload\\4\\{}.jpg",
        "/label-studio/data/media/upload/4/{}.jpg",
        "images/3/{}.jpg",
        "{}.jpg",
    ],
)
def test_coco_images_by_their_last_part(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / "result.json", coco(name.format))
    put_images(tmp_path / "images" / "3")
    dataset = read_dataset(tmp_path, "train", images=tmp_path / "images")
    assert contents(dataset) == IMAGES
    secret = image(tmp_path / "secret.jpg", 40, 30)
    write_json(tmp_path / "result.json", coco(lambda name: f"../{secret.name}"))
    with pytest.raises(InputError, match=r"none of the first images.*absent there$"):  # nothing outside is opened
        read_dataset(tmp_path, "train", images=tmp_path / "images")


def test_the_message_names_the_image_folder_setting(tmp_path: Path) -> None:
    put_images(tmp_path / "images")
    for name in ("/label-studio/upload/4/{}.jpg", "../../media/{}.jpg", "upload/4/{}.jpg"):
        write_json(tmp_path / "result.json", coco(name.format))
        with pytest.raises(InputError, match=r"; data\.images=FOLDER finds images by the last part of their names$"):
            read_dataset(tmp_path, "train")


def test_one_image_for_two_names_is_refused(tmp_path: Path) -> None:
    content = coco(lambda name: f"upload/{'abab'['abcd'.index(name)]}/x.jpg" if name in "ab" else f"{name}.jpg")
    write_json(tmp_path / "result.json", content)
    image(tmp_path / "images" / "x.jpg")
    with pytest.raises(
        InputError, match=r"upload/a/x\.jpg and upload/b/x\.jpg, and both are .*x\.jpg by their last parts"
    ):
        read_dataset(tmp_path, "train", images=tmp_path / "images")


def test_text_ids(tmp_path: Path) -> None:
    content = coco()
    for row in content["images"]:
        row["id"] = f"frame_{9 - row['id']}"
    for row in content["annotations"]:
        row["image_id"], row["category_id"] = f"frame_{9 - row['image_id']}", f"c{row['category_id']}"
    for row in content["categories"]:
        row["id"] = f"c{row['id']}"
    write_json(tmp_path / "train.json", content)
    put_images(tmp_path / "images")
    dataset = read_dataset(tmp_path, "train")
    assert contents(dataset) == IMAGES
    assert dataset.list_image_ids() == ["frame_8", "frame_7", "frame_6", "frame_5"]
    assert dataset.image_ids.tolist() == [4, 3, 2, 1]  # the order of the texts, as pycocotools sorts them
    assert dataset.category_id_texts == ("c1", "c2")
    content["images"][0]["id"] = "frame_7"
    write_json(tmp_path / "train.json", content)
    with pytest.raises(InputError, match="the image id frame_7 is given more than once"):
        read_dataset(tmp_path, "train")


@pytest.mark.parametrize("name", ["../secret.jpg", "{outside}/secret.jpg", "images/../../secret.jpg"])
def test_names_never_leave_the_folder(tmp_path: Path, name: str) -> None:
    image(tmp_path / "secret.jpg")
    name = name.format(outside=tmp_path)
    label = labelme("a", "rectangle", name)
    region = {"x.jpg-1": {"filename": name, "size": -1, "regions": [], "file_attributes": {}}}
    line = json.dumps({"file_name": name, "objects": {"bbox": [], "categories": []}})
    files = {
        "xml/x.xml": xml(("dog", 1, 1, 5, 5, 0)).replace("a.jpg", name),
        "labelme/x.json": json.dumps(label),
        "via/x.json": json.dumps(region),
        "cvat/x.xml": f'<annotations><image name="{name}" width="40" height="30"/></annotations>',
        "hf/metadata.jsonl": line,
    }
    for file, text in files.items():
        put_images((tmp_path / file).parent / "images")
        (tmp_path / file).write_text(text)
        with pytest.raises(InputError, match=r"none of the images of .* is there"):
            read_dataset((tmp_path / file).parent, "train")
    darknet = tmp_path / "darknet"
    LAYOUTS["Darknet's obj.data (CVAT)"][1](darknet)
    (darknet / "train.txt").write_text(f"{name}\n")
    with pytest.raises(InputError, match=r"outside the data folder|does not exist"):
        read_dataset(darknet, "train")
    (darknet / "obj.data").write_text(f"train = {name}\nnames = obj.names\n")
    with pytest.raises(InputError, match=r"there is no such file|outside the data folder"):
        read_dataset(darknet, "train")


# -- what is not recognized


def _nothing(root: Path) -> None:
    root.mkdir(exist_ok=True)
    (root / "notes.md").write_text("x")


def _yolo_without_names(root: Path) -> None:
    put_images(root / "images")
    put_labels(root / "labels")


def _text(name: str, content: str) -> Callable[[Path], None]:
    return lambda root: [put_images(root / "images"), (root / name).write_text(content)][0]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_nothing, r"holds no dataset: what is read is COCO \(annotations/\*\.json\), VOC"),
        (put_images, "there are 4 images, but no annotations"),
        (_yolo_without_names, r"looks like YOLO data, but has no data\.yaml .*, and no classes\.txt"),
        (_text("x.csv", "a,b"), r"\.csv files, such as .*x\.csv, are not read"),
        (_text("x.json", "{}"), r"x\.json is not COCO, it lacks 'images'"),
        (_text("x.json", '[{"id": 1, "annotations": [{"result": [{"from_name": "label"}]}]}]'), "Label Studio's own json .*export the project as COCO or YOLO"),
        (_text("x.json", '[{"image": "a.jpg", "annotations": [{"label": "x", "coordinates": {"x": 1}}]}]'), "Create ML's own json"),
        (_text("x.xml", "<root/>"), r"x\.xml is no annotation of VOC \(<annotation>\) or CVAT"),
        (_text("x.json", '{"dm_format_version": "1.0", "items": []}'), "Datumaro's own json"),
        (_text("a.txt", "Car 0.00 0 -1.57 599.41 156.40 629.75 189.25 2.85 2.63"), r"a\.txt, are no labels of YOLO"),
        (_text("data.jsonl", '{"file_name": "a.jpg"}'), r"must be called metadata\.jsonl"),
        (_text("x.zip", ""), r"but the archive .*x\.zip: unpack it"),
        (_text("annotations.xml", "<annotations><track id='0'/></annotations>"), "CVAT's format for video, which names no images"),
        (lambda root: write_voc(root / "VOC2007"), r"did you mean .*VOC2007\?"),
    ],
)  # fmt: skip
def test_the_nearest_layout_is_named(tmp_path: Path, write: Callable[[Path], Any], message: str) -> None:
    write(tmp_path)
    with pytest.raises(InputError, match=message):
        read_dataset(tmp_path, "train")


def test_files_that_are_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match="is an archive: unpack it"):
        read_dataset(tmp_path / "x.zip", "train")
    write_json(tmp_path / "x.json", [{"annotations": [{"result": [{"from_name": "label"}]}]}])
    with pytest.raises(InputError, match="is Label Studio's own json: export it as COCO or YOLO"):
        read_dataset(tmp_path / "x.json", "train")


def test_annotation_files_as_data(tmp_path: Path) -> None:
    put_images(tmp_path / "images")
    (tmp_path / "boxes.xml").write_text(cvat("{}.jpg".format))
    write_json(tmp_path / "via.json", via())
    for file in ("boxes.xml", "via.json"):
        assert contents(read_dataset(tmp_path / file, "train")) == IMAGES
    with pytest.raises(InputError, match="holds data in CVAT and VIA format"):
        read_dataset(tmp_path, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": 3}, "'shapes' must be a list, not 3"),
        ({"shapes": [3]}, "entry 0 of 'shapes' must be an object, not 3"),
        ({"shapes": [{"points": [[1, 2], [3, 4]]}]}, "'label' must be a text, not None"),
        ({"shapes": [{"label": "x", "shape_type": "rectangle", "points": [[1, 2, 3]]}]}, r"'points' must be a list of points \[x, y\]"),
        ({"shapes": [{"label": "x", "shape_type": "rectangle", "points": [[1, "a"], [2, 3]]}]}, "'points' must be a list of numbers"),
        ({"shapes": [{"label": "x", "shape_type": "rectangle", "points": [[1, 2]]}]}, "a rectangle has 2 points, not 1"),
        ({"imageHeight": "high"}, "'imageHeight' must be a number, not 'high'"),
        ({"imagePath": 7}, "'imagePath' must be a text, not 7"),
    ],
)  # fmt: skip
def test_malformed_labelme_files_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    put_images(tmp_path)
    write_json(tmp_path / "a.json", {"shapes": []} | labelme("a", "rectangle", "a.jpg") | change)
    if "shapes" in change and not isinstance(change["shapes"], list):
        (tmp_path / "b.json").write_text(json.dumps(labelme("b", "rectangle", "b.jpg")))
        (tmp_path / "a.json").write_text('{"shapes": [], "shapes": 3}')
    with pytest.raises(InputError, match=rf"a\.json.*{message}"):
        read_dataset(tmp_path, "train")


JUNK = [
    b"",
    b"null",
    b"{}",
    b"[]",
    b"-1",
    b"1e999",
    b"NaN",
    b'"x"',
    b"\xff",
    b"\0",
    b"<",
    b"9" * 400,
    b"..",
    b"/",
    b"\n",
    b'"\\ud800"',
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_input_errors_whatever_the_bytes(tmp_path: Path, layout: str) -> None:
    rng = random.Random(layout)
    LAYOUTS[layout][1](tmp_path)
    files = [file for file in sorted(tmp_path.rglob("*.*")) if file.suffix not in (".jpg", ".png", ".JPEG")]
    for _ in range(8):
        file = rng.choice(files)
        content = file.read_bytes()
        begin, end = rng.choice([m.span() for m in re.finditer(rb'"[^"]*"|[\w.]+|\[[^\[\]]*\]', content)] or [(0, 0)])
        file.write_bytes(content[:begin] + rng.choice(JUNK) + content[end:])
        with contextlib.suppress(InputError):
            assert len(read_dataset(tmp_path, "train").fingerprint()) == 16
        file.write_bytes(content)
