"""YOLO datasets (a data.yaml, and a text file of normalised boxes or segmentations per image) into DetectionDataset."""

from __future__ import annotations

import math
import os
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fusedet.config.loading import LARGEST, LONGEST, count_values
from fusedet.data import annotation_cleaning
from fusedet.data.dataset import DetectionDataset, pack_segmentation
from fusedet.data.image_files import (
    is_inside,
    list_images,
    normalize_split_name,
    read_image_sizes,
    read_text,
    require_valid_unicode,
    resolve_inside,
    select_split,
)
from fusedet.data.segmentation import is_drawable
from fusedet.errors import InputError

_NOT_SPLITS = {"path", "names", "nc", "download", "roboflow", "kpt_shape", "flip_idx", "channels"}
_NOTHING = {"", "null", "~"}


def read_yolo(yaml_file: str | Path, split: str) -> DetectionDataset:
    """Read a split that a data.yaml names, or a list of images (split ends in .txt).

    Label files lie in folders `labels` beside the folders `images`, or beside the images.
    Label lines are `class cx cy w h` or `class x1 y1 x2 y2 x3 y3 ...`, normalised to the image after EXIF rotation.
    An image without a label file is background. Category ids are YOLO's own class numbers; image ids count from 1.
    Raises InputError with file and line for a line that is malformed or of an unknown class.
    """
    file = Path(yaml_file)
    data = load_data_yaml(file)
    names = _names(data, file)
    root = _root(data, file)
    listed = _images(split if split.endswith(".txt") else select_split(_entries(data), split, file), root, file)
    if not listed:
        raise InputError(f"the split '{split}' of {file} holds no images")
    paths = list(dict.fromkeys(listed))
    sizes = read_image_sizes(paths)
    labels_of = {number: label for label, number in enumerate(names)}
    image_indices: list[int] = []
    labels: list[int] = []
    boxes: list[tuple[float, ...]] = []
    segmentations: list[bytes] = []
    bare = lost = 0
    for i, path in enumerate(paths):
        beside = os.path.splitext(path)[0] + ".txt"
        label_file = next(filter(os.path.isfile, (get_label_path(path), beside)), None)
        if label_file is None:
            bare += 1
            continue
        height, width = sizes[i].tolist()
        for number, values, where in _lines(Path(label_file)):
            if number not in labels_of:
                raise InputError(f"{where}: class {number} is not among the classes {_span(list(names))} of {file}")
            box, polygon = _object(values, height, width)
            image_indices.append(i)
            labels.append(labels_of[number])
            boxes.append(box)
            segmentations.append(pack_segmentation(polygon and [polygon]))
            lost += len(values) > 4 and polygon is None
    return annotation_cleaning.build_clean_dataset(
        names.values(),
        names,
        image_ids=np.arange(1, len(paths) + 1),
        sizes=sizes,
        paths=paths,
        image_indices=np.array(image_indices, dtype=np.int64),
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        labels=np.array(labels, dtype=np.int64),
        ignore=np.zeros(len(image_indices), dtype=bool),
        segmentations=segmentations,
        source=f"{file} ({split})",
        dataset_format="yolo",
        problems={
            annotation_cleaning.LISTED_TWICE: len(listed) - len(paths),
            annotation_cleaning.NO_LABELS: bare,
            annotation_cleaning.BAD_SEGMENTATION: lost,
        },
    )


def load_data_yaml(file: Path) -> dict[str, Any]:
    """A data.yaml with all values as texts (a class called `no` stays "no"). Raises InputError, also for more values than a config has."""
    text = read_text(file)
    try:
        large = len(text) > LONGEST
        data = None if large else yaml.load(text, yaml.BaseLoader)
        large = large or count_values(yaml.compose(text, yaml.BaseLoader), {}) > LARGEST
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if large:
        raise InputError(
            f"{file} is larger than any YOLO data file: it has more than {LONGEST} characters, or {LARGEST} values"
        )
    if not isinstance(data, dict) or "names" not in data:
        raise InputError(f"{file} is not a YOLO data file: it must hold 'names', 'train' and 'val'")
    return data


def list_yolo_splits(yaml_file: str | Path) -> dict[str, str]:
    """The splits that a data.yaml names, and where each comes from. Raises InputError."""
    return {name: ", ".join(entries) for name, entries in _entries(load_data_yaml(Path(yaml_file))).items()}


def get_label_path(image: str) -> str:
    """The label file of an image: its last folder `images` becomes `labels`, its extension `.txt`.

    >>> label_path("d/images/val/a.jpg")
    'd/labels/val/a.txt'
    """
    parts = os.path.splitext(image)[0].split(os.sep)
    at = next((i for i in range(len(parts) - 2, -1, -1) if parts[i] == "images"), None)
    if at is not None:
        parts[at] = "labels"
    return os.sep.join(parts) + ".txt"


def _entries(data: dict[str, Any]) -> dict[str, list[str]]:
    """The splits and their paths; a split is any key that holds a path or a list of paths."""
    found: dict[str, list[str]] = {}
    for key, value in data.items():
        paths = [value] if isinstance(value, str) else value
        if key in _NOT_SPLITS or not re.fullmatch(r"[\w-]+", str(key)) or not isinstance(paths, list):
            continue
        texts = [p for p in paths if isinstance(p, str) and p not in _NOTHING]
        if texts and len(texts) == len(paths):
            found[normalize_split_name(key)] = texts
    return found


def _names(data: dict[str, Any], file: Path) -> dict[int, str]:
    """Class names by class number, in the order of the numbers."""
    given = data["names"]
    pairs = given.items() if isinstance(given, dict) else enumerate(given) if isinstance(given, list) else ()
    names: dict[int, str] = {}
    for number, name in pairs:
        if not isinstance(name, str) or not str(number).isdecimal() or len(str(number)) > 9:
            pair = f"{number!s:.30}: {reprlib.repr(name)}"
            raise InputError(f"{file}: 'names' must be a list of class names or 'number: name' pairs, not {pair}")
        if int(number) in names:
            raise InputError(f"{file}: 'names' gives class {int(number)} twice")
        names[int(number)] = name
    if not names:
        raise InputError(f"{file}: 'names' must list the class names")
    count = data.get("nc", str(len(names)))
    if count != str(len(names)):
        raise InputError(f"{file}: 'nc' is {reprlib.repr(count)} but 'names' lists {len(names)} classes")
    require_valid_unicode(names.values(), file)
    return dict(sorted(names.items()))


def _root(data: dict[str, Any], file: Path) -> Path:
    """The data folder: `path` beside the yaml or, as YOLO's own tools take it, from the working folder; else the yaml's folder."""
    given = data.get("path", "")
    if not isinstance(given, str):
        raise InputError(f"{file}: 'path' must be the data folder, not {reprlib.repr(given)}")
    if given in _NOTHING:
        return file.parent
    for folder in (file.parent / given, Path(given)):
        if os.path.isdir(folder):
            return folder
    raise InputError(
        f"{file}: its 'path' {given} does not exist: correct it, or remove it where the data lies beside the yaml"
    )


def _images(entry: str | list[str], root: Path, file: Path) -> list[str]:
    """The images of a split: folders and text lists of paths, absolute or relative to the data folder."""
    found: list[str] = []
    for item in [entry] if isinstance(entry, str) else entry:
        at = _place(item, root, file)
        if os.path.isdir(at):
            found += list_images(at)
        elif at.suffix == ".txt" and os.path.isfile(at):
            found += _listed(at, root)
        else:
            raise InputError(f"{file} names {item}, but {at} is neither a folder of images nor a .txt list of them")
    return found


def _place(item: str, root: Path, file: Path) -> Path:
    """Where an entry of the yaml lies; the "../train/images" that some exports write is taken from the yaml's own folder."""
    if os.path.isabs(item):
        return Path(item)
    own = root / item.removeprefix("../")
    if item.startswith("../") and os.path.exists(own):
        item = item.removeprefix("../")
    return Path(resolve_inside(root, item, source=file))


def _listed(list_file: Path, root: Path) -> list[str]:
    """The images of a text list: relative to the list or to the data folder, or absolute and inside one of these."""
    names = [line.strip() for line in read_text(list_file).splitlines() if line.strip()]
    require_valid_unicode(names, list_file)
    relative = [name for name in names if not os.path.isabs(name)]
    if away := [name for name in names if os.path.isabs(name) and not is_inside(name, root, list_file.parent)]:
        raise InputError(
            f"{list_file} names the file '{away[0]}', which lies outside the data folder {root}: let the yaml's 'path' name a folder that "
            "holds it"
        )
    base = next(
        (folder for folder in (list_file.parent, root) if relative and os.path.exists(folder / relative[0])), root
    )
    return [
        name if os.path.isabs(name) else os.path.normpath(resolve_inside(base, name, root, source=list_file))
        for name in names
    ]


def _lines(file: Path) -> Iterator[tuple[int, list[float], str]]:
    """Class number, values and place of each line of a label file."""
    for count, line in enumerate(read_text(file).splitlines(), 1):
        words = line.split()
        if not words:
            continue
        where = f"{file}, line {count}"
        try:
            number, *values = map(float, words)
        except ValueError as error:
            raise InputError(f"{where}: {line[:60]!r} holds something that is not a number") from error
        if not number.is_integer():
            raise InputError(f"{where}: the class must be a whole number, not {words[0][:20]}")
        if len(values) != 4 and (len(values) < 6 or len(values) % 2):
            raise InputError(
                f"{where}: {len(words)} values, but a line is 'class cx cy w h' or 'class x1 y1 x2 y2 x3 y3 ...'"
            )
        yield int(number), values, where


def _object(values: list[float], height: int, width: int) -> tuple[tuple[float, ...], list[float] | None]:
    """The box in pixels, and the segmentation in pixels where the line is one."""
    if len(values) == 4:
        cx, cy, w, h = values
        return ((cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height), None
    xs, ys = [x * width for x in values[::2]], [y * height for y in values[1::2]]
    box = (min(xs), min(ys), max(xs), max(ys))
    if not all(map(math.isfinite, xs + ys)):
        return (math.nan,) * 4, [0.0] * 6  # goes with its box
    if not is_drawable(xs + ys):
        return box, None
    return box, [v for point in zip(xs, ys, strict=True) for v in point]


def _span(numbers: list[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]}"
