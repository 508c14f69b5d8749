"""Inputs as tools write them: each is read with the values written here by hand, counted, or refused in a sentence."""

import base64
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fusedet.data import annotation_cleaning
from fusedet.data.dataset import DetectionDataset
from fusedet.data.readers.auto import list_splits, read_dataset
from fusedet.data.split_checks import check_box_convention
from fusedet.errors import InputError
from layouts import write_json
from tiny import image, xml

CAT = ("cat", (4.0, 3.0, 20.0, 15.0))
DOG = ("dog", (0.0, 0.0, 20.0, 15.0))
CAT_LINE, DOG_LINE = "0 0.3 0.3 0.4 0.4\n", "1 0.25 0.25 0.5 0.5\n"  # of an image of 40 x 30
YAML = "names: [cat, dog]\ntrain: images\nval: images\n"


def objects(dataset: DetectionDataset) -> dict[str, list[tuple[str, tuple[float, ...]]]]:
    """Class and corners of the annotations by the image's name."""
    return {
        record.path.name: [
            (dataset.names[label], tuple(round(value, 4) for value in box))
            for label, box in zip(record.labels.tolist(), record.boxes.tolist(), strict=True)
        ]
        for record in dataset
    }


def put(file: Path, text: str, encoding: str = "utf-8") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode(encoding))


def coco(names: list[str], category: int = 1, box: tuple[int, int, int, int] = (4, 3, 16, 12)) -> dict[str, Any]:
    return {
        "images": [{"id": i, "file_name": name, "width": 40, "height": 30} for i, name in enumerate(names, 1)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": category, "bbox": box} for i in range(1, len(names) + 1)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def cvat(images: dict[str, str], labels: str) -> str:
    rows = [f'<image id="0" name="{name}" width="40" height="30">{shapes}</image>' for name, shapes in images.items()]
    return f"<annotations><meta><project><labels>{labels}</labels></project></meta>{''.join(rows)}</annotations>"


def cvat_box(label: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<box label="{label}" xtl="{x1}" ytl="{y1}" xbr="{x2}" ybr="{y2}"/>'


def labelme(*shapes: tuple[str, str, list[list[float]]], data: str | None = None) -> dict[str, Any]:
    rows = [{"label": label, "shape_type": kind, "points": points} for label, kind, points in shapes]
    return {"shapes": rows, "imageData": data, "imagePath": "a.jpg", "imageHeight": 30, "imageWidth": 40}


def region(label: str, x: int, y: int, width: int, height: int) -> dict[str, Any]:
    shape = {"name": "rect", "x": x, "y": y, "width": width, "height": height}
    return {"shape_attributes": shape, "region_attributes": {"label": label}}


def test_extensions_of_labels_in_capitals(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.JPG")
    image(tmp_path / "images" / "b.JPG")
    put(tmp_path / "labels" / "a.txt", CAT_LINE)
    put(tmp_path / "labels" / "b.TXT", DOG_LINE)
    put(tmp_path / "labels" / "c.TXT", DOG_LINE)
    put(tmp_path / "data.yaml", YAML)
    dataset = read_dataset(tmp_path, "train")
    assert objects(dataset) == {"a.JPG": [CAT], "b.JPG": [DOG]}
    assert dataset.problems == {annotation_cleaning.NO_IMAGE_FILE: 1}


@pytest.mark.parametrize(("images", "labels"), [("Images", "Labels"), ("IMAGES", "LABELS")])
def test_folders_of_yolo_in_capitals(tmp_path: Path, images: str, labels: str) -> None:
    image(tmp_path / images / "train" / "a.jpg")
    put(tmp_path / labels / "train" / "a.txt", CAT_LINE)
    put(tmp_path / "data.yaml", f"names: [cat]\ntrain: {images}/train\n")
    assert objects(read_dataset(tmp_path, "train")) == {"a.jpg": [CAT]}


def test_windows_separators_in_a_yaml(tmp_path: Path) -> None:
    for split, name, line in (("train", "a", CAT_LINE), ("valid", "b", DOG_LINE)):
        image(tmp_path / split / "images" / f"{name}.jpg")
        put(tmp_path / split / "labels" / f"{name}.txt", line)
    text = "names: [cat, dog]\r\ntrain: ..\\train\\images\r\nval: .\\valid\\images\r\n"
    put(tmp_path / "data.yaml", text, "utf-8-sig")  # the byte order mark is before `names`
    assert objects(read_dataset(tmp_path, "train")) == {"a.jpg": [CAT]}
    assert objects(read_dataset(tmp_path, "val")) == {"b.jpg": [DOG]}


def test_windows_separators_and_capitals_of_darknet(tmp_path: Path) -> None:
    for name in "ab":
        image(tmp_path / "obj" / f"{name}.jpg")
    put(tmp_path / "obj" / "a.txt", CAT_LINE)
    put(tmp_path / "obj" / "b.txt", "")
    put(tmp_path / "obj.names", "cat\r\n")
    put(tmp_path / "train.txt", "data\\obj\\a.jpg\r\ndata\\obj\\b.jpg\r\n")
    put(tmp_path / "obj.data", "Classes = 1\r\nTrain = data\\train.txt\r\nNames = data\\obj.names\r\n")
    assert objects(read_dataset(tmp_path, "train")) == {"a.jpg": [CAT], "b.jpg": []}


def test_windows_separators_never_leave_the_folder(tmp_path: Path) -> None:
    image(tmp_path / "secret" / "a.jpg")
    put(tmp_path / "data" / "data.yaml", "names: [cat]\ntrain: list.txt\nval: ..\\..\\secret\n")
    put(tmp_path / "data" / "list.txt", "..\\secret\\a.jpg\n")
    for split in ("train", "val"):
        with pytest.raises(InputError, match=r"leaves the data folder|outside|relative to the data folder"):
            read_dataset(tmp_path / "data", split)


def test_labels_with_tabs_and_byte_order_marks(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    put(tmp_path / "a.txt", "0\t0.3\t0.3\t0.4\t0.4\r\n", "utf-8-sig")
    put(tmp_path / "classes.txt", "cat\r\ndog\r\n", "utf-8-sig")
    assert objects(read_dataset(tmp_path, "train")) == {"a.png": [CAT]}


def test_the_first_labels_are_empty(tmp_path: Path) -> None:
    for i in range(101):
        put(tmp_path / "labels" / f"empty{i:03}.txt", "")
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("L", (2, 2)).save(tmp_path / "images" / f"empty{i:03}.png")
    image(tmp_path / "images" / "full.jpg")
    put(tmp_path / "labels" / "full.txt", CAT_LINE)
    put(tmp_path / "classes.txt", "cat\n")
    dataset = read_dataset(tmp_path, "train")
    assert len(dataset) == 102
    assert objects(dataset)["full.jpg"] == [CAT]


def test_masks_beside_the_images_are_not_background(tmp_path: Path) -> None:
    for name in ("a", "b"):
        image(tmp_path / "images" / f"{name}.jpg")
    put(tmp_path / "labels" / "a.txt", CAT_LINE)
    put(tmp_path / "classes.txt", "cat\n")
    assert objects(read_dataset(tmp_path, "train")) == {"a.jpg": [CAT], "b.jpg": []}
    image(tmp_path / "background" / "c.jpg")  # another image
    assert len(read_dataset(tmp_path, "train")) == 3
    image(tmp_path / "masks" / "a.png")
    with pytest.raises(InputError, match=r"masks/a\.png has no label file"):
        read_dataset(tmp_path, "train")
    put(tmp_path / "data.yaml", YAML)
    assert len(read_dataset(tmp_path, "train")) == 2


def test_numbers_with_underscores_are_refused(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.jpg")
    put(tmp_path / "labels" / "a.txt", "0 0_5 0.5 0.2 0.2\n")
    put(tmp_path / "data.yaml", YAML)
    with pytest.raises(InputError, match=r"a\.txt, line 1: .*not a number"):
        read_dataset(tmp_path, "train")


def test_sidecar_files_of_gdal_are_no_annotations(tmp_path: Path) -> None:
    image(tmp_path / "a.jpg")
    put(tmp_path / "a.xml", xml(("cat", 5, 4, 20, 15, 0)))
    put(tmp_path / "a.jpg.aux.xml", "<PAMDataset><PAMRasterBand band='1'/></PAMDataset>")
    assert list(objects(read_dataset(tmp_path, "train"))) == ["a.jpg"]


def test_label_folders_without_an_image_folder_are_counted(tmp_path: Path) -> None:
    image(tmp_path / "images" / "first" / "a.jpg")
    put(tmp_path / "labels" / "first" / "a.txt", CAT_LINE)
    put(tmp_path / "labels" / "second" / "b.txt", CAT_LINE)
    put(tmp_path / "labels" / "second" / "deep" / "c.txt", "")
    put(tmp_path / "data.yaml", YAML)
    dataset = read_dataset(tmp_path, "train")
    assert dataset.problems == {annotation_cleaning.NO_IMAGE_FILE: 2}
    assert dataset.examples[annotation_cleaning.NO_IMAGE_FILE] == str(tmp_path / "labels" / "second" / "b.txt")


def test_two_exports_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("first", "second"):
        image(tmp_path / folder / "images" / f"{folder}.jpg")
        write_json(tmp_path / folder / "result.json", coco([f"images/{folder}.jpg"]))
    with pytest.raises(InputError, match=r"first/result\.json and .*second/result\.json are both the split 'result'"):
        read_dataset(tmp_path, "train")
    assert objects(read_dataset(tmp_path / "second" / "result.json", "train")) == {"second.jpg": [CAT]}


def test_two_files_of_a_coco_split_are_refused(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.jpg")
    for name in ("instances_train", "train"):
        write_json(tmp_path / "annotations" / f"{name}.json", coco(["a.jpg"]))
    with pytest.raises(InputError, match="are both the split 'train' by their names: join them"):
        read_dataset(tmp_path, "train")
    (tmp_path / "annotations" / "train.json").unlink()
    (tmp_path / "annotations" / "train.json").symlink_to("instances_train.json")  # one file
    write_json(tmp_path / "train.json", {"epochs": 3})  # not COCO
    assert objects(read_dataset(tmp_path, "train")) == {"a.jpg": [CAT]}


def test_an_absent_image_is_not_taken_from_another_split(tmp_path: Path) -> None:
    for split, category in (("train", 1), ("val", 2)):
        write_json(tmp_path / "annotations" / f"{split}.json", coco(["1.jpg", "2.jpg"], category))
        image(tmp_path / "images" / split / "1.jpg")
    image(tmp_path / "images" / "train" / "2.jpg")
    for split in ("train", "val"):
        paths = [record.path for record in read_dataset(tmp_path, split)]
        assert paths == [tmp_path / "images" / split / name for name in ("1.jpg", "2.jpg")]
    assert not paths[1].exists()
    (tmp_path / "images" / "val" / "1.jpg").unlink()
    with pytest.raises(InputError, match=r"none of the first images.*data\.images=FOLDER"):
        read_dataset(tmp_path, "val")
    (tmp_path / "images" / "val").rmdir()  # both splits are in one folder
    assert objects(read_dataset(tmp_path, "val")) == {"1.jpg": [("dog", CAT[1])], "2.jpg": [("dog", CAT[1])]}


def test_image_folders_that_fit_equally_are_refused(tmp_path: Path) -> None:
    for split, folder in (("train", "part_a"), ("val", "part_b")):
        write_json(tmp_path / f"{split}.json", coco(["1.jpg"]))
        image(tmp_path / folder / "1.jpg")
    with pytest.raises(InputError, match=r"may mean the images of .*part_a or of .*part_b; data\.images"):
        read_dataset(tmp_path, "val")
    assert read_dataset(tmp_path, "val", images=tmp_path / "part_b")[0].path == tmp_path / "part_b" / "1.jpg"
    for name in ("part_b/0.jpg", "part_b/3.jpg", "part_a/2.jpg", "part_c/2.jpg"):
        image(tmp_path / name)
    write_json(tmp_path / "val.json", coco(["0.jpg", "1.jpg", "2.jpg", "3.jpg"]))  # part_b holds three of them
    with pytest.raises(InputError, match=r"may mean the images of .*part_a or of .*part_b; data\.images"):
        read_dataset(tmp_path, "val")
    write_json(tmp_path / "val.json", coco(["1.jpg"]))
    image(tmp_path / "images" / "1.jpg")  # the usual folder goes before others, such as previews
    assert read_dataset(tmp_path, "val")[0].path == tmp_path / "images" / "1.jpg"


def test_a_file_under_two_image_ids_is_counted(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.jpg")
    write_json(tmp_path / "annotations" / "instances_train.json", coco(["a.jpg", "a.jpg"]))
    dataset = read_dataset(tmp_path, "train")
    assert dataset.problems == {annotation_cleaning.SAME_FILE: 1}
    assert dataset.examples == {annotation_cleaning.SAME_FILE: str(tmp_path / "images" / "a.jpg")}
    assert len(dataset) == 2


def test_coordinates_of_a_place_are_not_those_of_boxes(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.jpg")
    content = coco(["a.jpg"])
    content["images"][0]["coordinates"] = {"lat": 48.1, "lon": 11.5}
    write_json(tmp_path / "annotations" / "instances_train.json", content)
    assert objects(read_dataset(tmp_path, "train")) == {"a.jpg": [CAT]}


def test_utf_16_is_named(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.jpg")
    put(tmp_path / "export.json", json.dumps(coco(["a.jpg"])), "utf-16")
    with pytest.raises(InputError, match=r"^[^:]*export\.json is not UTF-8 text: save it as UTF-8"):
        read_dataset(tmp_path, "train")
    (tmp_path / "export.json").unlink()
    put(
        tmp_path / "a.xml",
        '<?xml version="1.0" encoding="utf-16"?>' + xml(("cat", 5, 4, 20, 15, 0), name="a"),
        "utf-16",
    )
    assert objects(read_dataset(tmp_path, "train")) == {"a.jpg": [CAT]}


def test_images_inside_of_labelme_files_stand_first(tmp_path: Path) -> None:
    image(tmp_path / "a.jpg")
    data = base64.b64encode(random.Random(0).randbytes(70_000)).decode()
    content = labelme(("cat", "rectangle", [[20, 15], [4, 3]]), data=data)
    put(tmp_path / "a.json", json.dumps(content, sort_keys=True))
    assert objects(read_dataset(tmp_path, "train")) == {"a.jpg": [CAT]}


def test_labelme_quadrilaterals(tmp_path: Path) -> None:
    image(tmp_path / "a.jpg")
    shapes = ("cat", "quadrilateral", [[4, 5], [10, 3], [20, 9], [8, 15]]), ("dog", "point", [[1, 1]])
    write_json(tmp_path / "a.json", labelme(*shapes))
    dataset = read_dataset(tmp_path, "train")
    assert objects(dataset) == {"a.jpg": [CAT]}
    assert dataset.problems == {annotation_cleaning.NO_REGION: 1}


def test_shapes_of_nan_and_huge_numbers_are_counted(tmp_path: Path) -> None:
    image(tmp_path / "a.jpg")
    shapes = (
        ("cat", "rectangle", [[4, 3], [20, 15]]),
        ("cat", "rectangle", [[math.nan, 3], [20, 15]]),
        ("cat", "rectangle", [[4, 3], [20, math.nan]]),
        ("cat", "polygon", [[1, 1], [math.nan, 4], [9, 9]]),
        ("cat", "circle", [[10, 10], [1e300, 1e300]]),
    )
    write_json(tmp_path / "a.json", labelme(*shapes))
    dataset = read_dataset(tmp_path, "train")
    assert objects(dataset) == {"a.jpg": [CAT]}
    assert dataset.problems == {annotation_cleaning.NOT_FINITE: 4}


@pytest.mark.parametrize(("theta", "kept"), [(0, 1), (math.pi / 2, 1), (math.inf, 0)])
def test_rotations_of_via(tmp_path: Path, theta: float, kept: int) -> None:
    image(tmp_path / "a.jpg")
    ellipse = {"name": "ellipse", "cx": 12, "cy": 9, "rx": 6, "ry": 6, "theta": theta}
    regions = [{"shape_attributes": ellipse, "region_attributes": {"label": "cat"}}]
    write_json(tmp_path / "via.json", {"a": {"filename": "a.jpg", "regions": regions, "file_attributes": {}}})
    assert objects(read_dataset(tmp_path, "train")) == {"a.jpg": [("cat", (6, 3, 18, 15))] * kept}
    ellipse["theta"] = "turned"
    write_json(tmp_path / "via.json", {"a": {"filename": "a.jpg", "regions": regions, "file_attributes": {}}})
    with pytest.raises(InputError, match="'theta' must be a number, not 'turned'"):
        read_dataset(tmp_path, "train")


def test_parts_of_skeletons_are_no_classes(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.jpg")
    labels = (
        "<label><name>dog</name></label><label><name>cat</name></label>"
        "<label><name>nose</name><type>points</type><parent>dog</parent></label>"
    )
    skeleton = '<skeleton label="dog"><points label="nose" points="3,3"/></skeleton><tag label="cat"/>'
    put(tmp_path / "annotations.xml", cvat({"a.jpg": cvat_box("cat", 4, 3, 20, 15) + skeleton}, labels))
    dataset = read_dataset(tmp_path, "train")
    assert list(dataset.names) == ["dog", "cat"]
    assert objects(dataset) == {"a.jpg": [CAT]}
    assert dataset.problems == {annotation_cleaning.NO_REGION: 1}


def test_names_that_end_alike_are_not_one_image(tmp_path: Path) -> None:
    image(tmp_path / "images" / "left" / "1.jpg")
    images = {"left/1.jpg": cvat_box("cat", 4, 3, 20, 15), "right/1.jpg": cvat_box("dog", 0, 0, 20, 15)}
    put(tmp_path / "annotations.xml", cvat(images, "<label><name>cat</name></label><label><name>dog</name></label>"))
    with pytest.raises(InputError, match=r"several entries with different objects for the image .*left/1\.jpg: join"):
        read_dataset(tmp_path, "train")
    image(tmp_path / "images" / "right" / "1.jpg")
    assert [record.path.parent.name for record in read_dataset(tmp_path, "train")] == ["left", "right"]


def test_entries_of_one_image_in_via(tmp_path: Path) -> None:
    image(tmp_path / "a.jpg")
    first = {"filename": "a.jpg", "regions": [region("cat", 4, 3, 16, 12)], "file_attributes": {}}
    second = first | {"regions": [region("dog", 0, 0, 20, 15)]}
    write_json(tmp_path / "via.json", {"a.jpg100": first, "a.jpg222": second})
    with pytest.raises(InputError, match="several entries with different objects"):
        read_dataset(tmp_path, "train")
    write_json(tmp_path / "via.json", {"a.jpg100": first, "a.jpg222": first})
    dataset = read_dataset(tmp_path, "train")
    assert objects(dataset) == {"a.jpg": [CAT]}
    assert dataset.problems == {annotation_cleaning.LISTED_TWICE: 1}
    assert len(dataset) == 1


def test_a_line_per_object_of_an_imagefolder_is_refused(tmp_path: Path) -> None:
    image(tmp_path / "a.jpg")
    rows = [{"bbox": [[4, 3, 16, 12]], "categories": ["cat"]}, {"bbox": [[0, 0, 20, 15]], "categories": ["dog"]}]
    lines = [json.dumps({"file_name": "a.jpg", "objects": row}) + "\n" for row in rows]
    put(tmp_path / "metadata.jsonl", "".join(lines))
    with pytest.raises(InputError, match=r"metadata\.jsonl has several entries with different objects"):
        read_dataset(tmp_path, "train")
    put(tmp_path / "metadata.jsonl", lines[0] * 2)
    dataset = read_dataset(tmp_path, "train")
    assert objects(dataset) == {"a.jpg": [CAT]}
    assert dataset.problems == {annotation_cleaning.LISTED_TWICE: 1}


OBJECTS = """
  - name: objects
    struct:
    - name: color
      list: {class_label: {names: [red, blue]}}
    - name: category
      list: {class_label: {names: {'1': dog, '0': cat}}}"""
SCENE = """
  - name: scene
    dtype: {class_label: {names: {'0': indoor, '1': outdoor}}}"""


@pytest.mark.parametrize("features", [OBJECTS, OBJECTS + SCENE, SCENE + OBJECTS])
def test_class_names_of_an_imagefolder_are_those_of_the_objects(tmp_path: Path, features: str) -> None:
    image(tmp_path / "a.jpg")
    put(tmp_path / "README.md", f"---\ndataset_info:\n  features:{features}\n---\n")
    line = {"file_name": "a.jpg", "caption": "two\u2028lines", "objects": {"bbox": [[4, 3, 16, 12]], "category": [1]}}
    put(tmp_path / "metadata.jsonl", json.dumps(line, ensure_ascii=False) + "\r\n")
    dataset = read_dataset(tmp_path, "train")
    assert list(dataset.names) == ["cat", "dog"]
    assert objects(dataset) == {"a.jpg": [("dog", CAT[1])]}
    put(tmp_path / "README.md", f"---\ndataset_info:\n  features:{SCENE}\n---\n")  # numbers then are the names
    assert objects(read_dataset(tmp_path, "train")) == {"a.jpg": [("1", CAT[1])]}


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (OBJECTS.replace("'1': dog", "'2': dog"), "must be numbered from 0, not 2, 0"),
        (OBJECTS + OBJECTS.replace("dog", "cow"), "several lists of class names"),
    ],
)
def test_unclear_class_names_of_an_imagefolder(tmp_path: Path, features: str, message: str) -> None:
    image(tmp_path / "a.jpg")
    put(tmp_path / "README.md", f"---\ndataset_info:\n  features:{features}\n---\n")
    put(tmp_path / "metadata.jsonl", json.dumps({"file_name": "a.jpg", "objects": {"bbox": [], "category": []}}))
    with pytest.raises(InputError, match=message):
        read_dataset(tmp_path, "train")


def test_corners_in_place_of_a_size(tmp_path: Path) -> None:
    corners = [[20, 12, 36, 28], [4, 3, 30, 25]]
    shares = [[x1 / 40, y1 / 30, x2 / 40, y2 / 30] for x1, y1, x2, y2 in corners]
    image(tmp_path / "huggingface" / "a.jpg")
    row = {"file_name": "a.jpg", "objects": {"bbox": corners, "categories": ["cat", "dog"]}}
    put(tmp_path / "huggingface" / "metadata.jsonl", json.dumps(row))
    image(tmp_path / "yolo" / "images" / "a.jpg")
    put(tmp_path / "yolo" / "labels" / "a.txt", "".join(f"0 {' '.join(map(str, share))}\n" for share in shares))
    put(tmp_path / "yolo" / "data.yaml", YAML)
    for folder, advice in (("huggingface", "write x, y, width, height"), ("yolo", "write the center, width and")):
        (finding,) = check_box_convention(read_dataset(tmp_path / folder, "train"))
        assert finding.message.startswith("boxes that look like x1, y1, x2, y2: ")
        assert advice in finding.message
    put(tmp_path / "yolo" / "labels" / "a.txt", "0 0.5 0.5 0.9 0.9\n0 0.4 0.5 0.5 0.6\n")  # large, but all inside
    assert check_box_convention(read_dataset(tmp_path / "yolo", "train")) == []


def test_only_the_images_lie_in_folders_of_splits(tmp_path: Path) -> None:
    for split, name, label in (("train", "a", "cat"), ("valid", "b", "dog")):
        image(tmp_path / "images" / split / f"{name}.jpg")
        put(tmp_path / "annotations" / f"{name}.xml", xml((label, 5, 4, 20, 15, 0), name=name))
    assert sorted(list_splits(tmp_path)) == ["train", "val"]
    assert objects(read_dataset(tmp_path, "train")) == {"a.jpg": [CAT]}
    assert objects(read_dataset(tmp_path, "val")) == {"b.jpg": [("dog", CAT[1])]}


def test_a_mask_is_not_taken_for_the_image(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.jpg")
    image(tmp_path / "labels" / "masks" / "a.png")
    put(tmp_path / "labels" / "xml" / "a.xml", xml(("cat", 5, 4, 20, 15, 0), name="a"))
    assert read_dataset(tmp_path, "train")[0].path.name == "a.jpg"  # by <filename>
    put(tmp_path / "labels" / "xml" / "a.xml", xml(("cat", 5, 4, 20, 15, 0), name="a").replace("a.jpg", ""))
    with pytest.raises(InputError, match=r"there are several: .*a\.(png|jpg) and .*a\.(jpg|png)"):
        read_dataset(tmp_path, "train")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("_annotations.train.jsonl", {"image": "a.jpg", "suffix": "<loc0100> cat"}, "lack 'file_name' and 'objects'"),
        ("train.jsonl", {"file_name": "a.jpg", "objects": {}}, "must be called metadata.jsonl"),
        ("ann/a.jpg.json", {"objects": [{"classTitle": "cat"}]}, "Supervisely's own json .*: export the project as"),
    ],
)
def test_what_is_not_read_is_named(tmp_path: Path, file: str, content: dict[str, Any], message: str) -> None:
    image(tmp_path / "a.jpg")
    write_json(tmp_path / file, content)
    with pytest.raises(InputError, match=message):
        read_dataset(tmp_path, "train")


def test_scans_with_an_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    (tmp_path / "scans").mkdir()
    Image.new("L", (40, 30)).save(tmp_path / "scans" / "P1.TIF", format="TIFF", exif=exif)
    put(tmp_path / "xml" / "P1.XML", xml(("stamp", 5, 4, 20, 35, 0), name="P1", width=30, height=40))
    dataset = read_dataset(tmp_path, "train")
    assert objects(dataset) == {"P1.TIF": [("stamp", (4, 3, 20, 35))]}
    assert (dataset[0].width, dataset[0].height) == (30, 40)
