"""One small dataset, written as each annotation tool writes it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fusedet.data.dataset import DetectionDataset
from tiny import image, xml

Objects = list[tuple[str, tuple[float, float, float, float]]]
CLASSES = ["cat", "dog"]
IMAGES: dict[str, tuple[int, int, Objects]] = {
    "a": (40, 30, [("dog", (1, 2, 11, 22)), ("cat", (5, 6, 15, 18))]),
    "b": (20, 10, [("cat", (0, 0, 20, 10))]),
    "c": (32, 24, [("dog", (3, 4, 8, 9)), ("dog", (10, 11, 30, 20))]),
    "d": (16, 16, []),
}
"""Width, height and objects (class and corners) by the image's name."""


def contents(dataset: DetectionDataset) -> dict[str, Any]:
    """Width, height and objects by the image's name, to compare with IMAGES."""
    return {
        r.path.stem: (
            r.width,
            r.height,
            [(dataset.names[k], tuple(np.round(box, 4).tolist())) for k, box in zip(r.labels, r.boxes, strict=True)],
        )
        for r in dataset
    }


def put_images(folder: Path, ending: str = ".jpg") -> None:
    for name, (width, height, _) in IMAGES.items():
        image(folder / f"{name}{ending}", width, height)


def put_xml(folder: Path, written: Callable[[str], str] = lambda name: name) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (width, height, objects) in IMAGES.items():
        rows = [(label, x1 + 1, y1 + 1, x2, y2, 0) for label, (x1, y1, x2, y2) in objects]
        (folder / f"{name}.xml").write_text(xml(*rows, name=written(name), width=width, height=height))


def put_labels(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (w, h, objects) in IMAGES.items():
        lines = [
            f"{CLASSES.index(label)} {(x1 + x2) / 2 / w} {(y1 + y2) / 2 / h} {(x2 - x1) / w} {(y2 - y1) / h}\n"
            for label, (x1, y1, x2, y2) in objects
        ]
        (folder / f"{name}.txt").write_text("".join(lines))


def coco(file_name: Callable[[str], str] = lambda name: f"{name}.jpg") -> dict[str, Any]:
    images, annotations = [], []
    for i, (name, (width, height, objects)) in enumerate(IMAGES.items(), 1):
        images.append({"id": i, "file_name": file_name(name), "width": width, "height": height})
        for label, (x1, y1, x2, y2) in objects:
            row = {"image_id": i, "category_id": CLASSES.index(label) + 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            annotations.append({"id": len(annotations) + 1} | row)
    categories = [{"id": k, "name": name} for k, name in enumerate(CLASSES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def corners(box: tuple[float, float, float, float]) -> list[list[float]]:
    x1, y1, x2, y2 = box
    return [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]


def labelme(name: str, kind: str, image_path: str) -> dict[str, Any]:
    width, height, objects = IMAGES[name]
    shapes = [
        {
            "label": label,
            # a rectangle may be drawn from any corner
            "points": corners(box) if kind == "polygon" else [corners(box)[2], corners(box)[0]],
            "group_id": None,
            "shape_type": kind,
            "flags": {},
        }
        for label, box in objects
    ]
    sizes = {"imageHeight": height, "imageWidth": width}
    return {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": image_path, "imageData": None} | sizes


def cvat(image_name: Callable[[str], str], subset: str = "", polygons: bool = False) -> str:
    rows = []
    for i, (name, (width, height, objects)) in enumerate(IMAGES.items()):
        shapes = []
        for label, (x1, y1, x2, y2) in objects:
            points = ";".join(f"{x},{y}" for x, y in corners((x1, y1, x2, y2)))
            shapes.append(
                f'<polygon label="{label}" occluded="0" points="{points}" z_order="0"></polygon>'
                if polygons
                else f'<box label="{label}" occluded="0" xtl="{x1}" ytl="{y1}" xbr="{x2}" ybr="{y2}" z_order="0"></box>'
            )
        rows.append(
            f'<image id="{i}" name="{image_name(name)}" {subset} width="{width}" height="{height}">{"".join(shapes)}</image>'
        )
    labels = "".join(f"<label><name>{name}</name><attributes></attributes></label>" for name in CLASSES)
    meta = f"<meta><task><id>1</id><labels>{labels}</labels></task></meta>"
    return (
        f'<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version>{meta}{"".join(rows)}</annotations>'
    )


def via(attribute: str | None = "label", polygons: bool = False) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, (_, _, objects) in IMAGES.items():
        regions = []
        for label, (x1, y1, x2, y2) in objects:
            shape: dict[str, Any] = {"name": "rect", "x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1}
            if polygons:
                xs, ys = zip(*corners((x1, y1, x2, y2)), strict=True)
                shape = {"name": "polygon", "all_points_x": xs, "all_points_y": ys}
            regions.append({"shape_attributes": shape, "region_attributes": {attribute: label} if attribute else {}})
        content[f"{name}.jpg-1"] = {"filename": f"{name}.jpg", "size": -1, "regions": regions, "file_attributes": {}}
    return content


def metadata(numbers: bool = True) -> str:
    lines = []
    for name, (_, _, objects) in IMAGES.items():
        boxes = [[x1, y1, x2 - x1, y2 - y1] for _, (x1, y1, x2, y2) in objects]
        labels = [CLASSES.index(label) if numbers else label for label, _ in objects]
        lines.append(json.dumps({"file_name": f"{name}.jpg", "objects": {"bbox": boxes, "categories": labels}}))
    return "\n".join(lines) + "\n"


README = "---\ndataset_info:\n  features:\n  - name: objects\n    sequence:\n    - name: categories\n      dtype:\n        class_label:\n          names:\n            '0': cat\n            '1': dog\n---\n# Pets\n"


def _voc(xml_folder: str, image_folder: str, ending: str = ".jpg") -> Callable[[Path], None]:
    return lambda root: [put_images(root / image_folder, ending), put_xml(root / xml_folder)][0]


def _labelme(folder: str, images: str, kind: str, image_path: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        put_images(root / images)
        for name in IMAGES:
            write_json(root / folder / f"{name}.json", labelme(name, kind, image_path.format(name)))

    return write


def _cvat(images: str, image_name: str, **options: Any) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        put_images(root / images)
        (root / "annotations.xml").write_text(cvat(image_name.format, **options))

    return write


def _via(file: str, images: str, content: Callable[[], dict[str, Any]]) -> Callable[[Path], None]:
    return lambda root: [put_images(root / images), write_json(root / file, content())][0]


def _class_list(list_file: str, images: str, labels: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        put_images(root / images)
        put_labels(root / labels)
        (root / list_file).write_text("cat\ndog\n")

    return write


def _darknet(prefix: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        put_images(root / "obj_train_data")
        put_labels(root / "obj_train_data")
        (root / "obj.names").write_text("cat\ndog\n")
        (root / "train.txt").write_text("".join(f"{prefix}obj_train_data/{name}.jpg\n" for name in IMAGES))
        (root / "obj.data").write_text(
            f"classes = 2\ntrain = {prefix}train.txt\nnames = {prefix}obj.names\nbackup = backup/\n"
        )

    return write


def _coco(file: str, images: str, content: Callable[[], dict[str, Any]] = coco) -> Callable[[Path], None]:
    return lambda root: [put_images(root / images), write_json(root / file, content())][0]


def _imagefolder(readme: str, numbers: bool) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        put_images(root / "train")
        (root / "train" / "metadata.jsonl").write_text(metadata(numbers))
        (root / "README.md").write_text(readme)

    return write


LAYOUTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "xml beside a folder of images (Kaggle, raccoon)": ("voc", _voc("annotations", "images", ".png")),
    "xml in annots (kangaroo)": ("voc", _voc("annots", "images")),
    "xml and images in one folder (LabelImg)": ("voc", _voc(".", ".")),
    "xml and images in a deep folder": ("voc", _voc("data/raw/labels_xml", "data/raw/photos", ".JPEG")),
    "VOC folders without lists (labelme2voc)": ("voc", _voc("Annotations", "JPEGImages")),
    "LabelMe, rectangles, one folder": ("labelme", _labelme(".", ".", "rectangle", "{}.jpg")),
    "LabelMe, polygons, images elsewhere": ("labelme", _labelme("json", "images", "polygon", "../images/{}.jpg")),
    "LabelMe, Windows paths": ("labelme", _labelme("json", "images", "rectangle", "..\\images\\{}.jpg")),
    "LabelMe, stale paths": ("labelme", _labelme("json", "images", "rectangle", "/home/u/old/{}.jpg")),
    "CVAT for images, boxes": ("cvat", _cvat("images", "{}.jpg")),
    "CVAT for images, polygons and folders": ("cvat", _cvat("images/batch", "batch/{}.jpg", polygons=True)),
    "CVAT for images, subset default": ("cvat", _cvat("images/default", "{}.jpg", subset='subset="default"')),
    "VIA, rectangles": ("via", _via("via_export_json.json", ".", via)),
    "VIA, polygons, images elsewhere": ("via", _via("via.json", "images", lambda: via("class", polygons=True))),
    "VIA, project": ("via", _via("p.json", "images", lambda: {"_via_settings": {}, "_via_img_metadata": via("kind")})),
    "YOLO with classes.txt (Label Studio)": ("yolo", _class_list("classes.txt", "images", "labels")),
    "YOLO in one folder (LabelImg)": ("yolo", _class_list("classes.txt", ".", ".")),
    "YOLO with labels/classes.txt": ("yolo", _class_list("labels/classes.txt", "images", "labels")),
    "YOLO with _darknet.labels (Roboflow)": ("yolo", _class_list("train/_darknet.labels", "train", "train")),
    "Darknet's obj.data (CVAT)": ("yolo", _darknet("data/")),
    "Darknet's obj.data, paths from its folder": ("yolo", _darknet("")),
    "COCO, instances_default (CVAT)": ("coco", _coco("annotations/instances_default.json", "images/default")),
    "COCO, result.json (Label Studio)": ("coco", _coco("result.json", "images", lambda: coco("images/{}.jpg".format))),
    "COCO, labels.json in a folder (FiftyOne)": ("coco", _coco("export/labels.json", "export/data")),
    "COCO, annotations.json and JPEGImages (labelme2coco)": (
        "coco",
        _coco("annotations.json", "JPEGImages", lambda: coco("JPEGImages/{}.jpg".format)),
    ),
    "imagefolder, class_label in README.md (Hugging Face)": ("imagefolder", _imagefolder(README, numbers=True)),
    "imagefolder, names": ("imagefolder", _imagefolder("# Pets\n", numbers=False)),
}
"""The format that each is read as, and its writer, by what it is."""
