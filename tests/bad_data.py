"""Malformed datasets: small valid ones in COCO, VOC or YOLO format, each corrupted in one way, with its result."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fusedet.data import annotation_cleaning
from tiny import xml

WIDTH, HEIGHT, CLASSES = 64, 48, ("cat", "dog")
TRAIN, VAL = 6, 2
BOX = (8.0, 6.0, 28.0, 30.0)  # x1, y1, x2, y2 of the first annotation of each image
OTHER = (30.0, 10.0, 60.0, 44.0)


@dataclass(frozen=True)
class Kind:
    """One kind of malformed data.

    Attributes:
        name: The name of the kind.
        dataset_format: "coco", "voc" or "yolo".
        corrupt: Corrupts a valid dataset, given its folder.
        problems: The counted problems of the training split, where it can be trained on.
        refused: What the error message must contain, where it is refused; empty where it can be trained on.
        fails_on_decode: Whether only decoding the image shows the fault.
        replaced: Number of images that train.on_bad_image=skip replaces in an epoch.
    """

    name: str
    dataset_format: str
    corrupt: Callable[[Path], Any]
    problems: dict[str, int] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    fails_on_decode: bool = False
    replaced: int = 0


# -- valid datasets


def write_dataset(root: Path, dataset_format: str) -> Path:
    """Write a valid dataset of noise images with two annotations each; return its folder."""
    rng = np.random.default_rng(0)
    splits = {"train": range(TRAIN), "val": range(TRAIN, TRAIN + VAL)}
    folder = {"coco": "{split}", "voc": "JPEGImages", "yolo": "images/{split}"}[dataset_format]
    for split, numbers in splits.items():
        for i in numbers:
            file = root / folder.format(split=split) / f"p{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(file, quality=90)
        {"coco": _write_coco, "voc": _write_voc, "yolo": _write_yolo}[dataset_format](root, split, numbers)
    return root


def _write_coco(root: Path, split: str, numbers: range) -> None:
    rows = []
    for i in numbers:
        for k, (x1, y1, x2, y2) in enumerate((BOX, OTHER)):
            segmentation = [[x1, y1, x2, y1, x2, y2, x1, y2]]
            row = {
                "id": len(rows) + 1,
                "image_id": i,
                "category_id": k + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "iscrowd": 0,
            }
            rows.append(row | {"area": (x2 - x1) * (y2 - y1), "segmentation": segmentation})
    content = {
        "images": [{"id": i, "file_name": f"p{i}.jpg", "width": WIDTH, "height": HEIGHT} for i in numbers],
        "annotations": rows,
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(CLASSES)],
    }
    file = root / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))


def _write_voc(root: Path, split: str, numbers: range) -> None:
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i in numbers:
        objects = [(name, b[0] + 1, b[1] + 1, b[2], b[3], 0) for name, b in zip(CLASSES, (BOX, OTHER))]
        (root / "Annotations" / f"p{i}.xml").write_text(xml(*objects, name=f"p{i}", width=WIDTH, height=HEIGHT))
    (root / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"p{i}\n" for i in numbers))


def _write_yolo(root: Path, split: str, numbers: range) -> None:
    (root / "labels" / split).mkdir(parents=True)
    lines = []
    for k, (x1, y1, x2, y2) in enumerate((BOX, OTHER)):
        w, h = (x2 - x1) / WIDTH, (y2 - y1) / HEIGHT
        lines.append(f"{k} {x1 / WIDTH + w / 2:.6f} {y1 / HEIGHT + h / 2:.6f} {w:.6f} {h:.6f}\n")
    for i in numbers:
        (root / "labels" / split / f"p{i}.txt").write_text("".join(lines))
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat, dog]\n")


# -- corruptions

JSON = "annotations/instances_train.json"


def edit_json(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Edit the training json."""

    def corrupt(root: Path) -> None:
        content = json.loads((root / JSON).read_text())
        change(content)
        (root / JSON).write_text(json.dumps(content))

    return corrupt


def edit_text(file: str, *pairs: tuple[str, str]) -> Callable[[Path], None]:
    """Replace parts of a text file, each once."""

    def corrupt(root: Path) -> None:
        content = (root / file).read_text()
        for old, new in pairs:
            assert old in content, old
            content = content.replace(old, new, 1)
        (root / file).write_text(content)

    return corrupt


def overwrite(file: str, content: bytes | str) -> Callable[[Path], None]:
    """Give a file other content."""
    return lambda root: (root / file).write_bytes(content.encode() if isinstance(content, str) else content)


def set_key(key: str, value: Any, section: str = "annotations") -> Callable[[Path], None]:
    """Set a key of the first entry."""
    return edit_json(lambda content: content[section][0].update({key: value}))


def remove_key(key: str, section: str = "annotations") -> Callable[[Path], None]:
    """Remove a key of the first entry."""
    return edit_json(lambda content: content[section][0].pop(key))


def duplicate(section: str, **values: Any) -> Callable[[Path], None]:
    """Repeat the first entry with some values changed."""
    return edit_json(lambda content: content[section].append(content[section][0] | values))


def store(mode: str, file_format: str = "PNG", at: str = "train/p0.jpg", **options: Any) -> Callable[[Path], None]:
    """Store the first image in another mode and file format, under its old name."""

    def corrupt(root: Path) -> None:
        file = root / at
        with Image.open(file) as image:
            image = (
                Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
                if mode == "I;16"
                else image.convert(mode)
            )
        image.save(file, file_format, **options)

    return corrupt


def resize(width: int, height: int) -> Callable[[Path], None]:
    """Give the first image another size, with one annotation that fills it."""

    def corrupt(root: Path) -> None:
        Image.new("RGB", (width, height)).save(root / "train/p0.jpg", "PNG")
        edit_json(lambda c: c["images"][0].update(width=width, height=height))(root)
        edit_json(lambda c: c["annotations"][0].update(bbox=[0, 0, width, height], segmentation=[]))(root)
        edit_json(lambda c: c["annotations"].pop(1))(root)

    return corrupt


def rotate_by_exif(root: Path) -> None:
    """Rotate the first image by EXIF by 90 degrees; its annotations are of the rotated image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(root / "train/p0.jpg", exif=exif)


def png(width: int, height: int, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG with the given size in its header, and hardly any data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        *more,
        (b"IDAT", zlib.compress(bytes(99))),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def gif(width: int, height: int) -> bytes:
    """A GIF with the given size in its header, and hardly any data."""
    return (
        b"GIF89a"
        + struct.pack("<HH", width, height)
        + b"\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0"
        + struct.pack("<HH", width, height)
        + b"\0\2\2D\1\0;"
    )


def tiff(width: int, height: int) -> bytes:
    """A TIFF with the given size in its header, and no data."""
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: width}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


def truncate_image(root: Path) -> None:
    """Truncate the file of the first image behind its header."""
    file = root / "train/p0.jpg"
    file.write_bytes(file.read_bytes()[:-400])


def add_many(content: dict[str, Any]) -> None:
    """Add 60,000 annotations to the first image."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, [WIDTH - 2, HEIGHT - 2, 20, 20], (60_000, 4))
    corners[:, 2:] = np.minimum(corners[:, 2:] + 1, [WIDTH, HEIGHT] - corners[:, :2])
    for i, box in enumerate(corners.tolist()):
        content["annotations"].append(
            {"id": 100 + i, "image_id": 0, "category_id": 1 + i % 2, "bbox": box, "area": box[2] * box[3]}
        )


def rename(name: str) -> Callable[[Path], None]:
    """Rename the first image."""

    def corrupt(root: Path) -> None:
        (root / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "train/p0.jpg").rename(root / "train" / name)
        set_key("file_name", name, "images")(root)

    return corrupt


def link_images(root: Path) -> None:
    """Make the image folder a link out of the data folder, and an image a link to another."""
    elsewhere = root.parent / f"{root.name}-images"
    shutil.move(root / "train", elsewhere)
    os.symlink(elsewhere, root / "train")
    (elsewhere / "p0.jpg").unlink()
    os.symlink("p1.jpg", elsewhere / "p0.jpg")


def move_data(root: Path) -> None:
    """Move images and labels to a folder elsewhere, which the yaml names."""
    elsewhere = root.parent / f"{root.name}-elsewhere"
    for folder in ("images", "labels"):
        shutil.move(root / folder, elsewhere / folder)
    edit_text("data.yaml", ("train:", f"path: {elsewhere}\ntrain:"))(root)


def link_in_cycle(root: Path) -> None:
    """Put links into an image folder: to its parent, and to another folder of images."""
    (root / "images/more").mkdir()
    (root / "images/train/p0.jpg").rename(root / "images/more/p0.jpg")
    os.symlink("..", root / "images/train/up")
    os.symlink(root / "images/more", root / "images/train/more")
    shutil.rmtree(root / "images/val")
    edit_text("data.yaml", ("val: images/val", "val: images/more"))(root)
    for folder in ("labels/more", "labels/train/more"):
        (root / folder).mkdir()
        shutil.copy(root / "labels/train/p0.txt", root / folder)


def convert_to_windows(root: Path) -> None:
    """Give all text files Windows line ends and a byte order mark."""
    for file in [*root.rglob("*.txt"), *root.rglob("*.xml"), *root.rglob("*.json"), *root.rglob("*.yaml")]:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))


def share_image(root: Path) -> None:
    """Add a training image to the validation split."""
    val = root / "annotations/instances_val.json"
    content = json.loads(val.read_text())
    content["images"].append({"id": 0, "file_name": "../train/p0.jpg", "width": WIDTH, "height": HEIGHT})
    val.write_text(json.dumps(content))


def clear_annotations(content: dict[str, Any]) -> None:
    content["annotations"].clear()


def make_pipe(file: str) -> Callable[[Path], Any]:
    """Replace a file by a named pipe, whose reading never ends."""
    return lambda root: [(root / file).unlink(missing_ok=True), os.mkfifo(root / file)]


def expand_aliases(key: str) -> Callable[[Path], None]:
    """Give a key of data.yaml half a million values in a few hundred characters, by nested aliases."""
    lists = [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcde", "bcdef")]
    rest = {"train": "images/train", "val": "images/val", "names": "[cat, dog]", key: "*f"}
    return overwrite(
        "data.yaml",
        "\n".join(["a: &a [x, x, x, x, x, x, x, x, x]", *lists, *(f"{k}: {v}" for k, v in rest.items()), ""]),
    )


LAUGHS = '<!DOCTYPE a [<!ENTITY a "ha">' + "".join(
    f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi")
) + "]><annotation><filename>&i;</filename></annotation>"  # fmt: skip
FOREIGN = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><filename>&x;</filename></annotation>'
XML, TXT, LIST = "Annotations/p0.xml", "labels/train/p0.txt", "ImageSets/Main/train.txt"
SEGMENTATIONS, AREAS = {annotation_cleaning.BAD_SEGMENTATION: 1}, {annotation_cleaning.BAD_AREA: 1}
NAN, INF = float("nan"), float("inf")

KINDS = [
    # COCO: the file
    Kind("json-empty", "coco", overwrite(JSON, ""), refused=("instances_train.json is not valid json", "line 1")),
    Kind("json-array", "coco", overwrite(JSON, "[1, 2]"), refused=("instances_train.json is not COCO", "not a list")),
    Kind("json-no-images", "coco", overwrite(JSON, '{"categories": []}'), refused=("the key 'images' is missing",)),
    Kind("json-trailing-comma", "coco", edit_text(JSON, ('"images": [', '"images": [,')), refused=("not valid json: line 1, column",)),
    Kind("json-cut", "coco", lambda r: (r / JSON).write_text((r / JSON).read_text()[:300]), refused=("not valid json: line 1",)),
    Kind("json-nested", "coco", overwrite(JSON, "[" * 200_000), refused=("instances_train.json is not valid json",)),
    Kind("json-latin1", "coco", overwrite(JSON, b'{"images": "\xe9"}'), refused=("instances_train.json is not UTF-8",)),
    Kind("json-null-sections", "coco", edit_json(lambda c: c.update(annotations=None)), refused=("'annotations' must be a list, not null",)),
    Kind("another-json-is-a-pipe", "coco", make_pipe("notes.json")),
    Kind("json-is-a-pipe", "coco", make_pipe(JSON), refused=("instances_train.json is a pipe or a device",)),
    Kind("bom-and-windows-ends-coco", "coco", convert_to_windows),
    # COCO: entries
    Kind("key-missing-bbox", "coco", remove_key("bbox")),
    Kind("key-missing-bbox-and-segmentation", "coco", lambda r: [remove_key("bbox")(r), remove_key("segmentation")(r)], refused=("annotation 1 has no 'bbox'",)),
    Kind("key-missing-category", "coco", remove_key("category_id"), refused=("annotation 1 has no 'category_id'",)),
    Kind("key-missing-height", "coco", remove_key("height", "images")),
    Kind("category-unknown", "coco", set_key("category_id", 99), refused=("annotation 1 has the category id 99",)),
    Kind("category-listed-not", "coco", edit_json(lambda c: c.update(categories=[])), refused=("'categories' is empty",)),
    Kind("category-name-empty", "coco", set_key("name", "", "categories"), refused=("'name' of category 1 must be a text",)),
    Kind("category-name-number", "coco", set_key("name", 7, "categories"), refused=("'name' of category 1 must be a text, not 7",)),
    Kind("classes-differ", "coco", set_key("name", "cow", "categories"), refused=("class names", "only train has cow")),
    Kind("image-id-twice", "coco", duplicate("images", file_name="p1.jpg"), refused=("the image id 0 is given more than once",)),
    Kind("category-id-twice", "coco", duplicate("categories", name="x"), refused=("the category id 1 is given more than once",)),
    Kind("annotation-id-twice", "coco", duplicate("annotations", bbox=[1, 1, 9, 9]), {annotation_cleaning.SAME_ID: 1}),
    Kind("annotation-of-no-image", "coco", set_key("image_id", 4711), {annotation_cleaning.NO_IMAGE: 1}),
    Kind("ids-negative", "coco", edit_json(lambda c: [c["images"][0].update(id=-5), c["annotations"][0].update(image_id=-5)] and c["annotations"].pop(1))),
    Kind("ids-as-text", "coco", set_key("image_id", "0")),
    Kind("id-boolean", "coco", set_key("image_id", True), refused=("'image_id' of annotation 1 must be an integer, not True",)),
    Kind("id-huge", "coco", set_key("image_id", 10**30), refused=("'image_id' of annotation 1 is too large",)),
    Kind("iscrowd-2", "coco", set_key("iscrowd", 2)),
    Kind("iscrowd-text", "coco", set_key("iscrowd", "maybe"), refused=("'iscrowd' of annotation 1 must be an integer",)),
    Kind("size-0x0", "coco", edit_json(lambda c: c["images"][0].update(width=0, height=0))),
    Kind("size-minus-1", "coco", edit_json(lambda c: c["images"][0].update(width=-1, height=-1))),
    Kind("size-negative", "coco", edit_json(lambda c: c["images"][0].update(width=-5)), refused=("image 0 (p0.jpg) is -5x48 pixels",)),
    Kind("no-object-at-all", "coco", edit_json(clear_annotations), refused=("instances_train.json has no objects",)),
    Kind("empty-images", "coco", edit_json(lambda c: c.update(annotations=c["annotations"][:2]))),
    Kind("in-train-and-val", "coco", share_image),
    # COCO: boxes
    Kind("bbox-nan", "coco", set_key("bbox", [NAN, 1, 2, 3]), {annotation_cleaning.NOT_FINITE: 1}),
    Kind("bbox-infinite", "coco", set_key("bbox", [1, 1, INF, 3]), {annotation_cleaning.NOT_FINITE: 1}),
    Kind("bbox-huge", "coco", set_key("bbox", [1, 1, 1e300, 1e300]), {annotation_cleaning.NOT_FINITE: 1}),
    Kind("bbox-large", "coco", set_key("bbox", [-1e7, -1e7, 3e7, 3e7]), {annotation_cleaning.CLIPPED: 1}),
    Kind("bbox-negative", "coco", set_key("bbox", [9, 9, -5, 4]), {annotation_cleaning.NEGATIVE: 1}),
    Kind("bbox-no-area", "coco", set_key("bbox", [9, 9, 0, 4]), {annotation_cleaning.NO_AREA: 1}),
    Kind("bbox-outside", "coco", set_key("bbox", [500, 9, 5, 4]), {annotation_cleaning.OUTSIDE: 1}),
    Kind("bbox-partly-outside", "coco", set_key("bbox", [50, 9, 50, 4]), {annotation_cleaning.CLIPPED: 1}),
    Kind("bbox-twice", "coco", duplicate("annotations", id=99), {annotation_cleaning.REPEATED: 1}),
    Kind("bbox-text", "coco", set_key("bbox", ["8", "6.5", "2e1", " 7 "]), {annotation_cleaning.AS_TEXT: 1}),
    Kind("bbox-words", "coco", set_key("bbox", ["a", 1, 2, 3]), refused=("'bbox' of annotation 1 must hold numbers, not 'a'",)),
    Kind("bbox-nested", "coco", set_key("bbox", [[1, 2], 3, 4, 5]), refused=("'bbox' of annotation 1 must hold numbers",)),
    Kind("bbox-boolean", "coco", set_key("bbox", [True, 1, 2, 3]), refused=("'bbox' of annotation 1 must hold numbers, not True",)),
    Kind("bbox-of-three", "coco", set_key("bbox", [1, 2, 3]), refused=("'bbox' of annotation 1 must be [x, y, width, height]",)),
    Kind("bbox-null", "coco", set_key("bbox", None)),
    Kind("bbox-and-segmentation-null", "coco", lambda r: [set_key("bbox", None)(r), set_key("segmentation", None)(r)], refused=("'bbox' of annotation 1 must be [x, y, width, height]",)),
    Kind("area-negative", "coco", set_key("area", -3), AREAS),
    Kind("area-nan", "coco", set_key("area", NAN), AREAS),
    Kind("objects-60000", "coco", edit_json(add_many)),
    # COCO: segmentations
    Kind("polygon-of-two-points", "coco", set_key("segmentation", [[1, 1, 5, 5]]), SEGMENTATIONS),
    Kind("polygon-odd", "coco", set_key("segmentation", [[1, 1, 5, 5, 7, 7, 8]]), SEGMENTATIONS),
    Kind("polygon-nan", "coco", set_key("segmentation", [[1, 1, NAN, 5, 7, 7]]), SEGMENTATIONS),
    Kind("polygon-far", "coco", set_key("segmentation", [[0, 0, 1e9, 0, 1e9, 1e9]]), SEGMENTATIONS),
    Kind("polygon-words", "coco", set_key("segmentation", [["a"] * 6]), SEGMENTATIONS),
    Kind("polygon-leaves-image", "coco", set_key("segmentation", [[-50, -50, 100, -50, 100, 100]])),
    Kind("rle-of-other-size", "coco", set_key("segmentation", {"size": [10, 10], "counts": [0, 100]}), SEGMENTATIONS),
    Kind("rle-too-short", "coco", set_key("segmentation", {"size": [HEIGHT, WIDTH], "counts": [5, 5]}), SEGMENTATIONS),
    Kind("rle-negative", "coco", set_key("segmentation", {"size": [HEIGHT, WIDTH], "counts": [-1, 3073]}), SEGMENTATIONS),
    Kind("rle-garbage", "coco", set_key("segmentation", {"size": [HEIGHT, WIDTH], "counts": "~ garbage"}), SEGMENTATIONS),
    # images
    Kind("image-absent", "coco", lambda r: (r / "train/p0.jpg").unlink(), refused=("p0.jpg does not exist",), replaced=1),
    Kind("image-empty", "coco", overwrite("train/p0.jpg", b""), refused=("p0.jpg is empty or not an image",), replaced=1),
    Kind("image-is-text", "coco", overwrite("train/p0.jpg", "hello"), refused=("p0.jpg is empty or not an image",), replaced=1),
    Kind("image-is-a-program", "coco", overwrite("train/p0.jpg", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n"), refused=("p0.jpg is empty or not an image",), replaced=1),
    Kind("image-is-a-folder", "coco", lambda r: [(r / "train/p0.jpg").unlink(), (r / "train/p0.jpg").mkdir()], refused=("p0.jpg cannot be opened",), replaced=1),
    Kind("image-is-a-pipe", "coco", make_pipe("train/p0.jpg"), refused=("p0.jpg is a pipe or a device",), replaced=1),
    Kind("image-links-nowhere", "coco", lambda r: [(r / "train/p0.jpg").unlink(), os.symlink("gone", r / "train/p0.jpg")], refused=("p0.jpg does not exist",), replaced=1),
    Kind("image-truncated", "coco", truncate_image, refused=("p0.jpg is truncated or damaged",), fails_on_decode=True, replaced=1),
    Kind("image-of-no-pixels", "coco", overwrite("train/p0.jpg", png(0, 0)), refused=("p0.jpg",), replaced=1),
    Kind("bomb-png", "coco", overwrite("train/p0.jpg", png(30_000, 30_000)), refused=("more than 178956970 pixels",), replaced=1),
    Kind("bomb-gif", "coco", overwrite("train/p0.jpg", gif(65_000, 65_000)), refused=("more than 178956970 pixels",), replaced=1),
    Kind("bomb-tiff", "coco", overwrite("train/p0.jpg", tiff(65_000, 65_000)), refused=("more than 178956970 pixels",), replaced=1),
    Kind("bomb-in-text-chunk", "coco", overwrite("train/p0.jpg", png(WIDTH, HEIGHT, (b"zTXt", b"a\0\0" + zlib.compress(bytes(2 << 20))))), refused=("p0.jpg is truncated or damaged",), replaced=1),
    Kind("image-of-other-size", "coco", set_key("width", 65, "images"), refused=("p0.jpg is 64x48 pixels", "says 65x48"), replaced=1),
    Kind("image-1x1", "coco", resize(1, 1)),
    Kind("image-20000x200", "coco", resize(20_000, 200)),
    Kind("image-turned", "coco", rotate_by_exif),
    Kind("image-cmyk", "coco", store("CMYK", "JPEG")),
    Kind("image-gray-16-bit", "coco", store("I;16")),
    Kind("image-palette", "coco", store("P", transparency=0)),
    Kind("image-alpha", "coco", store("RGBA")),
    Kind("image-float", "coco", store("F", "TIFF"), refused=("p0.jpg holds floating-point numbers",), replaced=1),
    Kind("image-32-bit", "coco", store("I", "TIFF"), refused=("p0.jpg holds 32-bit integers",), replaced=1),
    Kind("all-images-absent", "coco", lambda r: shutil.rmtree(r / "train"), refused=("p0.jpg is absent there",)),
    # names and paths
    Kind("name-any-script", "coco", rename("снимок 画像 é\N{COMBINING ACUTE ACCENT} صورة 🐈.jpg")),
    Kind("name-windows-separators", "coco", lambda r: [rename("a/b.jpg")(r), set_key("file_name", "a\\b.jpg", "images")(r)]),
    Kind("name-lone-surrogate", "coco", set_key("file_name", "\ud800.jpg", "images"), refused=("not valid Unicode",)),
    Kind("name-null-byte", "coco", set_key("file_name", "a\0.jpg", "images"), refused=("must be a path relative to the data folder",)),
    Kind("name-too-long", "coco", set_key("file_name", "x" * 5000, "images"), refused=("File name too long",), replaced=1),
    Kind("path-absolute", "coco", set_key("file_name", "/etc/passwd", "images"), refused=("'/etc/passwd'", "relative to the data folder")),
    Kind("path-upwards", "coco", set_key("file_name", "../../../etc/passwd", "images"), refused=("lies outside the data folder",)),
    Kind("path-drive", "coco", set_key("file_name", "C:\\x.jpg", "images"), refused=("'C:/x.jpg'", "relative to the data folder")),
    Kind("path-server", "coco", set_key("file_name", "\\\\server\\x.jpg", "images"), refused=("relative to the data folder",)),
    Kind("links", "coco", link_images),
    # VOC
    Kind("bom-and-windows-ends-voc", "voc", convert_to_windows),
    Kind("xml-is-a-pipe", "voc", make_pipe(XML), refused=("p0.xml is a pipe or a device",)),
    Kind("voc-list-is-a-pipe", "voc", make_pipe(LIST), refused=("train.txt is a pipe or a device",)),
    Kind("xml-cut", "voc", lambda r: (r / XML).write_text((r / XML).read_text()[:90]), refused=("p0.xml is not valid xml",)),
    Kind("xml-empty", "voc", overwrite(XML, ""), refused=("p0.xml is not valid xml",)),
    Kind("xml-other-root", "voc", overwrite(XML, "<html/>"), refused=("p0.xml is not a VOC annotation", "<html>")),
    Kind("xml-billion-laughs", "voc", overwrite(XML, LAUGHS), refused=("p0.xml has a DOCTYPE",)),
    Kind("xml-external-entity", "voc", overwrite(XML, FOREIGN), refused=("p0.xml has a DOCTYPE",)),
    Kind("xml-nested", "voc", overwrite(XML, "<annotation>" + "<a>" * 50_000 + "</a>" * 50_000 + "</annotation>")),
    Kind("xml-no-bndbox", "voc", edit_text(XML, ("bndbox", "box"), ("/bndbox", "/box")), refused=("p0.xml: the <object> 'cat' has no <bndbox>",)),
    Kind("xml-no-name", "voc", edit_text(XML, ("<name>cat</name>", "")), refused=("p0.xml: an <object> has no <name>",)),
    Kind("xml-no-xmin", "voc", edit_text(XML, ("<xmin>9.0</xmin>", "")), refused=("p0.xml: <xmin> must be a number",)),
    Kind("xml-xmin-words", "voc", edit_text(XML, ("9.0", "left")), refused=("p0.xml: <xmin> must be a number, not 'left'",)),
    Kind("xml-xmin-nan", "voc", edit_text(XML, ("9.0", "nan")), {annotation_cleaning.NOT_FINITE: 1}),
    Kind("xml-corners-exchanged", "voc", edit_text(XML, ("<xmin>9.0", "<xmin>28.0"), ("<xmax>28.0", "<xmax>9.0")), {annotation_cleaning.NEGATIVE: 1}),
    Kind("xml-no-size", "voc", edit_text(XML, ("<size>", "<sizes>"), ("</size>", "</sizes>"))),
    Kind("xml-size-0", "voc", edit_text(XML, ("<width>64", "<width>0"))),
    Kind("xml-other-size", "voc", edit_text(XML, ("<width>64", "<width>99")), refused=("p0.jpg is 64x48 pixels", "says 99x48")),
    Kind("voc-annotation-absent", "voc", lambda r: (r / XML).unlink(), refused=("lists p0, but its annotation", "does not exist")),
    Kind("voc-listed-twice", "voc", lambda r: (r / LIST).write_text((r / LIST).read_text() + "p0\n"), {annotation_cleaning.LISTED_TWICE: 1}),
    Kind("voc-list-empty", "voc", overwrite(LIST, "\n"), refused=("train.txt lists no images",)),
    Kind("voc-path-upwards", "voc", lambda r: (r / LIST).write_text("../../../x\n"), refused=("lies outside the data folder",)),
    Kind("voc-class-unknown", "voc", overwrite("labels.txt", "cat\n"), refused=(".xml: unknown class 'dog'",)),
    # YOLO
    Kind("bom-and-windows-ends-yolo", "yolo", convert_to_windows),
    Kind("txt-values-above-1", "yolo", overwrite(TXT, "0 0.5 0.5 1.7 0.5\n"), {annotation_cleaning.CLIPPED: 1}),
    Kind("txt-pixels-for-shares", "yolo", overwrite(TXT, "0 20 20 10 10\n"), {annotation_cleaning.OUTSIDE: 1}),
    Kind("txt-4-columns", "yolo", overwrite(TXT, "0 0.5 0.5 0.5\n"), refused=("p0.txt, line 1: 4 values",)),
    Kind("txt-class-beyond", "yolo", overwrite(TXT, "0 0.5 0.5 0.5 0.5\n7 0.5 0.5 0.5 0.5\n"), refused=("p0.txt, line 2: class 7 is not among",)),
    Kind("txt-words", "yolo", overwrite(TXT, "cat 0.5 0.5 0.5 0.5\n"), refused=("p0.txt, line 1", "not a number")),
    Kind("txt-nan", "yolo", overwrite(TXT, "0 nan 0.5 0.5 0.5\n"), {annotation_cleaning.NOT_FINITE: 1}),
    Kind("txt-segmentation-far", "yolo", overwrite(TXT, "0 0.1 0.1 1e9 0.1 0.5 1e9\n"), {annotation_cleaning.BAD_SEGMENTATION: 1, annotation_cleaning.CLIPPED: 1}),
    Kind("txt-empty", "yolo", overwrite(TXT, "")),
    Kind("txt-absent", "yolo", lambda r: (r / TXT).unlink(), {annotation_cleaning.NO_LABELS: 1}),
    Kind("txt-is-a-pipe", "yolo", make_pipe(TXT), {annotation_cleaning.NO_LABELS: 1}),
    Kind("txt-not-text", "yolo", overwrite(TXT, b"\xff\xfe0\0"), refused=("p0.txt is not UTF-8",)),
    Kind("yaml-tab", "yolo", overwrite("data.yaml", "names:\t[cat\n train: images"), refused=("data.yaml is not valid YAML",)),
    Kind("yaml-is-a-pipe", "yolo", make_pipe("data.yaml"), refused=("has no data.yaml",)),
    Kind("yaml-laughs-names", "yolo", expand_aliases("names"), refused=("data.yaml is larger than any YOLO data file",)),
    Kind("yaml-laughs-nc", "yolo", expand_aliases("nc"), refused=("data.yaml is larger than any YOLO data file",)),
    Kind("yaml-laughs-path", "yolo", expand_aliases("path"), refused=("data.yaml is larger than any YOLO data file",)),
    Kind("yaml-laughs-train", "yolo", expand_aliases("train"), refused=("data.yaml is larger than any YOLO data file",)),
    Kind("yaml-nc-differs", "yolo", edit_text("data.yaml", ("names", "nc: 3\nnames")), refused=("data.yaml: 'nc' is '3'", "lists 2 classes")),
    Kind("yaml-code", "yolo", edit_text("data.yaml", ("[cat, dog]", "!!python/object/apply:os.system ['touch pwned']")), refused=("p0.txt, line 2: class 1 is not among",)),
    Kind("yaml-path-upwards", "yolo", edit_text("data.yaml", ("images/train", "../../../etc")), refused=("lies outside the data folder",)),
    Kind("yolo-list-elsewhere", "yolo", lambda r: [edit_text("data.yaml", ("images/train", "l.txt"))(r), (r / "l.txt").write_text("/etc/x.jpg\n")], refused=("l.txt names the file '/etc/x.jpg'", "outside the data folder")),
    Kind("yolo-data-elsewhere", "yolo", move_data),
    Kind("yolo-image-bad", "yolo", overwrite("images/train/p0.jpg", b"no"), refused=("p0.jpg is empty or not an image",)),
    Kind("yolo-image-float", "yolo", store("F", "TIFF", "images/train/p0.jpg"), refused=("p0.jpg holds floating-point numbers",), replaced=1),
    Kind("yolo-links-in-a-circle", "yolo", link_in_cycle, {annotation_cleaning.NO_IMAGE_FILE: 1}),
]  # fmt: skip
