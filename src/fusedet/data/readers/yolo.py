"""Reader of YOLO datasets: a data.yaml or obj.data, and per image a text file of normalized boxes or polygons."""

import math
import os
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fusedet.config.yaml_text import LARGEST, LONGEST, count_values
from fusedet.data import annotation_cleaning
from fusedet.data.dataset import DetectionDataset, pack_segmentation
from fusedet.data.image_files import (
    AbsentSplitError,
    is_image_name,
    is_inside,
    list_images,
    normalize_split_name,
    read_image_sizes,
    read_text,
    require_valid_unicode,
    resolve_inside,
    select_split,
)
from fusedet.data.readers.key_points import read_key_point_values, require_key_points, resemble_key_points
from fusedet.data.readers.left_out_files import Problems, find_left_out_yolo_files
from fusedet.data.readers.number_text import parse_number
from fusedet.data.segmentation import is_drawable
from fusedet.errors import InputError, shorten_list

_NOT_SPLITS = {"path", "names", "nc", "download", "roboflow", "kpt_shape", "flip_idx", "channels"}
_NULL = {"", "null", "~"}
_LABEL_FOLDERS = {"images": "labels", "Images": "Labels", "IMAGES": "LABELS"}


def read_yolo(
    yaml_file: str | Path, split: str, *, data: dict[str, Any] | None = None, exif: bool = True
) -> DetectionDataset:
    """Read a split of a YOLO dataset.

    - Label files are in folders `labels` beside the folders `images`, or beside the images.
    - Their lines are `class cx cy w h` or `class x1 y1 x2 y2 x3 y3 ...`, normalized to the image after EXIF rotation.
    - With `kpt_shape` in the data.yaml they are `class cx cy w h` and key points, which are left out.
    - An image without a label file is background.
    - Category ids are YOLO's class numbers; image ids count from 1.

    Args:
        yaml_file: The data.yaml.
        split: A split of the data.yaml, or a list of images that ends in .txt.
        data: The content of the data.yaml, where another file stands in for it.
        exif: Whether labels are normalized to the image after EXIF rotation, not as it is stored.

    Raises:
        InputError: The split cannot be read, or a line is malformed; the sentence names the file and the line.
    """
    file = Path(yaml_file)
    data = load_data_yaml(file) if data is None else data
    names = _read_class_names(data, file)
    key_points = read_key_point_values(data, file)
    root = _find_root(data, file)
    entry = split if split.endswith(".txt") else select_split(_list_entries(data), split, file)
    listed = _list_split_images(entry, root, file)
    if not listed:
        raise InputError(f"the split '{split}' of {file} has no images")
    paths = list(dict.fromkeys(listed))
    sizes = read_image_sizes(paths, exif=exif)
    labels_of = {number: label for label, number in enumerate(names)}
    image_indices: list[int] = []
    labels: list[int] = []
    boxes: list[tuple[float, ...]] = []
    segmentations: list[bytes] = []
    problems = Problems()
    problems.counts[annotation_cleaning.LISTED_TWICE] = len(listed) - len(paths)
    polygons: list[list[float]] = []  # while all have one length: as Python numbers they take gigabytes
    is_one_length = True
    image_of: dict[str, str] = {}  # by label file
    for i, path in enumerate(paths):
        beside = os.path.splitext(path)[0] + ".txt"
        candidates = [own + ending for own in (get_label_path(path)[:-4], beside[:-4]) for ending in (".txt", ".TXT")]
        label_file = next(filter(os.path.isfile, candidates), None)
        if label_file is None:
            problems.add(annotation_cleaning.NO_LABELS, [path])
            continue
        if image_of.setdefault(label_file, path) != path:
            problems.add(annotation_cleaning.SHARED_LABELS, [path])
        height, width = sizes[i].tolist()
        for number, values, where in _parse_lines(Path(label_file), key_points):
            if number not in labels_of:
                raise InputError(
                    f"{where}: class {number} is not among the classes {min(names)} to {max(names)} of {file}"
                )
            if key_points:
                problems.add(annotation_cleaning.KEY_POINTS, [label_file])
                values = values[:4]
            elif len(values) > 4 and is_one_length:
                polygons.append(values)
                if not (is_one_length := len(values) == len(polygons[0])):
                    polygons.clear()
            box, polygon = _to_pixels(values, height, width)
            image_indices.append(i)
            labels.append(labels_of[number])
            boxes.append(box)
            segmentations.append(pack_segmentation(polygon and [polygon]))
            if len(values) > 4 and polygon is None:
                problems.add(annotation_cleaning.BAD_SEGMENTATION, [label_file])
    if resemble_key_points(polygons):
        problems.counts[annotation_cleaning.LIKE_KEY_POINTS] = len(polygons)
    find_left_out_yolo_files(problems, paths, _list_folders(entry, root, file), get_label_path)
    never = np.zeros(len(image_indices), dtype=bool)  # YOLO has no flag
    return annotation_cleaning.build_clean_dataset(
        names.values(),
        names,
        image_ids=np.arange(1, len(paths) + 1),
        sizes=sizes,
        paths=paths,
        image_indices=np.array(image_indices, dtype=np.int64),
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        labels=np.array(labels, dtype=np.int64),
        ignore=never,
        eval_ignore=never,
        segmentations=segmentations,
        source=f"{file} ({split})",
        dataset_format="yolo",
        problems=problems.counts,
        examples=problems.examples,
    )


def load_data_yaml(file: Path) -> dict[str, Any]:
    """Parse a data.yaml with all values as strings, so that a class named `no` stays "no".

    Raises:
        InputError: The file is not a YOLO data file, or larger than any config.
    """
    text = read_text(file)
    try:
        is_large = len(text) > LONGEST
        data = None if is_large else yaml.load(text, yaml.BaseLoader)  # noqa: S506
        is_large = is_large or count_values(yaml.compose(text, yaml.BaseLoader), {}) > LARGEST
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if is_large:
        raise InputError(
            f"{file} is larger than any YOLO data file: it has more than {LONGEST} characters, or {LARGEST} values"
        )
    if not isinstance(data, dict) or "names" not in data:
        raise InputError(f"{file} is not a YOLO data file: it must hold 'names', 'train' and 'val'")
    return data


def list_yolo_splits(data: dict[str, Any]) -> dict[str, str]:
    """Return the splits of a data.yaml's content and the paths of each."""
    return {name: shorten_list(paths, 3) for name, paths in _list_entries(data).items()}


def get_label_path(image: str) -> str:
    """Return the label file of an image: its last folder `images` becomes `labels`, its extension `.txt`.

    >>> get_label_path("d/images/val/a.jpg"), get_label_path("d/Images/a.JPG")
    ('d/labels/val/a.txt', 'd/Labels/a.txt')
    """
    parts = os.path.splitext(image)[0].split(os.sep)
    at = next((i for i in range(len(parts) - 2, -1, -1) if parts[i] in _LABEL_FOLDERS), None)
    if at is not None:
        parts[at] = _LABEL_FOLDERS[parts[at]]
    return os.sep.join(parts) + ".txt"


def _list_entries(data: dict[str, Any]) -> dict[str, list[str]]:
    """List the paths of each split; a split is any key with a path or a list of paths."""
    entries: dict[str, list[str]] = {}
    for key, value in data.items():
        paths = [value] if isinstance(value, str) else value
        if key in _NOT_SPLITS or not re.fullmatch(r"[\w-]+", str(key)) or not isinstance(paths, list):
            continue
        texts = [p for p in paths if isinstance(p, str) and p not in _NULL]
        if texts and len(texts) == len(paths):
            entries[normalize_split_name(key)] = texts
    return entries


def _read_class_names(data: dict[str, Any], file: Path) -> dict[int, str]:
    """Read the class names by class number, in the order of the numbers."""
    value = data["names"]
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
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


def _find_root(data: dict[str, Any], file: Path) -> Path:
    """Find the data folder: `path`, relative to the yaml or (as for YOLO) the working directory; else the yaml's."""
    value = data.get("path", "")
    if not isinstance(value, str):
        raise InputError(f"{file}: 'path' must be the data folder, not {reprlib.repr(value)}")
    if value in _NULL:
        return file.parent
    written = value.replace("\\", "/")  # on Windows
    for folder in (file.parent / written, Path(written)):
        if os.path.isdir(folder):
            return folder
    raise InputError(
        f"{file}: its 'path' {value} does not exist: correct it, or remove it where the data is beside the yaml"
    )


def _list_split_images(entry: str | list[str], root: Path, file: Path) -> list[str]:
    """List the images of a split's folders and text lists, which are absolute or relative to the data folder."""
    images: list[str] = []
    for item in [entry] if isinstance(entry, str) else entry:
        path = _resolve_entry(item, root, file)
        if os.path.isdir(path):
            images += list_images(path)
        elif path.suffix == ".txt" and os.path.isfile(path):
            images += _read_list(path, root)
        elif is_image_name(path.name) and os.path.isfile(path):
            images.append(str(path))
        elif not os.path.exists(path):
            raise AbsentSplitError(
                f"{file} names {item}, but {path} does not exist: it must be a folder of images or a .txt list"
            )
        else:
            raise InputError(f"{file} names {item}, but {path} is neither a folder of images nor a .txt list of images")
    return images


def _list_folders(entry: str | list[str], root: Path, file: Path) -> list[str]:
    """List the folders of images that a split is given by."""
    paths = [_resolve_entry(item, root, file) for item in ([entry] if isinstance(entry, str) else entry)]
    return [str(path) for path in paths if path.is_dir()]


def _resolve_entry(item: str, root: Path, file: Path) -> Path:
    """Resolve the path of an entry; "../train/images", as some tools export it, is relative to the yaml's folder."""
    item = item.replace("\\", "/")  # written on Windows
    if os.path.isabs(item):
        return Path(item)
    inner = root / item.removeprefix("../")
    if item.startswith("../") and (os.path.exists(inner) or not os.path.exists(root / item)):
        item = item.removeprefix("../")
    return Path(resolve_inside(root, item, source=file))


def _read_list(list_file: Path, root: Path) -> list[str]:
    """Read the images of a text list: relative to the list or the data folder, or absolute and inside one of them."""
    names = [line.strip().replace("\\", "/") for line in read_text(list_file).splitlines() if line.strip()]
    require_valid_unicode(names, list_file)
    relative = [name for name in names if not os.path.isabs(name)]
    if outside := [name for name in names if os.path.isabs(name) and not is_inside(name, root, list_file.parent)]:
        raise InputError(
            f"{list_file} names the file '{outside[0]}', which lies outside the data folder {root}: let the yaml's "
            "'path' name a folder that holds it"
        )
    bases = (list_file.parent, root)
    base = next((folder for folder in bases if relative and os.path.exists(folder / relative[0])), None)
    if relative and base is None:  # Darknet's lists begin at its own folder: data/obj_train_data/a.jpg
        base = next((folder for folder in bases if os.path.isfile(folder / relative[0].partition("/")[2])), None)
        names = [name if base is None or os.path.isabs(name) else name.partition("/")[2] for name in names]
    base = base or root
    return [
        name if os.path.isabs(name) else os.path.normpath(resolve_inside(base, name, root, source=list_file))
        for name in names
    ]


def _parse_lines(file: Path, key_points: int | None) -> Iterator[tuple[int, list[float], str]]:
    """Yield the class number, the values and the position of each line of a label file."""
    for count, line in enumerate(read_text(file).splitlines(), 1):
        texts = line.split()
        if not texts:
            continue
        where = f"{file}, line {count}"
        try:
            number, *values = map(parse_number, texts)
        except ValueError as error:
            raise InputError(f"{where}: {line[:60]!r} holds something that is not a number") from error
        if not number.is_integer():
            raise InputError(f"{where}: the class must be a whole number, not {texts[0][:20]}")
        if key_points:
            require_key_points(len(texts), key_points, where)
        elif len(values) != 4 and (len(values) < 6 or len(values) % 2):
            raise InputError(
                f"{where}: {len(texts)} values, but a line is 'class cx cy w h' or 'class x1 y1 x2 y2 x3 y3 ...', and "
                "key points need kpt_shape in the yaml"
            )
        yield int(number), values, where


def _to_pixels(values: list[float], height: int, width: int) -> tuple[tuple[float, ...], list[float] | None]:
    """Convert a line's values to a box in pixels, and to a polygon in pixels where the line is one."""
    if len(values) == 4:
        cx, cy, w, h = values
        return ((cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height), None
    xs, ys = [x * width for x in values[::2]], [y * height for y in values[1::2]]
    box = (min(xs), min(ys), max(xs), max(ys))
    if not all(map(math.isfinite, xs + ys)):
        return (math.nan,) * 4, [0.0] * 6  # dropped with its box
    if not is_drawable(xs + ys):
        return box, None
    return box, [v for point in zip(xs, ys, strict=True) for v in point]
