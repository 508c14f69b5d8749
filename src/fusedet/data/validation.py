"""What is wrong with a dataset, and what it holds, before a training finds out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fusedet.data.dataset import DetectionDataset
from fusedet.data.image_decoding import get_image_formats, read_image, read_image_size
from fusedet.data.image_files import map_files
from fusedet.data.transforms import keep_ratio_size
from fusedet.errors import InputError

_SMALL, _MEDIUM = 32**2, 96**2


@dataclass(frozen=True)
class DatasetReport:
    """errors stop a training, warnings do not; figures describe the split."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


def validate_split(
    dataset: DetectionDataset,
    size: tuple[int, int],
    *,
    read: bool = True,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> DatasetReport:
    """Look at one split: annotations always, and each image (`read`) as the loader will read it.

    size: (short, longest side) of the network's input; figures say what becomes of the smallest object under it.
    progress: wraps the iterable over the images, given their number.
    """
    corners, labels = dataset.boxes.numpy(), dataset.labels.numpy()
    wh = corners[:, 2:] - corners[:, :2]
    area = wh.clip(0).prod(axis=1)
    owner = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets.numpy()))
    per_image = np.bincount(owner, minlength=len(dataset))
    per_class = np.bincount(labels, minlength=len(dataset.names))
    figures: dict[str, Any] = {
        "images": len(dataset),
        "objects": len(labels),
        "empty_images": int((per_image == 0).sum()),
        "ignored_objects": int(dataset.ignore.sum()),
        "classes": dict(zip(dataset.names, per_class.tolist())),
        "sizes": {
            "small": int((area < _SMALL).sum()),
            "medium": int(((area >= _SMALL) & (area < _MEDIUM)).sum()),
            "large": int((area >= _MEDIUM).sum()),
        },
        "most_objects_in_a_image": int(per_image.max(initial=0)),
    }
    errors = [] if len(dataset) else [f"{dataset.source} has no images"]
    warnings = [f"{text}: {count}" for text, count in dataset.problems.items()]
    if missing := [name for name, count in figures["classes"].items() if count == 0]:
        warnings.append(f"no object of {'class' if len(missing) == 1 else 'classes'} {', '.join(missing)}")
    if len(labels) == 0:
        errors.append(
            f"{dataset.source} has no objects: a detector can neither learn nor be scored on background alone"
        )
    elif (real := area > 0).any():
        figures["smallest"] = _smallest(dataset, wh, owner, real, size)
        if figures["smallest"]["network_side"] < 4:
            warnings.append(
                f"at data.size={list(size)} the smallest object is {figures['smallest']['network_side']:.1f} pixels wide or high for the "
                "network: a larger data.size keeps it visible"
            )
    if read:
        errors += _unreadable(dataset, progress)
    return DatasetReport(errors, warnings, figures)


def compare_class_names(train: DetectionDataset, val: DetectionDataset) -> list[str]:
    """What must not differ between two splits: their class names, in order."""
    if train.names == val.names:
        return []
    only = [f"only {split} knows {', '.join(sorted(names))}" for split, names in _difference(train, val) if names]
    return [
        f"the class names of {train.source} and {val.source} differ: {'; '.join(only) or 'their order is not the same'}"
    ]


def _difference(train: DetectionDataset, val: DetectionDataset) -> list[tuple[str, set[str]]]:
    a, b = set(train.names), set(val.names)
    return [("train", a - b), ("val", b - a)]


def _smallest(
    dataset: DetectionDataset, wh: np.ndarray, owner: np.ndarray, real: np.ndarray, size: tuple[int, int]
) -> dict[str, Any]:
    """The object whose shorter side is shortest after the resize."""
    sizes = dataset.sizes.numpy()
    scale = np.array([keep_ratio_size(int(h), int(w), *size)[0] / max(int(h), 1) for h, w in sizes])
    side = np.where(real, wh.min(axis=1) * scale[owner], np.inf)
    i = int(side.argmin())
    return {
        "image": str(dataset.path(int(owner[i]))),
        "original": [float(v) for v in wh[i]],
        "network_side": float(side[i]),
    }


def check_image_headers(dataset: DetectionDataset) -> list[str]:
    """What is wrong with images as far as their headers tell: absent, no image, too large, of another size than annotated."""
    return list(filter(None, map_files(partial(_trouble, dataset, read_image_size), range(len(dataset)))))


def _unreadable(dataset: DetectionDataset, progress: Callable[[Iterable[Any], int], Iterable[Any]] | None) -> list[str]:
    """What is wrong with images when they are decoded, which leaves the interpreter to other threads."""
    get_image_formats()  # known once, not in every thread
    with ThreadPoolExecutor() as pool:
        found = pool.map(
            partial(_trouble, dataset, lambda path: tuple(read_image(path).shape[1:])), range(len(dataset))
        )
        return list(filter(None, progress(found, len(dataset)) if progress else found))


def _trouble(dataset: DetectionDataset, size: Callable[[Path], tuple[int, ...]], i: int) -> str | None:
    try:
        true = size(dataset.path(i))
    except InputError as error:
        return str(error)
    stated = tuple(dataset.sizes[i].tolist())
    if 0 in true:
        return f"{dataset.path(i)} has no pixels: it is {true[1]} wide and {true[0]} high"
    return (
        None
        if stated == true
        else f"{dataset.path(i)} is {true[1]}x{true[0]} pixels, but its annotation says {stated[1]}x{stated[0]}"
    )
