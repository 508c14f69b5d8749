"""Reader of COCO json files: crowds, ignored annotations, polygons, RLE, category ids with gaps, ids that are texts."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fusedet.data import annotation_cleaning
from fusedet.data.dataset import DetectionDataset
from fusedet.data.image_files import (
    read_image_sizes,
    require_any_image,
    require_valid_unicode,
)
from fusedet.data.readers.coco_layout import find_images
from fusedet.data.readers.json_values import load_json
from fusedet.data.readers.number_text import parse_number
from fusedet.data.segmentation import bound_segmentation, fits_image, pack_coco_segmentation
from fusedet.errors import InputError
from fusedet.garbage_collection import pause_garbage_collection


def read_coco(
    json_file: str | Path,
    image_dir: str | Path | Sequence[Path],
    *,
    root: str | Path | None = None,
    need_images: bool = True,
    by_last_part: bool = False,
    exif: bool = True,
    likely: int = 1,
) -> DetectionDataset:
    """Read a COCO json.

    - Labels follow the order of the category ids.
    - Without the key `annotations` (test-dev), no image has annotations.
    - `iscrowd` and `ignore` set `ImageAnnotations.ignore`. Only `iscrowd` sets `eval_ignore`: pycocotools overwrites
      `ignore`.
    - Texts as ids of images or categories are numbered from 1 in their sorted order and kept beside the numbers.
    - A missing size comes from the image, and a missing `bbox` from the segmentation.

    Args:
        json_file: The json file.
        image_dir: The folder that `file_name`s are relative to; of several, the one that holds most images is taken,
            and for images that it lacks the first that holds them.
        root: The folder that `file_name`s must not leave by "..", by default the image folder.
        need_images: Whether to refuse a folder where none of the first 100 images exists.
        by_last_part: Whether an image that is not found by its whole `file_name` is found by the last part of it,
            anywhere in the image folder.
        exif: Whether missing sizes are those after EXIF rotation.
        likely: How many of the folders have a name or a place that fits; of the others, only one may hold the images.

    Raises:
        InputError: The file is not valid COCO; the sentence names the entry and the key.
    """
    file = Path(json_file)
    folders = [Path(image_dir)] if isinstance(image_dir, str | Path) else list(image_dir)
    data = _load(file)
    names, category_ids, category_texts = _categories(data, file)
    images = _rows(data, "images", file)
    if not images:
        raise InputError(f"{file} lists no images: its 'images' is empty")
    file_names = _strings(images, "file_name", "image", file)
    try:
        paths = find_images(file_names, folders, Path(root) if root else None, file, by_last_part, likely)
        if need_images:
            more = f" or {len(folders) - 3} more folders" if len(folders) > 3 else ""
            require_any_image(paths, " or ".join(map(str, folders[:3])) + more, file)
    except InputError as error:
        hint = "" if by_last_part else "; data.images=FOLDER finds images by the last part of their names"
        raise type(error)(f"{error}{hint}") from error
    image_ids, image_texts = _ids(images, "image", file)
    sizes = np.column_stack([_integers(images, key, "image", file, 0) for key in ("height", "width")])
    missing = np.flatnonzero(((sizes == 0) | (sizes == -1)).any(axis=1))  # -1: VIA
    sizes[missing] = read_image_sizes([paths[i] for i in missing.tolist()], exif=exif)
    if (sizes <= 0).any():
        i = int((sizes <= 0).any(axis=1).argmax())
        raise InputError(
            f"{file}: image {image_ids[i]} ({file_names[i]}) is {sizes[i, 1]}x{sizes[i, 0]} pixels: both must be above "
            "0"
        )

    counts = Counter(paths)
    repeated = [path for path, count in counts.items() for _ in range(count - 1)]
    rows = _rows(data, "annotations", file) if "annotations" in data else []
    problems = {
        annotation_cleaning.SAME_ID: _count_duplicate_ids(rows),
        annotation_cleaning.AS_TEXT: _count_quoted_boxes(rows),
    }
    image_indices, listed = _find_ids(rows, "image_id", image_ids, image_texts, file)
    rows = rows if listed.all() else [rows[i] for i in np.flatnonzero(listed).tolist()]
    image_indices = image_indices[listed]
    boxes = _boxes(rows, file)
    labels = _labels(rows, category_ids, category_texts, file)
    is_crowd = _integers(rows, "iscrowd", "annotation", file, 0) != 0
    ignore = is_crowd | (_integers(rows, "ignore", "annotation", file, 0) != 0)
    area, bad_areas = _areas(rows, file)
    segmentations = [row.get("segmentation") or b"" for row in rows]  # packed while the file was parsed
    del data, images, rows  # a large file's entries take a gigabyte
    shapes = sizes.tolist()
    valid = [
        o if not o or o[:1] == b"P" or fits_image(o, tuple(shapes[i])) else b""
        for o, i in zip(segmentations, image_indices.tolist(), strict=True)
    ]
    dropped = sum(a != b for a, b in zip(segmentations, valid, strict=True))
    return annotation_cleaning.build_clean_dataset(
        names,
        category_ids,
        image_ids=image_ids,
        sizes=sizes,
        paths=paths,
        image_indices=image_indices,
        boxes=boxes,
        labels=labels,
        ignore=ignore,
        eval_ignore=is_crowd,
        area=area,
        segmentations=valid,
        source=file,
        dataset_format="coco",
        problems=problems
        | {
            annotation_cleaning.SAME_FILE: len(repeated),
            annotation_cleaning.NO_IMAGE: int((~listed).sum()),
            annotation_cleaning.BAD_AREA: bad_areas,
            annotation_cleaning.BAD_SEGMENTATION: dropped,
        },
        examples={annotation_cleaning.SAME_FILE: repeated[0]} if repeated else None,
        image_id_texts=image_texts,
        category_id_texts=category_texts,
    )


def _load(file: Path) -> dict[str, Any]:
    """Parse a COCO json, packing its segmentations; raises InputError where `images` or `categories` are missing."""
    with pause_garbage_collection():  # millions of new objects, which form no cycles
        data = load_json(file, object_hook=_pack_entry)
    if not isinstance(data, dict):
        raise InputError(
            f"{file} is not COCO: it must be an object with 'images', 'annotations' and 'categories', not "
            f"{_describe_type(data)}"
        )
    for key in ("images", "categories"):
        if key not in data:
            raise InputError(f"{file} is not COCO: the key '{key}' is missing")
    return data


def _pack_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """Pack a segmentation as soon as it is parsed: a large file's polygons take gigabytes as Python numbers."""
    segmentation = entry.get("segmentation")
    if segmentation is not None:
        packed = entry["segmentation"] = pack_coco_segmentation(segmentation)
        if not entry.get("bbox") and (bounds := bound_segmentation(packed)):
            entry["bbox"] = bounds
    return entry


def _describe_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _rows(data: dict[str, Any], key: str, file: Path) -> list[dict[str, Any]]:
    rows = data[key]
    if not isinstance(rows, list):
        raise InputError(f"{file} is not COCO: '{key}' must be a list, not {_describe_type(rows)}")
    if not set(map(type, rows)) <= {dict}:
        i = next(i for i, row in enumerate(rows) if type(row) is not dict)
        raise InputError(f"{file} is not COCO: entry {i} of '{key}' must be an object, not {_describe_type(rows[i])}")
    return rows


def _categories(data: dict[str, Any], file: Path) -> tuple[list[str], list[int], list[str]]:
    """Read the names and ids of the categories in the order of the ids, and the ids that are texts."""
    rows = _rows(data, "categories", file)
    if not rows:
        raise InputError(f"{file} has no classes: its 'categories' is empty")
    ids, texts = _ids(rows, "category", file)
    names = _strings(rows, "name", "category", file)
    order = np.argsort(ids).tolist()
    return [names[i] for i in order], [int(ids[i]) for i in order], [texts[i] for i in order if texts]


def _ids(rows: list[dict[str, Any]], noun: str, file: Path) -> tuple[np.ndarray, list[str]]:
    """Return the ids as integers, and as texts where some are no digits.

    Text ids are numbered from 1 in their sorted order; pycocotools sorts ids in the same way.
    """
    values = _column(rows, "id", noun, file)
    if not any(type(value) is str and not _is_digits(value) for value in values):
        ids = _integers(rows, "id", noun, file)
        _refuse_duplicates(ids, noun, file)
        return ids, []
    for row, value in zip(rows, values, strict=True):
        if type(value) not in (str, int):
            raise InputError(
                f"{file}: 'id' of {_describe_entry(row, rows, noun)} must be an integer or a text, not {value!r:.60}"
            )
    texts = list(map(str, values))
    require_valid_unicode(texts, file)
    _refuse_duplicates(np.array(texts), noun, file)
    number = {text: n for n, text in enumerate(sorted(texts), 1)}
    return np.array([number[text] for text in texts], dtype=np.int64), texts


def _find_ids(
    rows: list[dict[str, Any]], key: str, ids: np.ndarray, texts: list[str], file: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Find each annotation's id among those of the images or categories: its position, and whether it is there."""
    if not texts:
        return _find_positions(ids, _integers(rows, key, "annotation", file))
    position = {text: i for i, text in enumerate(texts)}
    wanted = np.array(
        [position.get(str(value), -1) for value in _column(rows, key, "annotation", file)], dtype=np.int64
    )
    return np.maximum(wanted, 0), wanted >= 0


def _describe_entry(row: dict[str, Any], rows: list[dict[str, Any]], noun: str) -> str:
    """Return the id of an entry for a message, or its position where it has none."""
    if type(row.get("id")) in (int, str):
        return f"{noun} {row['id']!s:.60}"
    return f"{noun} number {next(i for i, candidate in enumerate(rows) if candidate is row)}"


def _column(rows: list[dict[str, Any]], key: str, noun: str, file: Path, default: Any = None) -> list[Any]:
    if default is not None:
        return [default if (value := row.get(key)) is None else value for row in rows]
    try:
        return [row[key] for row in rows]
    except KeyError as error:
        row = next(row for row in rows if key not in row)
        raise InputError(f"{file}: {_describe_entry(row, rows, noun)} has no '{key}'") from error


def _strings(rows: list[dict[str, Any]], key: str, noun: str, file: Path) -> list[str]:
    values = _column(rows, key, noun, file)
    for row, value in zip(rows, values, strict=True):
        if type(value) is not str or not value:
            raise InputError(f"{file}: '{key}' of {_describe_entry(row, rows, noun)} must be a text, not {value!r:.60}")
    require_valid_unicode(values, file)
    return values


def _integers(rows: list[dict[str, Any]], key: str, noun: str, file: Path, default: int | None = None) -> np.ndarray:
    """(M,) int64; whole floats and digits in quotes count as integers."""
    values = _column(rows, key, noun, file, default)
    if not set(map(type, values)) <= {int, bool} or (default is None and bool in set(map(type, values))):
        values = [_parse_integer(value, row, rows, key, noun, file) for value, row in zip(values, rows, strict=True)]
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError as error:
        row = next(row for row, value in zip(rows, values, strict=True) if not -(2**63) <= value < 2**63)
        raise InputError(f"{file}: '{key}' of {_describe_entry(row, rows, noun)} is too large a number") from error


def _parse_integer(value: Any, row: dict[str, Any], rows: list[dict[str, Any]], key: str, noun: str, file: Path) -> int:
    if type(value) is int or (type(value) is float and value.is_integer()):
        return int(value)
    if type(value) is bool and key in ("iscrowd", "ignore"):
        return int(value)
    if type(value) is str and _is_digits(value):
        return int(value)
    raise InputError(f"{file}: '{key}' of {_describe_entry(row, rows, noun)} must be an integer, not {value!r:.60}")


def _is_digits(value: str) -> bool:
    return value.strip().removeprefix("-").isdecimal() and len(value) < 20


def _parse_number(value: Any, key: str, row: dict[str, Any], rows: list[dict[str, Any]], file: Path) -> float:
    if type(value) in (int, float, str):
        try:
            return parse_number(value)
        except (ValueError, OverflowError):
            pass  # refused below
    raise InputError(
        f"{file}: '{key}' of {_describe_entry(row, rows, 'annotation')} must hold numbers, not {value!r:.60}"
    )


def _boxes(rows: list[dict[str, Any]], file: Path) -> np.ndarray:
    """Return the corners (M, 4) of the `bbox`es, which are x, y, width, height."""
    values = _column(rows, "bbox", "annotation", file)
    if not (set(map(type, values)) <= {list} and set(map(len, values)) <= {4}):
        row = next(row for row in rows if type(row["bbox"]) is not list or len(row["bbox"]) != 4)
        raise InputError(
            f"{file}: 'bbox' of {_describe_entry(row, rows, 'annotation')} must be [x, y, width, height] in pixels, "
            f"not {row['bbox']!r:.60}"
        )
    if not set(map(type, chain.from_iterable(values))) <= {int, float}:
        values = [[_parse_number(v, "bbox", row, rows, file) for v in row["bbox"]] for row in rows]
    try:
        boxes = np.array(values, dtype=np.float64).reshape(-1, 4)
    except OverflowError:
        boxes = np.array([[_parse_number(v, "bbox", row, rows, file) for v in row["bbox"]] for row in rows])
    with np.errstate(invalid="ignore", over="ignore"):
        boxes[:, 2:] += boxes[:, :2]
    return boxes


def _areas(rows: list[dict[str, Any]], file: Path) -> tuple[np.ndarray, int]:
    """(M,) annotated areas, NaN where absent or invalid, and the number of invalid ones."""
    given = np.array([row.get("area") is not None for row in rows], dtype=bool)
    values = [row.get("area", np.nan) for row in rows]
    if not set(map(type, values)) <= {float} or not given.all():
        values = [
            np.nan if (a := row.get("area")) is None else _parse_number(a, "area", row, rows, file) for row in rows
        ]
    area = np.array(values, dtype=np.float64)
    bad = given & ~(np.isfinite(area) & (area >= 0))
    area[bad] = np.nan
    return area, int(bad.sum())


def _find_positions(known: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the position of each wanted id among the known ones, and whether it is known."""
    order = np.argsort(known, kind="stable")
    positions = order[np.minimum(np.searchsorted(known, wanted, sorter=order), len(known) - 1)]
    return positions, known[positions] == wanted


def _labels(rows: list[dict[str, Any]], category_ids: list[int], texts: list[str], file: Path) -> np.ndarray:
    labels, known = _find_ids(rows, "category_id", np.array(category_ids), texts, file)
    if not known.all():
        row = rows[int((~known).argmax())]
        raise InputError(
            f"{file}: {_describe_entry(row, rows, 'annotation')} has the category id {row['category_id']}, which "
            "'categories' does not list"
        )
    return labels


def _count_duplicate_ids(rows: list[dict[str, Any]]) -> int:
    """Count the annotations with the id of an earlier one; annotations without an id do not count."""
    ids = [row["id"] for row in rows if type(row.get("id")) in (int, str)]
    return len(ids) - len(set(ids))


def _count_quoted_boxes(rows: list[dict[str, Any]]) -> int:
    """Count the annotations with a quoted coordinate."""
    boxes = [row["bbox"] for row in rows if type(row.get("bbox")) is list]
    if str not in set(map(type, chain.from_iterable(boxes))):
        return 0
    return sum(any(type(v) is str for v in box) for box in boxes)


def _refuse_duplicates(ids: np.ndarray, noun: str, file: Path) -> None:
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise InputError(f"{file}: the {noun} id {values[(counts > 1).argmax()]} is given more than once")
