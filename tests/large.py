"""Datasets with many images, as files: thousands of images are one, by hard links."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from tiny import OBJECT, XML, image

WIDTH, HEIGHT = 640, 480
LINKS = 50_000  # to one file; ext4 allows 65,000
NAMES = [f"class {i}" for i in range(20)]


def boxes(images: int, each: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(images, each, 4) xyxy inside the image, and labels (images, each)."""
    chance = np.random.default_rng(seed)
    corner = chance.uniform(0, 400, (images, each, 2))
    return np.concatenate([corner, corner + chance.uniform(8, 80, (images, each, 2))], axis=2).round(
        2
    ), chance.integers(0, len(NAMES), (images, each))


def write(root: Path, form: str, images: int, each: int, *, polygons: bool = False) -> Path:
    """A split "train" in COCO's, YOLO's or VOC's form; the path to give to `read`."""
    corners, labels = boxes(images, each)
    if form == "coco":
        return _coco(root, corners, labels, polygons)
    folders = {"yolo": ("images/train", "labels/train"), "voc": ("JPEGImages", "Annotations")}[form]
    for folder in folders:
        (root / folder).mkdir(parents=True)
    for i, (rows, own) in enumerate(zip(corners.tolist(), labels.tolist())):
        if i % LINKS == 0:
            entry = image(root / f"{i}.jpg", WIDTH, HEIGHT)
        os.link(entry, root / folders[0] / f"{i:06d}.jpg")
        if form == "yolo":
            lines = [
                f"{k} {(a + c) / 2 / WIDTH:.6f} {(b + d) / 2 / HEIGHT:.6f} {(c - a) / WIDTH:.6f} {(d - b) / HEIGHT:.6f}\n"
                for k, (a, b, c, d) in zip(own, rows)
            ]
            (root / folders[1] / f"{i:06d}.txt").write_text("".join(lines))
        else:
            objects = "".join(
                OBJECT.format(name=NAMES[k], x1=a, y1=b, x2=c, y2=d, difficult=0) for k, (a, b, c, d) in zip(own, rows)
            )
            (root / folders[1] / f"{i:06d}.xml").write_text(
                XML.format(name=f"{i:06d}", width=WIDTH, height=HEIGHT, objects=objects)
            )
    if form == "yolo":
        (root / "data.yaml").write_text(f"train: images/train\nnames: {NAMES}\n")
        return root / "data.yaml"
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "train.txt").write_text("".join(f"{i:06d}\n" for i in range(images)))
    return root


def _coco(root: Path, corners: np.ndarray, labels: np.ndarray, polygons: bool) -> Path:
    file = root / "annotations" / "instances_train2017.json"
    file.parent.mkdir(parents=True)
    (root / "train2017").mkdir()
    with file.open("w") as out:
        images = (
            f'{{"id":{i},"file_name":"{i:012d}.jpg","width":{WIDTH},"height":{HEIGHT}}}' for i in range(len(corners))
        )
        out.write(f'{{"images":[{",".join(images)}],"categories":[')
        out.write(",".join(f'{{"id":{k + 1},"name":"{name}"}}' for k, name in enumerate(NAMES)) + '],"annotations":[')
        number = 0
        for i, (rows, own) in enumerate(zip(corners.tolist(), labels.tolist())):
            lines = []
            for k, (a, b, c, d) in zip(own, rows):
                number += 1
                w, h = round(c - a, 2), round(d - b, 2)
                segmentation = f',"segmentation":[[{a},{b},{c},{b},{c},{d},{a},{d}]]' if polygons else ""
                area = f'"area":{w * h:.2f},"iscrowd":0{segmentation}'
                lines.append(f'{{"id":{number},"image_id":{i},"category_id":{k + 1},"bbox":[{a},{b},{w},{h}],{area}}}')
            out.write(("," if i else "") + ",".join(lines))
        out.write("]}")
    return root
