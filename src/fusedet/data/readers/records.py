"""What the readers of formats with one annotation per image share: records, class names, splits and their dataset."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fusedet.data import annotation_cleaning
from fusedet.data.dataset import DetectionDataset, pack_segmentation
from fusedet.data.image_files import read_image_sizes, read_text, select_split
from fusedet.data.readers.data_folder import DataFolder
from fusedet.data.readers.left_out_files import Problems, add_unread_images
from fusedet.data.segmentation import is_drawable
from fusedet.errors import InputError, make_unknown_error

_CLASS_FILES = ("labels.txt", "classes.txt", "class_names.txt")
_NO_CLASS = {"__ignore__", "_background_", "__background__"}  # labeling tools put these into labels.txt


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image and its G annotations, as an annotation file has them.

    Attributes:
        file: The annotation file.
        path: The image.
        names: G class names.
        boxes: (G, 4) xyxy in pixels, continuous with origin 0.
        height: Height in pixels; 0 where unknown.
        width: Width in pixels; 0 where unknown.
        ignore: (G,) bool, neither trained on nor evaluated; None for none.
        segmentations: G packed segmentations; None for none.
    """

    file: str
    path: str
    names: Sequence[str]
    boxes: np.ndarray
    height: int = 0
    width: int = 0
    ignore: np.ndarray | None = None
    segmentations: Sequence[bytes] | None = None


@dataclass
class ImageShapes:
    """Collects the shapes of one image: rectangles and polygons; others are counted."""

    names: list[str] = field(default_factory=list)
    boxes: list[Sequence[float]] = field(default_factory=list)
    segmentations: list[bytes] = field(default_factory=list)

    def add_box(self, name: str, x1: float, y1: float, x2: float, y2: float) -> None:
        """Add a rectangle, given by any two opposite corners."""
        self.names.append(name)
        is_nan = math.isnan(x1 + y1 + x2 + y2)  # min and max would return the other corner
        self.boxes.append((math.nan,) * 4 if is_nan else (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
        self.segmentations.append(b"")

    def add_ellipse(self, name: str, x: float, y: float, rx: float, ry: float, angle: float = 0.0) -> None:
        """Add the bounds of an ellipse, given by its center, radii and rotation in radians."""
        angle = angle if math.isfinite(angle) else math.nan  # a box of NaN is counted
        w = math.hypot(rx * math.cos(angle), ry * math.sin(angle))
        h = math.hypot(rx * math.sin(angle), ry * math.cos(angle))
        self.add_box(name, x - w, y - h, x + w, y + h)

    def add_polygons(self, name: str, *polygons: Sequence[Sequence[float]]) -> None:
        """Add an object of one or several polygons, each of points (x, y); its box bounds them all."""
        points = np.concatenate([np.asarray(polygon, dtype=np.float64).reshape(-1, 2) for polygon in polygons])
        flat = [np.asarray(polygon, dtype=np.float64).ravel().tolist() for polygon in polygons]
        self.names.append(name)
        self.boxes.append((*points.min(axis=0), *points.max(axis=0)))
        valid = all(len(polygon) >= 6 and is_drawable(polygon) for polygon in flat)
        self.segmentations.append(pack_segmentation(flat) if valid else b"")

    def to_record(self, file: str, path: str, height: int, width: int) -> ImageRecord:
        """Return the record of the image."""
        boxes = np.array(self.boxes, dtype=np.float64).reshape(-1, 4)
        return ImageRecord(file, path, self.names, boxes, height, width, None, self.segmentations)


@dataclass(frozen=True)
class RecordSet:
    """All records of a data folder.

    Attributes:
        dataset_format: "voc", "labelme", ...
        splits: The records by split.
        classes: The class names in the order of the format; empty where it has no list.
        problems: What is counted while reading.
    """

    dataset_format: str
    splits: Mapping[str, list[ImageRecord]]
    classes: Sequence[str] = ()
    problems: Problems = field(default_factory=Problems)


def read_annotation_files(
    folder: DataFolder,
    dataset_format: str,
    files: Sequence[str],
    parse: Callable[[DataFolder, str, Problems], ImageRecord | None],
    split: str | None = None,
) -> RecordSet:
    """Read a folder with an annotation file per image.

    Args:
        folder: The data folder.
        dataset_format: The format's name.
        files: The annotation files.
        parse: Parses one; counts faults; None for a file whose image is absent.
        split: A split that may also be a folder's name.

    Raises:
        InputError: A file is malformed, or no image of any exists.
    """
    problems = Problems()
    records = {file: record for file in files if (record := parse(folder, file, problems)) is not None}
    if not records:
        raise InputError(f"{folder.path}: none of the images of its {len(files)} annotation files is there")
    problems.add(annotation_cleaning.NO_IMAGE_FILE, (file for file in files if file not in records))
    used = {record.path for record in records.values()}
    problems.add(annotation_cleaning.NO_ANNOTATION_FILE, sorted(folder.images - used))
    for file in folder.files:
        add_unread_images(problems, os.path.dirname(file), [os.path.basename(file)])
    groups = folder.group_by_split(records, split)
    if set(groups) == {"train"}:  # only the images may lie in folders of splits
        file_of = {record.path: file for file, record in records.items()}
        if len(file_of) == len(records):  # else two files annotate one image, which is refused
            by_image = folder.group_by_split(file_of, split)
            groups = {name: [file_of[path] for path in group] for name, group in by_image.items()}
    splits = {name: [records[f] for f in group] for name, group in groups.items()}
    return RecordSet(dataset_format, splits, (), problems)


def build_split(folder: DataFolder, records: RecordSet, split: str, *, exif: bool = True) -> DetectionDataset:
    """Build the dataset of a split; class names are those of all splits, so that the splits agree.

    Args:
        folder: The data folder.
        records: The records of all its splits.
        split: Name of the split.
        exif: Whether EXIF turns images of unknown size.

    Raises:
        InputError: There is no such split, two files annotate one image, or a class is not in the list of classes.
    """
    rows = select_split(records.splits, split, folder.path)
    every = (record.names for group in records.splits.values() for record in group)
    return build_dataset(
        rows,
        read_class_names(folder.root, every, records.classes),
        source=f"{folder.path} ({split})",
        dataset_format=records.dataset_format,
        problems=records.problems,
        exif=exif,
    )


def build_dataset(
    records: Sequence[ImageRecord],
    classes: Sequence[str],
    *,
    source: str,
    dataset_format: str,
    problems: Problems,
    exif: bool = True,
) -> DetectionDataset:
    """Build a dataset from records; category ids are 1..K, image ids 1..N in the order of the records.

    Args:
        records: The images.
        classes: Class names, in the order of the labels.
        source: Where the data come from, for messages.
        dataset_format: Such as "voc".
        problems: The faults counted by the reader; those of the records are added.
        exif: Whether EXIF turns images of unknown size.

    Raises:
        InputError: An image is annotated twice, a class is not in the list, or a size is missing with its image.
    """
    records = _drop_repeated_records(records, problems)
    label_of = {name: k for k, name in enumerate(classes)}
    for record in records:
        if foreign := next((name for name in record.names if name not in label_of), None):
            raise InputError(f"{record.file}: {make_unknown_error('class', foreign, classes)}")
    counts = [len(record.names) for record in records]
    sizes = np.array([(r.height, r.width) for r in records], dtype=np.int64).reshape(-1, 2)
    missing = np.flatnonzero((sizes <= 0).any(axis=1))
    sizes[missing] = read_image_sizes([records[i].path for i in missing.tolist()], exif=exif)
    ignore = np.concatenate([np.zeros(n, bool) if r.ignore is None else r.ignore for n, r in zip(counts, records)])
    return annotation_cleaning.build_clean_dataset(
        classes,
        range(1, len(classes) + 1),
        image_ids=np.arange(1, len(records) + 1),
        sizes=sizes,
        paths=[record.path for record in records],
        image_indices=np.repeat(np.arange(len(records)), counts),
        boxes=np.concatenate([record.boxes for record in records]),
        labels=np.array([label_of[name] for record in records for name in record.names], dtype=np.int64),
        ignore=ignore,
        eval_ignore=ignore,
        segmentations=[s for n, r in zip(counts, records) for s in (r.segmentations or [b""] * n)],
        source=source,
        dataset_format=dataset_format,
        problems=problems.counts,
        examples=problems.examples,
    )


def _drop_repeated_records(records: Sequence[ImageRecord], problems: Problems) -> list[ImageRecord]:
    """Drop records that equal an earlier one of their image and file, and refuse others of one image."""
    firsts: dict[str, ImageRecord] = {}
    for record in records:
        first = firsts.setdefault(record.path, record)
        if first is record:
            continue
        if first.file != record.file:
            raise InputError(f"{first.file} and {record.file} both annotate the image {record.path}: keep one")
        if list(first.names) != list(record.names) or not np.array_equal(first.boxes, record.boxes, equal_nan=True):
            raise InputError(
                f"{record.file} has several entries with different objects for the image {record.path}: join them, or "
                "add the other images if their names only end alike"
            )
        problems.add(annotation_cleaning.LISTED_TWICE, [record.path])
    return list(firsts.values())


def read_class_names(root: Path, names: Iterable[Sequence[str]], given: Sequence[str] = ()) -> list[str]:
    """Return the class names: of a list file in the folder, of the format, else sorted from those of all images.

    Raises:
        InputError: There are none.
    """
    for name in _CLASS_FILES:
        if (root / name).is_file():
            lines = [line.strip() for line in read_text(root / name).splitlines()]
            classes = list(dict.fromkeys(line for line in lines if line and line not in _NO_CLASS))
            if not classes:
                raise InputError(f"{root / name} lists no classes")
            return classes
    classes = list(given) or sorted({name for own in names for name in own})
    if not classes:
        raise InputError(
            f"no annotation file in {root} has an object, so there are no class names: list them in "
            f"{root / 'labels.txt'}"
        )
    return classes


def image_name_of(annotation: str) -> str:
    """Return the name without folder and extension, by which an annotation file's image is found."""
    return os.path.splitext(os.path.basename(annotation))[0]
