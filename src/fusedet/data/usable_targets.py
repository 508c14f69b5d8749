"""Annotations that are no usable targets, by cause: a split without a usable one can be neither learned nor scored."""

from typing import NamedTuple

import numpy as np

from fusedet.data import annotation_cleaning
from fusedet.data.dataset import DetectionDataset
from fusedet.errors import InputError, format_count

MOST_UNUSABLE = 0.2
"""The share of unusable annotations above which a split is reported."""


class UnusableTargets(NamedTuple):
    """The annotations of a split that are unusable for one cause.

    Attributes:
        number: How many.
        cause: What they are, as "are crowds (iscrowd=1)".
        advice: What is probably wrong, and what would be right.
        example: The first image with one.
    """

    number: int
    cause: str
    advice: str
    example: str


def find_unusable_targets(dataset: DetectionDataset, *, for_training: bool = True) -> list[UnusableTargets]:
    """Group the annotations that are no usable targets by cause, the most frequent first.

    Args:
        dataset: The split.
        for_training: Whether targets of a training are meant, else those that evaluation counts.
    """
    boxes, image_indices = dataset.boxes.numpy(), dataset.image_indices
    limits = dataset.sizes.numpy()[image_indices][:, ::-1] if len(boxes) else np.zeros((0, 2))
    is_crowd, is_flagged = dataset.eval_ignore.numpy(), dataset.ignore.numpy() & for_training
    is_empty = (boxes[:, 2:] - boxes[:, :2] <= annotation_cleaning.ROUNDING).any(axis=1)
    is_outside = ((boxes[:, :2] >= limits) | (boxes[:, 2:] <= 0)).any(axis=1)
    is_pixels = dataset.dataset_format != "yolo"  # YOLO's values are shares
    is_share = is_pixels & ((boxes[:, 2:] <= 1) & (boxes[:, :2] >= -1) & (limits > 2)).all(axis=1)
    format_name = dataset.dataset_format.upper()
    is_coco = dataset.dataset_format == "coco"
    causes = (
        (
            is_share,
            "end within the first pixel",
            f"the boxes look normalized (0..1), but {format_name}'s are in pixels",
        ),
        (
            is_outside & ~is_empty,
            "lie wholly outside their image",
            "are these labels in pixels? YOLO's are shares of the image in 0..1"
            if dataset.dataset_format == "yolo"
            else "do the annotations belong to these images, at this size?",
        ),
        (is_empty, "have no area", "write the width and height of every box"),
        (
            is_crowd,
            "are crowds (iscrowd=1)" if is_coco else "are difficult",
            "CVAT writes iscrowd=1 for masks drawn with its brush: set iscrowd to 0"
            if is_coco
            else "set <difficult> to 0 where an object is a target",
        ),
        (is_flagged, "have ignore=1", "set ignore to 0 where an object is a target"),
    )
    groups, is_grouped = [], np.zeros(len(boxes), dtype=np.bool_)
    for is_affected, cause, advice in causes:
        own = is_affected & ~is_grouped
        is_grouped = is_grouped | own
        if own.any():
            groups.append(
                UnusableTargets(int(own.sum()), cause, advice, str(dataset.path(int(image_indices[own.argmax()]))))
            )
    for text, cause in (
        (annotation_cleaning.NOT_FINITE, "have NaN or infinite coordinates"),
        (annotation_cleaning.NEGATIVE, "have a negative width or height"),
    ):
        if count := dataset.problems.get(text, 0):
            advice = f"does the tool that wrote them mean {format_name}'s order of the coordinates?"
            groups.append(UnusableTargets(count, cause, advice, dataset.examples.get(text, "")))
    return sorted(groups, key=lambda group: -group.number)


def require_usable_targets(dataset: DetectionDataset, *, for_training: bool = True) -> None:
    """Raise InputError for a split without a usable target; the sentence names the causes and the likely mistake."""
    if error := describe_unusable_split(dataset, find_unusable_targets(dataset, for_training=for_training)):
        raise InputError(error)


def describe_unusable_split(dataset: DetectionDataset, groups: list[UnusableTargets]) -> str | None:
    """Describe why a split has no usable target; None where it has one.

    Args:
        dataset: The split.
        groups: Its unusable targets.
    """
    total = count_annotations(dataset)
    if not total:
        return f"{dataset.source} has no objects: a detector can neither learn nor be scored on background alone"
    if sum(group.number for group in groups) < total:
        return None
    counts = " and ".join(f"{group.number} {group.cause}" for group in groups)
    counts = f"all {counts}" if len(groups) == 1 and total > 1 else counts
    return (
        f"{dataset.source} has no usable target among its {format_count(total, 'object')}: {counts}; "
        f"{groups[0].advice} "
        f"(first in {groups[0].example})"
    )


def describe_many_unusable(dataset: DetectionDataset, groups: list[UnusableTargets]) -> str | None:
    """Describe a split of which more than `MOST_UNUSABLE` is unusable; None for any other."""
    total, count = count_annotations(dataset), sum(group.number for group in groups)
    if not total or count <= MOST_UNUSABLE * total:
        return None
    counts = ", ".join(f"{group.number} {group.cause}" for group in groups)
    return (
        f"{count} of {total} objects are no usable targets: {counts}; {groups[0].advice} (first in {groups[0].example})"
    )


def count_annotations(dataset: DetectionDataset) -> int:
    """Count the annotations of a split, with those that its reader has dropped as unusable."""
    dropped = (dataset.problems.get(t, 0) for t in (annotation_cleaning.NOT_FINITE, annotation_cleaning.NEGATIVE))
    return len(dataset.labels) + sum(dropped)
