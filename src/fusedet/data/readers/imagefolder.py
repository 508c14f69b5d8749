"""Reader of Hugging Face's imagefolder: images beside a metadata.jsonl, whose lines hold their objects.

A line is {"file_name": "a.jpg", "objects": {"bbox": [[x, y, width, height], ...], "categories": [0, ...]}}.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from fusedet.config.yaml_text import LARGEST, LONGEST, count_values
from fusedet.data import annotation_cleaning
from fusedet.data.image_files import read_text
from fusedet.data.readers.data_folder import DataFolder
from fusedet.data.readers.json_values import Entry
from fusedet.data.readers.left_out_files import Problems
from fusedet.data.readers.records import ImageRecord, ImageShapes, RecordSet
from fusedet.errors import InputError

_BOXES = ("bbox", "bboxes", "boxes")
_CLASSES = ("categories", "category", "category_id", "labels", "label", "class")


def list_metadata_files(folder: DataFolder) -> list[str]:
    """List the metadata.jsonl files."""
    return [file for file in folder.list_annotations(".jsonl") if Path(file).name == "metadata.jsonl"]


def read_imagefolder(folder: DataFolder, split: str | None = None) -> RecordSet:
    """Read an imagefolder; the folders of the metadata files, or those in the file names, are the splits.

    Numbers as categories get their names from the class_label of the README.md, else they are the names.

    Raises:
        InputError: A line is malformed, or has no objects.
    """
    problems = Problems()
    names = _read_class_label(folder.root / "README.md")
    files = list_metadata_files(folder)
    records = [record for file in files for record in _parse_lines(folder, file, names, problems)]
    if not records:
        raise InputError(f"{folder.path}: none of the images of {', '.join(files)} is there")
    if not names and all(name.isdecimal() for record in records for name in record.names):
        names = sorted({name for record in records for name in record.names}, key=int)
    by_path: dict[str, list[ImageRecord]] = defaultdict(list)
    for record in records:
        by_path[record.path].append(record)
    groups = folder.group_by_split(by_path, split)
    splits = {name: [record for path in group for record in by_path[path]] for name, group in groups.items()}
    return RecordSet("imagefolder", splits, names, problems)


def _parse_lines(folder: DataFolder, file: str, names: list[str], problems: Problems) -> Iterator[ImageRecord]:
    for i, line in enumerate(read_text(Path(file)).split("\n"), 1):  # texts may hold other line separators
        if not line.strip():
            continue
        where = f"{file}, line {i}"
        try:
            entry = Entry(json.loads(line), where)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not valid json: {error}") from error
        rows = list(_list_objects(entry))
        path = folder.find_image(file, entry.text("file_name"))
        if path is None:
            problems.add(annotation_cleaning.NO_IMAGE, [file] * len(rows))
            continue
        shapes = ImageShapes()
        for box, category in rows:
            if len(box) != 4:
                raise InputError(f"{where}: a box must be [x, y, width, height] in pixels, not {box!r:.60}")
            x, y, width, height = box
            shapes.names.append(_class_name(category, names, where))
            shapes.boxes.append((x, y, x + width, y + height))
            shapes.segmentations.append(b"")
        yield shapes.to_record(file, path, entry.integer("height"), entry.integer("width"))


def _list_objects(entry: Entry) -> Iterator[tuple[list[float], Any]]:
    """Yield the box and the category of each object: `objects` is a mapping of lists, or a list of mappings."""
    objects = entry.values.get("objects")
    if objects is None:
        raise InputError(f"{entry.where} has no 'objects': it must be {{'bbox': [...], 'categories': [...]}}")
    if isinstance(objects, list):
        for row in entry.entries("objects"):
            yield row.numbers(_find_key(row, _BOXES)), row.values[_find_key(row, _CLASSES)]
        return
    columns = entry.entry("objects")
    boxes, categories = (columns.values[_find_key(columns, keys)] for keys in (_BOXES, _CLASSES))
    if not isinstance(boxes, list) or not isinstance(categories, list) or len(boxes) != len(categories):
        raise InputError(f"{columns.where}: boxes and categories must be lists of one length")
    for box, category in zip(boxes, categories, strict=True):
        yield Entry({"bbox": box}, columns.where).numbers("bbox"), category


def _find_key(entry: Entry, keys: tuple[str, ...]) -> str:
    for key in keys:
        if key in entry.values:
            return key
    raise InputError(f"{entry.where} has none of the keys {', '.join(keys)}")


def _class_name(category: Any, names: list[str], where: str) -> str:
    if isinstance(category, str) and category:
        return category
    if not isinstance(category, int) or isinstance(category, bool) or category < 0:
        raise InputError(f"{where}: a category must be a name or a number, not {category!r:.60}")
    if names and category >= len(names):
        raise InputError(f"{where}: category {category} is not among the {len(names)} names of README.md")
    return names[category] if names else str(category)


def _read_class_label(file: Path) -> list[str]:
    """Read the names of the objects' class_label in the head of a README.md; none without such a list.

    Other features, such as the class of the whole image, may have a class_label too.
    """
    match = re.match(r"---\s*\n(.*?)\n---", read_text(file), re.DOTALL) if file.is_file() else None
    if match is None:
        return []
    try:
        is_large = len(match[1]) > LONGEST or count_values(yaml.compose(match[1], yaml.BaseLoader), {}) > LARGEST
        content = None if is_large else yaml.load(match[1], yaml.BaseLoader)  # noqa: S506
    except (yaml.YAMLError, ValueError, RecursionError):
        return []
    if is_large:
        raise InputError(f"{file}: its head has more than {LONGEST} characters or {LARGEST} values")
    labels: list[tuple[set[str], Any]] = []  # the features around each class_label, and its names
    pending: list[tuple[Any, set[str]]] = [(content, set())]
    while pending:
        node, features = pending.pop()
        if isinstance(node, dict):
            features = features | {str(node.get("name"))}
            if isinstance(label := node.get("class_label"), dict):
                labels.append((features, label.get("names")))
            pending += [(value, features | {key}) for key, value in node.items()]
        elif isinstance(node, list):
            pending += [(value, features) for value in node]
    labels = [(features, names) for features, names in labels if "objects" in features]
    labels = [(features, names) for features, names in labels if features & set(_CLASSES)] or labels
    if len({str(names) for _, names in labels}) > 1:
        raise InputError(f"{file} has several lists of class names (class_label) for objects: keep that of these data")
    return _order_names(labels[0][1], file) if labels else []


def _order_names(names: Any, file: Path) -> list[str]:
    """Return the names of a class_label: a list, or a mapping from numbers."""
    if not isinstance(names, dict):
        return list(map(str, names or []))
    numbers = [str(number) for number in range(len(names))]
    if set(names) != set(numbers):
        raise InputError(f"{file}: the names of class_label must be numbered from 0, not {', '.join(names)[:60]}")
    return [str(names[number]) for number in numbers]
