"""Checks of a dataset before a training starts: annotations, image headers, decoded images and class names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fusedet.data.annotation_cleaning import MARGIN
from fusedet.data.bad_images import count_allowed_bad_images
from fusedet.data.dataset import DetectionDataset
from fusedet.data.image_decoding import get_image_formats, read_image, read_image_size
from fusedet.data.image_files import map_files
from fusedet.data.transforms import keep_ratio_size
from fusedet.errors import InputError

_SMALL, _MEDIUM = 32**2, 96**2  # COCO's limits of the area, in pixels
_FAR = 0.1  # of a side: a box that leaves its image by more is no careless annotation
_MIN_NETWORK_SIDE = 4  # pixels: a shorter side is hardly visible to the network

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
"""Wraps an iterable, given its length."""


@dataclass(frozen=True)
class DatasetReport:
    """The result of checking one split.

    Attributes:
        errors: What would stop a training.
        warnings: What a training works around.
        statistics: Counts of images, annotations, classes and sizes; empty where the split cannot be read.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)


def validate_split(
    dataset: DetectionDataset, size: tuple[int, int], *, read_images: bool = True, progress: Progress | None = None
) -> DatasetReport:
    """Check the annotations of a split and, by default, decode every image as the loader does.

    Args:
        dataset: The split.
        size: (short, long) side of the network's input; the statistics hold the smallest annotation after this resize.
        read_images: Whether to decode the images.
        progress: Wraps the iterable over the images.
    """
    statistics = _count(dataset)
    errors = [] if len(dataset) else [f"{dataset.source} has no images"]
    warnings = [f"{text}: {count}" for text, count in dataset.problems.items()]
    if absent := [name for name, count in statistics["classes"].items() if count == 0]:
        warnings.append(f"no annotation of {'class' if len(absent) == 1 else 'classes'} {', '.join(absent)}")
    if not len(dataset.labels):
        errors.append(f"{dataset.source} has no annotations: a detector cannot be trained or evaluated without any")
    elif smallest := _find_smallest(dataset, size):
        statistics["smallest"] = smallest
        if smallest["network_side"] < _MIN_NETWORK_SIDE:
            warnings.append(
                f"at data.size={list(size)} the shorter side of the smallest annotation is "
                f"{smallest['network_side']:.1f} pixels: a larger data.size keeps it visible"
            )
    if read_images:
        errors += _check_decoded_images(dataset, progress)
    return DatasetReport(errors, warnings, statistics)


def compare_class_names(train: DetectionDataset, val: DetectionDataset) -> list[str]:
    """Describe how the class names of two splits differ; an empty list where they are equal, in order."""
    if train.names == val.names:
        return []
    a, b = set(train.names), set(val.names)
    only = [
        f"only {split} has {', '.join(sorted(names))}" for split, names in (("train", a - b), ("val", b - a)) if names
    ]
    return [f"the class names of {train.source} and {val.source} differ: {'; '.join(only) or 'their order differs'}"]


def check_image_headers(dataset: DetectionDataset) -> list[str]:
    """List images whose header shows a fault: absent, not an image, too large, or not of the annotated size."""
    check = partial(_check_image, dataset, partial(read_image_size, exif=dataset.exif))
    return list(filter(None, map_files(check, range(len(dataset)))))


def require_usable_images(
    train: DetectionDataset, val: DetectionDataset, *, max_bad_share: float, warn: Callable[[str], None]
) -> None:
    """Check the headers of all images of both splits before a training.

    Args:
        train: The training split.
        val: The validation split, in which no image may be bad.
        max_bad_share: Share of the training images that may be bad, because the loader replaces them; 0 allows none.
        warn: Takes a sentence about the training images that will be replaced.

    Raises:
        InputError: There are more bad images than allowed; the sentence names the first.
    """
    for dataset in (train, val):
        bad = check_image_headers(dataset)
        limit = count_allowed_bad_images(len(train), max_bad_share) if dataset is train else 0
        if len(bad) > limit:
            reason = f", more than train.max_bad_images={max_bad_share:g} allows" if limit else ""
            count = f"{len(bad)} of the {len(dataset)} images of {dataset.source} cannot be used{reason}, the first: "
            raise InputError((count if len(bad) > 1 else "") + bad[0])
        if bad:
            warn(
                f"warning: {len(bad)} of the {len(train)} training images cannot be used and will be replaced, "
                f"the first: {bad[0]}"
            )


def _count(dataset: DetectionDataset) -> dict[str, Any]:
    area = _side_lengths(dataset).clip(0).prod(axis=1)
    per_image = np.diff(dataset.offsets.numpy())
    per_class = np.bincount(dataset.labels.numpy(), minlength=len(dataset.names))
    return {
        "images": len(dataset),
        "annotations": len(dataset.labels),
        "empty_images": int((per_image == 0).sum()),
        "ignored_annotations": int(dataset.ignore.sum()),
        "classes": dict(zip(dataset.names, per_class.tolist())),
        "sizes": {
            "small": int((area < _SMALL).sum()),
            "medium": int(((area >= _SMALL) & (area < _MEDIUM)).sum()),
            "large": int((area >= _MEDIUM).sum()),
        },
        "max_annotations_per_image": int(per_image.max(initial=0)),
    }


def _side_lengths(dataset: DetectionDataset) -> np.ndarray:
    """(M, 2) widths and heights of the boxes."""
    boxes = dataset.boxes.numpy()
    return boxes[:, 2:] - boxes[:, :2]


def _find_smallest(dataset: DetectionDataset, size: tuple[int, int]) -> dict[str, Any] | None:
    """The annotation whose shorter side is shortest after the resize; None where no box has an area."""
    sides = _side_lengths(dataset)
    has_area = sides.clip(0).prod(axis=1) > 0
    if not has_area.any():
        return None
    image_index = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets.numpy()))
    scale = np.array([keep_ratio_size(int(h), int(w), *size)[0] / max(int(h), 1) for h, w in dataset.sizes.numpy()])
    shorter = np.where(has_area, sides.min(axis=1) * scale[image_index], np.inf)
    i = int(shorter.argmin())
    return {
        "image": str(dataset.path(int(image_index[i]))),
        "original": [float(v) for v in sides[i]],
        "network_side": float(shorter[i]),
    }


def _check_decoded_images(dataset: DetectionDataset, progress: Progress | None) -> list[str]:
    """Faults of images met while decoding, in threads: decoding releases the interpreter lock."""
    get_image_formats()  # fills its cache once, not in every thread
    with ThreadPoolExecutor() as pool:
        check = partial(_check_image, dataset, partial(_decoded_size, exif=dataset.exif))
        results = pool.map(check, range(len(dataset)))
        return list(filter(None, progress(results, len(dataset)) if progress else results))


def _decoded_size(path: Path, exif: bool) -> tuple[int, ...]:
    return tuple(read_image(path, exif=exif).shape[1:])


def _check_image(dataset: DetectionDataset, get_size: Callable[[Path], tuple[int, ...]], i: int) -> str | None:
    """The fault of image i, or None; get_size gives a file's (height, width)."""
    path, (height, width) = dataset.path(i), dataset.sizes[i].tolist()
    try:
        actual = get_size(path)
    except InputError as error:
        return str(error)
    if 0 in actual:
        return f"{path} has no pixels: it is {actual[1]} wide and {actual[0]} high"
    if actual != (height, width):
        is_stored = dataset.exif and actual == (width, height) and read_image_size(path, exif=False) == (height, width)
        turned = ": its boxes were made on the pixels as stored, before EXIF turns them; add data.exif=false"
        size = f"{path} is {actual[1]}x{actual[0]} pixels, but its annotation says {width}x{height}"
        return size + (turned if is_stored else "")
    return _check_boxes_of_turned_image(dataset, i)


def _check_boxes_of_turned_image(dataset: DetectionDataset, i: int) -> str | None:
    """Tell that the boxes of an image without an annotated size fit the pixels as stored, but not as turned by EXIF."""
    begin, end = dataset.offsets[i : i + 2].tolist()
    boxes, (height, width) = dataset.boxes[begin:end], dataset.sizes[i].tolist()
    far = boxes.new_tensor([width, height]) * (1 + _FAR)
    if not dataset.exif or not (boxes[:, 2:] > far).any():
        return None
    stored = read_image_size(path := dataset.path(i), exif=False)
    if stored == (height, width) or (boxes[:, 2:] > boxes.new_tensor(stored[::-1]) + MARGIN).any():
        return None
    return (
        f"{path} is {width}x{height} pixels, and boxes leave it: they were made on the pixels as stored "
        f"({stored[1]}x{stored[0]}), before EXIF turns them; add data.exif=false"
    )
