"""Tiny datasets for tests, written by hand."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

XML = (
    "<annotation><filename>{name}.jpg</filename>"
    "<size><width>{width}</width><height>{height}</height><depth>3</depth></size>{objects}</annotation>"
)
OBJECT = (
    "<object><name>{name}</name><difficult>{difficult}</difficult>"
    "<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
)


def image(path: Path, width: int = 40, height: int = 30, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "white").save(path, **options)
    return path


def coco_dict() -> dict[str, Any]:
    """Two images; ids with gaps; a crowd with RLE, polygons, an ignored annotation."""
    return {
        "images": [
            {"id": 7, "file_name": "b.jpg", "width": 40, "height": 30},
            {"id": 3, "file_name": "a.jpg", "width": 20, "height": 10},
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 9, "bbox": [1, 2, 3, 4], "area": 11.5, "iscrowd": 0},
            {
                "id": 2,
                "image_id": 7,
                "category_id": 2,
                "bbox": [5, 6, 10, 12],
                "iscrowd": 0,
                "segmentation": [[5, 6, 15, 6, 15, 18]],
            },
            {
                "id": 3,
                "image_id": 3,
                "category_id": 2,
                "bbox": [0, 0, 20, 10],
                "iscrowd": 1,
                "segmentation": {"size": [10, 20], "counts": [0, 200]},
            },
            {"id": 4, "image_id": 7, "category_id": 9, "bbox": [1.5, 2.5, 3.25, 4.75], "ignore": 1},
        ],
    }


def write_coco(root: Path, data: Any = None, split: str = "train") -> Path:
    """The folder with annotations/instances_{split}2017.json and {split}2017/*.jpg."""
    data = coco_dict() if data is None else data
    file = root / "annotations" / f"instances_{split}2017.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    image(root / f"{split}2017" / "b.jpg", 40, 30)
    image(root / f"{split}2017" / "a.jpg", 20, 10)
    return root


def xml(
    *objects: tuple[str, float, float, float, float, int], name: str = "a", width: object = 40, height: object = 30
) -> str:
    rows = [OBJECT.format(name=n, x1=x1, y1=y1, x2=x2, y2=y2, difficult=d) for n, x1, y1, x2, y2, d in objects]
    return XML.format(name=name, width=width, height=height, objects="".join(rows))


def write_voc(root: Path, files: dict[str, str] | None = None, lists: dict[str, str] | None = None) -> Path:
    """Annotations by image name, and lists by split."""
    files = files or {
        "a": xml(("dog", 1, 1, 10, 20, 0), ("cat", 5.5, 6.5, 8.5, 9.5, 1)),
        "b": xml(("bird", 3, 4, 3, 4, 0), name="b"),
    }
    for name, text in files.items():
        image(root / "JPEGImages" / f"{name}.jpg")
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{name}.xml").write_text(text)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for split, text in (lists or {"train": "a\n", "val": "b\n"}).items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(text)
    return root


def write_yolo(root: Path, labels: str | bytes = "0 0.5 0.5 0.5 0.5\n", yaml: str | None = None) -> Path:
    """images/train/a.jpg (40 x 30) with its label, images/val/b.jpg without; returns the data.yaml."""
    image(root / "images" / "train" / "a.jpg")
    image(root / "images" / "val" / "b.jpg")
    label = root / "labels" / "train" / "a.txt"
    label.parent.mkdir(parents=True, exist_ok=True)
    label.write_bytes(labels if isinstance(labels, bytes) else labels.encode())
    file = root / "data.yaml"
    file.write_text(yaml or "train: images/train\nval: images/val\nnames: [dog, cat]\n")
    return file
