"""Bad datasets: good small ones in COCO, VOC or YOLO form, each broken in one way, with what fusedet promises to do with it."""

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
BOX = (8.0, 6.0, 28.0, 30.0)  # x1, y1, x2, y2 of the first object of each image
OTHER = (30.0, 10.0, 60.0, 44.0)


@dataclass(frozen=True)
class Kind:
    """One way to be bad.

    trained through where `refused` is empty, with exactly the counted `problems` of the training split; else refused before the training
    with a sentence that holds all of the words. met: only reading the pixels tells, so the training stops there. replaced: how many
    images train.on_bad_image=skip replaces in an epoch.
    """

    name: str
    form: str
    spoil: Callable[[Path], Any]
    problems: dict[str, int] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    met: bool = False
    replaced: int = 0


# -- good data


def good(root: Path, form: str) -> Path:
    """A sound dataset: noise with two objects in each image; returns the folder."""
    rng = np.random.default_rng(0)
    splits = {"train": range(TRAIN), "val": range(TRAIN, TRAIN + VAL)}
    folder = {"coco": "{split}", "voc": "JPEGImages", "yolo": "images/{split}"}[form]
    for split, numbers in splits.items():
        for i in numbers:
            file = root / folder.format(split=split) / f"p{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(file, quality=90)
        {"coco": _coco, "voc": _voc, "yolo": _yolo}[form](root, split, numbers)
    return root


def _coco(root: Path, split: str, numbers: range) -> None:
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


def _voc(root: Path, split: str, numbers: range) -> None:
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i in numbers:
        objects = [(name, b[0] + 1, b[1] + 1, b[2], b[3], 0) for name, b in zip(CLASSES, (BOX, OTHER))]
        (root / "Annotations" / f"p{i}.xml").write_text(xml(*objects, name=f"p{i}", width=WIDTH, height=HEIGHT))
    (root / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"p{i}\n" for i in numbers))


def _yolo(root: Path, split: str, numbers: range) -> None:
    (root / "labels" / split).mkdir(parents=True)
    lines = []
    for k, (x1, y1, x2, y2) in enumerate((BOX, OTHER)):
        w, h = (x2 - x1) / WIDTH, (y2 - y1) / HEIGHT
        lines.append(f"{k} {x1 / WIDTH + w / 2:.6f} {y1 / HEIGHT + h / 2:.6f} {w:.6f} {h:.6f}\n")
    for i in numbers:
        (root / "labels" / split / f"p{i}.txt").write_text("".join(lines))
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat, dog]\n")


# -- ways to spoil it

JSON = "annotations/instances_train.json"


def coco(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """The training json changed."""

    def spoil(root: Path) -> None:
        content = json.loads((root / JSON).read_text())
        change(content)
        (root / JSON).write_text(json.dumps(content))

    return spoil


def text(file: str, *pairs: tuple[str, str]) -> Callable[[Path], None]:
    """A text file with parts replaced, each once."""

    def spoil(root: Path) -> None:
        content = (root / file).read_text()
        for old, new in pairs:
            assert old in content, old
            content = content.replace(old, new, 1)
        (root / file).write_text(content)

    return spoil


def data(file: str, content: bytes | str) -> Callable[[Path], None]:
    """A file with other content."""
    return lambda root: (root / file).write_bytes(content.encode() if isinstance(content, str) else content)


def first(key: str, value: Any, section: str = "annotations") -> Callable[[Path], None]:
    """A key of the first entry set."""
    return coco(lambda content: content[section][0].update({key: value}))


def without(key: str, section: str = "annotations") -> Callable[[Path], None]:
    """A key of the first entry taken away."""
    return coco(lambda content: content[section][0].pop(key))


def again(section: str, **values: Any) -> Callable[[Path], None]:
    """The first entry once more, with some values changed."""
    return coco(lambda content: content[section].append(content[section][0] | values))


def stored(mode: str, form: str = "PNG", at: str = "train/p0.jpg", **options: Any) -> Callable[[Path], None]:
    """The first image in another mode and format, under its old name."""

    def spoil(root: Path) -> None:
        file = root / at
        with Image.open(file) as image:
            image = (
                Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
                if mode == "I;16"
                else image.convert(mode)
            )
        image.save(file, form, **options)

    return spoil


def resized(width: int, height: int) -> Callable[[Path], None]:
    """The first image of another size, and annotated so, with one object that fills it."""

    def spoil(root: Path) -> None:
        Image.new("RGB", (width, height)).save(root / "train/p0.jpg", "PNG")
        coco(lambda c: c["images"][0].update(width=width, height=height))(root)
        coco(lambda c: c["annotations"][0].update(bbox=[0, 0, width, height], segmentation=[]))(root)
        coco(lambda c: c["annotations"].pop(1))(root)

    return spoil


def turned(root: Path) -> None:
    """EXIF says that the image is to be turned by 90 degrees; the annotation is of the turned one."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(root / "train/p0.jpg", exif=exif)


def png(width: int, height: int, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG whose header promises that many pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        *more,
        (b"IDAT", zlib.compress(bytes(99))),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def gif(width: int, height: int) -> bytes:
    """A GIF whose header promises that many pixels."""
    return (
        b"GIF89a"
        + struct.pack("<HH", width, height)
        + b"\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0"
        + struct.pack("<HH", width, height)
        + b"\0\2\2D\1\0;"
    )


def tiff(width: int, height: int) -> bytes:
    """A TIFF whose header promises that many pixels."""
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: width}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


def cut(root: Path) -> None:
    """The first image's file ends too early; its header is whole."""
    file = root / "train/p0.jpg"
    file.write_bytes(file.read_bytes()[:-400])


def many(content: dict[str, Any]) -> None:
    """60,000 objects in the first image."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, [WIDTH - 2, HEIGHT - 2, 20, 20], (60_000, 4))
    corners[:, 2:] = np.minimum(corners[:, 2:] + 1, [WIDTH, HEIGHT] - corners[:, :2])
    for i, box in enumerate(corners.tolist()):
        content["annotations"].append(
            {"id": 100 + i, "image_id": 0, "category_id": 1 + i % 2, "bbox": box, "area": box[2] * box[3]}
        )


def renamed(name: str) -> Callable[[Path], None]:
    """The first image under another name."""

    def spoil(root: Path) -> None:
        (root / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "train/p0.jpg").rename(root / "train" / name)
        first("file_name", name, "images")(root)

    return spoil


def linked(root: Path) -> None:
    """The image folder is a link to one outside the data folder, and in it an image is a link to its neighbour."""
    away = root.parent / f"{root.name}-images"
    shutil.move(root / "train", away)
    os.symlink(away, root / "train")
    (away / "p0.jpg").unlink()
    os.symlink("p1.jpg", away / "p0.jpg")


def moved(root: Path) -> None:
    """The images and labels are in a folder elsewhere, which the yaml names."""
    away = root.parent / f"{root.name}-elsewhere"
    for folder in ("images", "labels"):
        shutil.move(root / folder, away / folder)
    text("data.yaml", ("train:", f"path: {away}\ntrain:"))(root)


def looped(root: Path) -> None:
    """An image folder holds a link to itself, and one to another folder of images."""
    (root / "images/more").mkdir()
    (root / "images/train/p0.jpg").rename(root / "images/more/p0.jpg")
    os.symlink("..", root / "images/train/up")
    os.symlink(root / "images/more", root / "images/train/more")
    shutil.rmtree(root / "images/val")
    text("data.yaml", ("val: images/val", "val: images/more"))(root)
    for folder in ("labels/more", "labels/train/more"):
        (root / folder).mkdir()
        shutil.copy(root / "labels/train/p0.txt", root / folder)


def as_windows(root: Path) -> None:
    """All text files with Windows' line ends and a byte order mark."""
    for file in [*root.rglob("*.txt"), *root.rglob("*.xml"), *root.rglob("*.json"), *root.rglob("*.yaml")]:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))


def both_splits(root: Path) -> None:
    """A training image is in the validation split too."""
    val = root / "annotations/instances_val.json"
    content = json.loads(val.read_text())
    content["images"].append({"id": 0, "file_name": "../train/p0.jpg", "width": WIDTH, "height": HEIGHT})
    val.write_text(json.dumps(content))


def bare(content: dict[str, Any]) -> None:
    content["annotations"].clear()


def piped(file: str) -> Callable[[Path], Any]:
    """A file is a named pipe, which would be read for ever."""
    return lambda root: [(root / file).unlink(missing_ok=True), os.mkfifo(root / file)]


def laughing(key: str) -> Callable[[Path], None]:
    """A key of a data.yaml is a list of lists of lists ..., half a million values in a few hundred characters."""
    lists = [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcde", "bcdef")]
    rest = {"train": "images/train", "val": "images/val", "names": "[cat, dog]", key: "*f"}
    return data(
        "data.yaml",
        "\n".join(["a: &a [x, x, x, x, x, x, x, x, x]", *lists, *(f"{k}: {v}" for k, v in rest.items()), ""]),
    )


LAUGHS = '<!DOCTYPE a [<!ENTITY a "ha">' + "".join(
    f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi")
) + "]><annotation><filename>&i;</filename></annotation>"  # fmt: skip
FOREIGN = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><filename>&x;</filename></annotation>'
XML, TXT, LIST = "Annotations/p0.xml", "labels/train/p0.txt", "ImageSets/Main/train.txt"
OUTLINES, AREAS = {annotation_cleaning.BAD_SEGMENTATION: 1}, {annotation_cleaning.BAD_AREA: 1}
NAN, INF = float("nan"), float("inf")

KINDS = [
    # COCO: the file
    Kind("json-empty", "coco", data(JSON, ""), refused=("instances_train.json is not valid json", "line 1")),
    Kind("json-array", "coco", data(JSON, "[1, 2]"), refused=("instances_train.json is not COCO", "not a list")),
    Kind("json-no-images", "coco", data(JSON, '{"categories": []}'), refused=("the key 'images' is missing",)),
    Kind("json-trailing-comma", "coco", text(JSON, ('"images": [', '"images": [,')), refused=("not valid json: line 1, column",)),
    Kind("json-cut", "coco", lambda r: (r / JSON).write_text((r / JSON).read_text()[:300]), refused=("not valid json: line 1",)),
    Kind("json-nested", "coco", data(JSON, "[" * 200_000), refused=("instances_train.json is not valid json",)),
    Kind("json-latin1", "coco", data(JSON, b'{"images": "\xe9"}'), refused=("instances_train.json is not UTF-8",)),
    Kind("json-null-sections", "coco", coco(lambda c: c.update(annotations=None)), refused=("'annotations' must be a list, not null",)),
    Kind("another-json-is-a-pipe", "coco", piped("notes.json")),
    Kind("json-is-a-pipe", "coco", piped(JSON), refused=("instances_train.json is a pipe or a device",)),
    Kind("bom-and-windows-ends-coco", "coco", as_windows),
    # COCO: entries
    Kind("key-missing-bbox", "coco", without("bbox"), refused=("annotation 1 has no 'bbox'",)),
    Kind("key-missing-category", "coco", without("category_id"), refused=("annotation 1 has no 'category_id'",)),
    Kind("key-missing-height", "coco", without("height", "images"), refused=("image 0 has no 'height'",)),
    Kind("category-unknown", "coco", first("category_id", 99), refused=("annotation 1 has the category id 99",)),
    Kind("category-listed-not", "coco", coco(lambda c: c.update(categories=[])), refused=("'categories' is empty",)),
    Kind("category-name-empty", "coco", first("name", "", "categories"), refused=("'name' of category 1 must be a text",)),
    Kind("category-name-number", "coco", first("name", 7, "categories"), refused=("'name' of category 1 must be a text, not 7",)),
    Kind("classes-differ", "coco", first("name", "cow", "categories"), refused=("class names", "only train knows cow")),
    Kind("image-id-twice", "coco", again("images", file_name="p1.jpg"), refused=("the image id 0 is given more than once",)),
    Kind("category-id-twice", "coco", again("categories", name="x"), refused=("the category id 1 is given more than once",)),
    Kind("annotation-id-twice", "coco", again("annotations", bbox=[1, 1, 9, 9]), {annotation_cleaning.SAME_ID: 1}),
    Kind("annotation-of-no-image", "coco", first("image_id", 4711), {annotation_cleaning.NO_IMAGE: 1}),
    Kind("ids-negative", "coco", coco(lambda c: [c["images"][0].update(id=-5), c["annotations"][0].update(image_id=-5)] and c["annotations"].pop(1))),
    Kind("ids-as-text", "coco", first("image_id", "0")),
    Kind("id-boolean", "coco", first("image_id", True), refused=("'image_id' of annotation 1 must be an integer, not True",)),
    Kind("id-huge", "coco", first("image_id", 10**30), refused=("'image_id' of annotation 1 is too large",)),
    Kind("iscrowd-2", "coco", first("iscrowd", 2)),
    Kind("iscrowd-text", "coco", first("iscrowd", "maybe"), refused=("'iscrowd' of annotation 1 must be an integer",)),
    Kind("size-0x0", "coco", coco(lambda c: c["images"][0].update(width=0, height=0)), refused=("image 0 (p0.jpg) is 0x0 pixels",)),
    Kind("no-object-at-all", "coco", coco(bare), refused=("instances_train.json has no objects",)),
    Kind("empty-images", "coco", coco(lambda c: c.update(annotations=c["annotations"][:2]))),
    Kind("in-train-and-val", "coco", both_splits),
    # COCO: boxes
    Kind("bbox-nan", "coco", first("bbox", [NAN, 1, 2, 3]), {annotation_cleaning.NOT_FINITE: 1}),
    Kind("bbox-infinite", "coco", first("bbox", [1, 1, INF, 3]), {annotation_cleaning.NOT_FINITE: 1}),
    Kind("bbox-huge", "coco", first("bbox", [1, 1, 1e300, 1e300]), {annotation_cleaning.NOT_FINITE: 1}),
    Kind("bbox-large", "coco", first("bbox", [-1e7, -1e7, 3e7, 3e7]), {annotation_cleaning.CLIPPED: 1}),
    Kind("bbox-negative", "coco", first("bbox", [9, 9, -5, 4]), {annotation_cleaning.NEGATIVE: 1}),
    Kind("bbox-no-area", "coco", first("bbox", [9, 9, 0, 4]), {annotation_cleaning.NO_AREA: 1}),
    Kind("bbox-outside", "coco", first("bbox", [500, 9, 5, 4]), {annotation_cleaning.OUTSIDE: 1}),
    Kind("bbox-partly-outside", "coco", first("bbox", [50, 9, 50, 4]), {annotation_cleaning.CLIPPED: 1}),
    Kind("bbox-twice", "coco", again("annotations", id=99), {annotation_cleaning.REPEATED: 1}),
    Kind("bbox-text", "coco", first("bbox", ["8", "6.5", "2e1", " 7 "]), {annotation_cleaning.AS_TEXT: 1}),
    Kind("bbox-words", "coco", first("bbox", ["a", 1, 2, 3]), refused=("'bbox' of annotation 1 must hold numbers, not 'a'",)),
    Kind("bbox-nested", "coco", first("bbox", [[1, 2], 3, 4, 5]), refused=("'bbox' of annotation 1 must hold numbers",)),
    Kind("bbox-boolean", "coco", first("bbox", [True, 1, 2, 3]), refused=("'bbox' of annotation 1 must hold numbers, not True",)),
    Kind("bbox-of-three", "coco", first("bbox", [1, 2, 3]), refused=("'bbox' of annotation 1 must be [x, y, width, height]",)),
    Kind("bbox-null", "coco", first("bbox", None), refused=("'bbox' of annotation 1 must be [x, y, width, height]",)),
    Kind("area-negative", "coco", first("area", -3), AREAS),
    Kind("area-nan", "coco", first("area", NAN), AREAS),
    Kind("objects-60000", "coco", coco(many)),
    # COCO: segmentations
    Kind("polygon-of-two-points", "coco", first("segmentation", [[1, 1, 5, 5]]), OUTLINES),
    Kind("polygon-odd", "coco", first("segmentation", [[1, 1, 5, 5, 7, 7, 8]]), OUTLINES),
    Kind("polygon-nan", "coco", first("segmentation", [[1, 1, NAN, 5, 7, 7]]), OUTLINES),
    Kind("polygon-far", "coco", first("segmentation", [[0, 0, 1e9, 0, 1e9, 1e9]]), OUTLINES),
    Kind("polygon-words", "coco", first("segmentation", [["a"] * 6]), OUTLINES),
    Kind("polygon-leaves-image", "coco", first("segmentation", [[-50, -50, 100, -50, 100, 100]])),
    Kind("rle-of-other-size", "coco", first("segmentation", {"size": [10, 10], "counts": [0, 100]}), OUTLINES),
    Kind("rle-too-short", "coco", first("segmentation", {"size": [HEIGHT, WIDTH], "counts": [5, 5]}), OUTLINES),
    Kind("rle-negative", "coco", first("segmentation", {"size": [HEIGHT, WIDTH], "counts": [-1, 3073]}), OUTLINES),
    Kind("rle-garbage", "coco", first("segmentation", {"size": [HEIGHT, WIDTH], "counts": "~ garbage"}), OUTLINES),
    # images
    Kind("image-absent", "coco", lambda r: (r / "train/p0.jpg").unlink(), refused=("p0.jpg does not exist",), replaced=1),
    Kind("image-empty", "coco", data("train/p0.jpg", b""), refused=("p0.jpg is empty or not an image",), replaced=1),
    Kind("image-is-text", "coco", data("train/p0.jpg", "hello"), refused=("p0.jpg is empty or not an image",), replaced=1),
    Kind("image-is-a-program", "coco", data("train/p0.jpg", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n"), refused=("p0.jpg is empty or not an image",), replaced=1),
    Kind("image-is-a-folder", "coco", lambda r: [(r / "train/p0.jpg").unlink(), (r / "train/p0.jpg").mkdir()], refused=("p0.jpg cannot be opened",), replaced=1),
    Kind("image-is-a-pipe", "coco", piped("train/p0.jpg"), refused=("p0.jpg is a pipe or a device",), replaced=1),
    Kind("image-links-nowhere", "coco", lambda r: [(r / "train/p0.jpg").unlink(), os.symlink("gone", r / "train/p0.jpg")], refused=("p0.jpg does not exist",), replaced=1),
    Kind("image-truncated", "coco", cut, refused=("p0.jpg is truncated or damaged",), met=True, replaced=1),
    Kind("image-of-no-pixels", "coco", data("train/p0.jpg", png(0, 0)), refused=("p0.jpg",), replaced=1),
    Kind("bomb-png", "coco", data("train/p0.jpg", png(30_000, 30_000)), refused=("more than 178956970 pixels",), replaced=1),
    Kind("bomb-gif", "coco", data("train/p0.jpg", gif(65_000, 65_000)), refused=("more than 178956970 pixels",), replaced=1),
    Kind("bomb-tiff", "coco", data("train/p0.jpg", tiff(65_000, 65_000)), refused=("more than 178956970 pixels",), replaced=1),
    Kind("bomb-in-text-chunk", "coco", data("train/p0.jpg", png(WIDTH, HEIGHT, (b"zTXt", b"a\0\0" + zlib.compress(bytes(2 << 20))))), refused=("p0.jpg is truncated or damaged",), replaced=1),
    Kind("image-of-other-size", "coco", first("width", 65, "images"), refused=("p0.jpg is 64x48 pixels", "says 65x48"), replaced=1),
    Kind("image-1x1", "coco", resized(1, 1)),
    Kind("image-20000x200", "coco", resized(20_000, 200)),
    Kind("image-turned", "coco", turned),
    Kind("image-cmyk", "coco", stored("CMYK", "JPEG")),
    Kind("image-grey-16-bit", "coco", stored("I;16")),
    Kind("image-palette", "coco", stored("P", transparency=0)),
    Kind("image-alpha", "coco", stored("RGBA")),
    Kind("image-float", "coco", stored("F", "TIFF"), refused=("p0.jpg holds floating-point numbers",), replaced=1),
    Kind("image-32-bit", "coco", stored("I", "TIFF"), refused=("p0.jpg holds 32-bit integers",), replaced=1),
    Kind("all-images-absent", "coco", lambda r: shutil.rmtree(r / "train"), refused=("p0.jpg is absent there",)),
    # names and paths
    Kind("name-any-script", "coco", renamed("снимок 画像 é\N{COMBINING ACUTE ACCENT} صورة 🐈.jpg")),
    Kind("name-windows-separators", "coco", lambda r: [renamed("a/b.jpg")(r), first("file_name", "a\\b.jpg", "images")(r)]),
    Kind("name-lone-surrogate", "coco", first("file_name", "\ud800.jpg", "images"), refused=("not valid Unicode",)),
    Kind("name-null-byte", "coco", first("file_name", "a\0.jpg", "images"), refused=("must be a path relative to the data folder",)),
    Kind("name-too-long", "coco", first("file_name", "x" * 5000, "images"), refused=("File name too long",), replaced=1),
    Kind("path-absolute", "coco", first("file_name", "/etc/passwd", "images"), refused=("'/etc/passwd'", "relative to the data folder")),
    Kind("path-upwards", "coco", first("file_name", "../../../etc/passwd", "images"), refused=("lies outside the data folder",)),
    Kind("path-drive", "coco", first("file_name", "C:\\x.jpg", "images"), refused=("'C:/x.jpg'", "relative to the data folder")),
    Kind("path-server", "coco", first("file_name", "\\\\server\\x.jpg", "images"), refused=("relative to the data folder",)),
    Kind("links", "coco", linked),
    # VOC
    Kind("bom-and-windows-ends-voc", "voc", as_windows),
    Kind("xml-is-a-pipe", "voc", piped(XML), refused=("p0.xml is a pipe or a device",)),
    Kind("voc-list-is-a-pipe", "voc", piped(LIST), refused=("train.txt is a pipe or a device",)),
    Kind("xml-cut", "voc", lambda r: (r / XML).write_text((r / XML).read_text()[:90]), refused=("p0.xml is not valid xml",)),
    Kind("xml-empty", "voc", data(XML, ""), refused=("p0.xml is not valid xml",)),
    Kind("xml-other-root", "voc", data(XML, "<html/>"), refused=("p0.xml is not a VOC annotation", "<html>")),
    Kind("xml-billion-laughs", "voc", data(XML, LAUGHS), refused=("p0.xml has a DOCTYPE",)),
    Kind("xml-external-entity", "voc", data(XML, FOREIGN), refused=("p0.xml has a DOCTYPE",)),
    Kind("xml-nested", "voc", data(XML, "<annotation>" + "<a>" * 50_000 + "</a>" * 50_000 + "</annotation>")),
    Kind("xml-no-bndbox", "voc", text(XML, ("bndbox", "box"), ("/bndbox", "/box")), refused=("p0.xml: the <object> 'cat' has no <bndbox>",)),
    Kind("xml-no-name", "voc", text(XML, ("<name>cat</name>", "")), refused=("p0.xml: an <object> has no <name>",)),
    Kind("xml-no-xmin", "voc", text(XML, ("<xmin>9.0</xmin>", "")), refused=("p0.xml: <xmin> must be a number",)),
    Kind("xml-xmin-words", "voc", text(XML, ("9.0", "left")), refused=("p0.xml: <xmin> must be a number, not 'left'",)),
    Kind("xml-xmin-nan", "voc", text(XML, ("9.0", "nan")), {annotation_cleaning.NOT_FINITE: 1}),
    Kind("xml-corners-exchanged", "voc", text(XML, ("<xmin>9.0", "<xmin>28.0"), ("<xmax>28.0", "<xmax>9.0")), {annotation_cleaning.NEGATIVE: 1}),
    Kind("xml-no-size", "voc", text(XML, ("<size>", "<sizes>"), ("</size>", "</sizes>"))),
    Kind("xml-size-0", "voc", text(XML, ("<width>64", "<width>0"))),
    Kind("xml-other-size", "voc", text(XML, ("<width>64", "<width>99")), refused=("p0.jpg is 64x48 pixels", "says 99x48")),
    Kind("voc-annotation-absent", "voc", lambda r: (r / XML).unlink(), refused=("lists p0, but its annotation", "does not exist")),
    Kind("voc-listed-twice", "voc", lambda r: (r / LIST).write_text((r / LIST).read_text() + "p0\n"), {annotation_cleaning.LISTED_TWICE: 1}),
    Kind("voc-list-empty", "voc", data(LIST, "\n"), refused=("train.txt lists no images",)),
    Kind("voc-path-upwards", "voc", lambda r: (r / LIST).write_text("../../../x\n"), refused=("lies outside the data folder",)),
    Kind("voc-class-unknown", "voc", data("labels.txt", "cat\n"), refused=(".xml: unknown class 'dog'",)),
    # YOLO
    Kind("bom-and-windows-ends-yolo", "yolo", as_windows),
    Kind("txt-values-above-1", "yolo", data(TXT, "0 0.5 0.5 1.7 0.5\n"), {annotation_cleaning.CLIPPED: 1}),
    Kind("txt-pixels-for-shares", "yolo", data(TXT, "0 20 20 10 10\n"), {annotation_cleaning.OUTSIDE: 1}),
    Kind("txt-4-columns", "yolo", data(TXT, "0 0.5 0.5 0.5\n"), refused=("p0.txt, line 1: 4 values",)),
    Kind("txt-class-beyond", "yolo", data(TXT, "0 0.5 0.5 0.5 0.5\n7 0.5 0.5 0.5 0.5\n"), refused=("p0.txt, line 2: class 7 is not among",)),
    Kind("txt-words", "yolo", data(TXT, "cat 0.5 0.5 0.5 0.5\n"), refused=("p0.txt, line 1", "not a number")),
    Kind("txt-nan", "yolo", data(TXT, "0 nan 0.5 0.5 0.5\n"), {annotation_cleaning.NOT_FINITE: 1}),
    Kind("txt-segmentation-far", "yolo", data(TXT, "0 0.1 0.1 1e9 0.1 0.5 1e9\n"), {annotation_cleaning.BAD_SEGMENTATION: 1, annotation_cleaning.CLIPPED: 1}),
    Kind("txt-empty", "yolo", data(TXT, "")),
    Kind("txt-absent", "yolo", lambda r: (r / TXT).unlink(), {annotation_cleaning.NO_LABELS: 1}),
    Kind("txt-is-a-pipe", "yolo", piped(TXT), {annotation_cleaning.NO_LABELS: 1}),
    Kind("txt-not-text", "yolo", data(TXT, b"\xff\xfe0\0"), refused=("p0.txt is not UTF-8",)),
    Kind("yaml-tab", "yolo", data("data.yaml", "names:\t[cat\n train: images"), refused=("data.yaml is not valid YAML",)),
    Kind("yaml-is-a-pipe", "yolo", piped("data.yaml"), refused=("has no data.yaml",)),
    Kind("yaml-laughs-names", "yolo", laughing("names"), refused=("data.yaml is larger than any YOLO data file",)),
    Kind("yaml-laughs-nc", "yolo", laughing("nc"), refused=("data.yaml is larger than any YOLO data file",)),
    Kind("yaml-laughs-path", "yolo", laughing("path"), refused=("data.yaml is larger than any YOLO data file",)),
    Kind("yaml-laughs-train", "yolo", laughing("train"), refused=("data.yaml is larger than any YOLO data file",)),
    Kind("yaml-nc-differs", "yolo", text("data.yaml", ("names", "nc: 3\nnames")), refused=("data.yaml: 'nc' is '3'", "lists 2 classes")),
    Kind("yaml-code", "yolo", text("data.yaml", ("[cat, dog]", "!!python/object/apply:os.system ['touch pwned']")), refused=("p0.txt, line 2: class 1 is not among",)),
    Kind("yaml-path-upwards", "yolo", text("data.yaml", ("images/train", "../../../etc")), refused=("lies outside the data folder",)),
    Kind("yolo-list-elsewhere", "yolo", lambda r: [text("data.yaml", ("images/train", "l.txt"))(r), (r / "l.txt").write_text("/etc/x.jpg\n")], refused=("l.txt names the file '/etc/x.jpg'", "outside the data folder")),
    Kind("yolo-data-elsewhere", "yolo", moved),
    Kind("yolo-image-bad", "yolo", data("images/train/p0.jpg", b"no"), refused=("p0.jpg is empty or not an image",)),
    Kind("yolo-image-float", "yolo", stored("F", "TIFF", "images/train/p0.jpg"), refused=("p0.jpg holds floating-point numbers",), replaced=1),
    Kind("yolo-links-in-a-circle", "yolo", looped),
]  # fmt: skip
