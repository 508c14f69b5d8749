"""Checks of a dataset before a training starts: annotations, image headers, decoded images and class names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fusedet.data.annotation_cleaning import HARMLESS, MARGIN, advise
from fusedet.data.bad_images import count_allowed_bad_images
from fusedet.data.channel_decoding import inspect_channels, is_array_file, read_array_size
from fusedet.data.class_names import count_per_label, label_classes
from fusedet.data.dataset import DetectionDataset
from fusedet.data.duplicate_images import ImagePrint, compute_print
from fusedet.data.findings import Finding
from fusedet.data.image_decoding import ImageValues, inspect_image, read_image_size
from fusedet.data.image_files import map_files
from fusedet.data.image_opening import get_image_formats
from fusedet.data.image_values import describe_values
from fusedet.data.split_checks import (
    check_box_convention,
    check_class_names,
    check_targets,
    describe_crowded_images,
    describe_rare_classes,
)
from fusedet.data.transforms import keep_ratio_size
from fusedet.errors import InputError

_SMALL, _MEDIUM = 32**2, 96**2  # COCO's limits of the area, in pixels
_DECODED = 2**27  # pixels that are decoded at a time to be measured, which takes about 10 bytes of each
_SAMPLE = 8  # images whose values are measured before a training
_FAR = 0.1  # of a side: a box that leaves its image by more is no careless annotation
_MIN_NETWORK_SIDE = 4  # pixels: a shorter side is hardly visible to the network

_AS_STORED = "images whose boxes fit the pixels as stored, before EXIF turns them"

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
"""Wraps an iterable, given its length."""


@dataclass(frozen=True)
class DatasetReport:
    """The result of checking one split.

    Attributes:
        findings: What would stop a training, and what it works around.
        statistics: Counts of images, annotations, classes and sizes; empty where the split cannot be read.
        prints: What identifies each image, where all were decoded; None for an image that cannot be read.
    """

    findings: list[Finding] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)
    prints: list[ImagePrint | None] = field(default_factory=list, repr=False)

    @property
    def errors(self) -> list[str]:
        """What would stop a training."""
        return [finding.message for finding in self.findings if finding.severity == "error"]

    @property
    def warnings(self) -> list[str]:
        """What a training works around."""
        return [finding.message for finding in self.findings if finding.severity == "warning"]

    def to_dict(self) -> dict[str, Any]:
        """Return errors, warnings and statistics as plain values."""
        return {"errors": self.errors, "warnings": self.warnings, "statistics": self.statistics}


class _Inspection(NamedTuple):
    """What the decoded image shows: its fault, or else its values and what identifies it."""

    fault: _Fault | None
    values: ImageValues | None = None
    image_print: ImagePrint | None = None


class _Fault(NamedTuple):
    """The fault of an image: a sentence, its kind, and what to do."""

    message: str
    kind: str
    advice: str = "repair or remove them"


def validate_split(
    dataset: DetectionDataset,
    size: tuple[int, int],
    *,
    read_images: bool = True,
    progress: Progress | None = None,
    max_det: int = 100,
    for_training: bool = True,
    tile: int | None = None,
) -> DatasetReport:
    """Check the annotations of a split and, by default, decode every image as the loader does.

    Args:
        dataset: The split.
        size: (short, long) side of the network's input; the statistics hold the smallest annotation after this resize.
        read_images: Whether to decode the images.
        progress: Wraps the iterable over the images.
        max_det: Detections of an image that the evaluation looks at.
        for_training: Whether the split is trained on, not only evaluated.
        tile: Side of the tiles that are resized in place of images, in pixels; None for whole images.
    """
    statistics = _count(dataset)
    findings = [
        Finding(
            "warning",
            f"{text}: {count}",
            text,
            count,
            dataset.examples.get(text, ""),
            advise(text),
            is_harmless=text in HARMLESS,
        )
        for text, count in dataset.problems.items()
    ]
    if not len(dataset):
        findings.append(Finding("error", f"{dataset.source} has no images", "splits without images"))
    findings += check_targets(dataset, for_training=for_training)
    findings += check_box_convention(dataset)
    findings += check_class_names(dataset)
    if crowded := describe_crowded_images(dataset, max_det):
        findings.append(crowded)
    if for_training and (rare := describe_rare_classes(dataset)):
        findings.append(rare)
    if smallest := _find_smallest(dataset, size, tile):
        statistics["smallest"] = smallest
        if smallest["network_side"] < _MIN_NETWORK_SIDE and not any(f.severity == "error" for f in findings):
            findings.append(
                Finding(
                    "warning",
                    f"at data.size={list(size)}{f' in tiles of {tile}' if tile else ''} the shorter side of the "
                    f"smallest annotation is {smallest['network_side']:.1f} pixels: a larger data.size keeps it "
                    "visible",
                    f"annotations under {_MIN_NETWORK_SIDE} pixels after the resize",
                    smallest["count"],
                    smallest["image"],
                    "enlarge data.size, or leave them out",
                )
            )
    prints: list[ImagePrint | None] = []
    if read_images:
        inspections = _inspect_images(dataset, progress)
        findings += _describe_faults(dataset, inspections)
        findings += describe_values(dataset, [inspection.values for inspection in inspections])
        prints = [inspection.image_print for inspection in inspections]
    return DatasetReport(findings, statistics, prints)


def check_image_headers(dataset: DetectionDataset) -> list[str]:
    """List images whose header shows a fault: absent, not an image, too large, or not of the annotated size."""

    def get_size(path: Path) -> tuple[int, int]:
        if is_array_file(path):
            return read_array_size(path)
        return read_image_size(path, value_range=dataset.value_range, exif=dataset.exif, any_mode=dataset.channels != 3)

    faults = map_files(lambda i: _check_size(dataset, i, get_size), range(len(dataset)))
    return [fault.message for fault in faults if fault]


def require_usable_images(
    train: DetectionDataset, val: DetectionDataset, *, max_bad_share: float, warn: Callable[[str], None]
) -> None:
    """Check the headers of all images of both splits before a training.

    Args:
        train: The training split.
        val: The validation split, in which no image may be bad.
        max_bad_share: Share of the training images that may be bad, because the loader replaces them; 0 allows none.
        warn: Takes sentences about the training images that will be replaced, and about values of the first images
            that are probably not meant as they are read.

    Raises:
        InputError: There are more bad images than allowed; the sentence names the first.
    """
    measured = [i for i, pixels in enumerate(train.sizes.prod(dim=1).tolist()) if pixels <= _DECODED][:_SAMPLE]
    sample = [_inspect_image(train, i, with_print=False).values for i in measured]
    for finding in describe_values(train, sample):
        warn(f"warning: of the first {len(sample)} training images: {finding.message}")
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
    return {
        "images": len(dataset),
        "annotations": len(dataset.labels),
        "empty_images": int((per_image == 0).sum()),
        "ignored_annotations": int(dataset.ignore.sum()),
        "classes": dict(zip(label_classes(dataset), count_per_label(dataset), strict=True)),
        "sizes": {
            "small": int((area < _SMALL).sum()),
            "medium": int(((area >= _SMALL) & (area < _MEDIUM)).sum()),
            "large": int((area >= _MEDIUM).sum()),
        },
        "max_annotations_per_image": int(per_image.max(initial=0)),
    }


def _side_lengths(dataset: DetectionDataset) -> np.ndarray:
    """Compute the widths and heights (M, 2) of the boxes."""
    boxes = dataset.boxes.numpy()
    return boxes[:, 2:] - boxes[:, :2]


def _find_smallest(dataset: DetectionDataset, size: tuple[int, int], tile: int | None) -> dict[str, Any] | None:
    """Find the annotation whose shorter side is shortest after the resize; None where no box has an area.

    The arguments are those of `validate_split`.
    """
    sides = _side_lengths(dataset)
    has_area = sides.clip(0).prod(axis=1) > 0
    if not has_area.any():
        return None
    image_index = dataset.image_indices
    resized = dataset.sizes.numpy().clip(1, tile)
    scale = np.array([keep_ratio_size(int(h), int(w), *size)[0] / int(h) for h, w in resized])
    shorter = np.where(has_area, sides.min(axis=1) * scale[image_index], np.inf)
    i = int(shorter.argmin())
    return {
        "image": str(dataset.path(int(image_index[i]))),
        "original": [float(v) for v in sides[i]],
        "network_side": float(shorter[i]),
        "count": int((shorter < _MIN_NETWORK_SIDE).sum()),
    }


def _inspect_images(dataset: DetectionDataset, progress: Progress | None) -> list[_Inspection]:
    """Decode all images, in threads: decoding releases the interpreter lock."""
    get_image_formats()  # fills its cache once, not in every thread
    threads = min(32, (os.cpu_count() or 1) + 4)
    most = int(dataset.sizes.prod(dim=1).max()) if len(dataset) else 0
    with ThreadPoolExecutor(max(1, min(threads, _DECODED // max(most, 1)))) as pool:
        results = pool.map(partial(_inspect_image, dataset), range(len(dataset)))
        return list(progress(results, len(dataset)) if progress else results)


def _inspect_image(dataset: DetectionDataset, i: int, *, with_print: bool = True) -> _Inspection:
    path = dataset.path(i)
    decoded: list[Any] = []

    def decode(path: Path) -> tuple[int, ...]:
        if dataset.channels == 3 and not is_array_file(path):
            decoded[:] = inspect_image(path, dataset.value_range, exif=dataset.exif)
        else:
            decoded[:] = inspect_channels(path, dataset.channels, dataset.value_range, exif=dataset.exif)
        return tuple(decoded[0].shape[1:])

    fault = _check_size(dataset, i, decode)
    if not decoded:
        return _Inspection(fault)
    return _Inspection(fault, decoded[1], compute_print(path, decoded[0]) if with_print else None)


def _check_size(dataset: DetectionDataset, i: int, get_size: Callable[[Path], tuple[int, ...]]) -> _Fault | None:
    """Return the fault of image i, or None; get_size gives a file's (height, width)."""
    path, (height, width) = dataset.path(i), dataset.sizes[i].tolist()
    try:
        actual = get_size(path)
    except InputError as error:
        return _Fault(str(error), "images that cannot be read" if os.path.exists(path) else "images that do not exist")
    if 0 in actual:
        return _Fault(
            f"{path} has no pixels: it is {actual[1]} wide and {actual[0]} high", "images that cannot be read"
        )
    if actual != (height, width):
        message = f"{path} is {actual[1]}x{actual[0]} pixels, but its annotation says {width}x{height}"
        if dataset.exif and actual == (width, height) and _read_stored_size(path) == (height, width):
            turned = "its boxes were made on the pixels as stored, before EXIF turns them; add data.exif=false"
            return _Fault(f"{message}: {turned}", _AS_STORED, "add data.exif=false")
        return _Fault(message, "images that are not of the annotated size")
    return _check_boxes_of_turned_image(dataset, i)


def _check_boxes_of_turned_image(dataset: DetectionDataset, i: int) -> _Fault | None:
    """Return the fault of an image without annotated size whose boxes fit its pixels only before EXIF turns them."""
    begin, end = dataset.offsets[i : i + 2].tolist()
    boxes, (height, width) = dataset.boxes[begin:end], dataset.sizes[i].tolist()
    far = boxes.new_tensor([width, height]) * (1 + _FAR)
    if not dataset.exif or not (boxes[:, 2:] > far).any():
        return None
    stored = _read_stored_size(path := dataset.path(i))
    if stored == (height, width) or (boxes[:, 2:] > boxes.new_tensor(stored[::-1]) + MARGIN).any():
        return None
    return _Fault(
        f"{path} is {width}x{height} pixels, and boxes leave it: they were made on the pixels as stored "
        f"({stored[1]}x{stored[0]}), before EXIF turns them; add data.exif=false",
        _AS_STORED,
        "add data.exif=false",
    )


def _read_stored_size(path: Path) -> tuple[int, int]:
    if is_array_file(path):
        return read_array_size(path)
    return read_image_size(path, any_mode=True, exif=False)


def _describe_faults(dataset: DetectionDataset, inspections: list[_Inspection]) -> list[Finding]:
    """Describe each image with a fault as an error."""
    return [
        Finding("error", fault.message, fault.kind, 1, str(dataset.path(i)), fault.advice)
        for i, (fault, *_) in enumerate(inspections)
        if fault
    ]
