"""What goes wrong: which classes are taken for which, and the images with the worst mistakes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fusedet.data.dataset import DetectionDataset
from fusedet.errors import InputError
from fusedet.evaluation.results import DetectionTable, Result, build_detection_table
from fusedet.models.ops.greedy_match import FALSE_POSITIVE, IGNORED, match_greedily

Judged = tuple[float, int, int]


def compute_confusion_matrix(
    dataset: DetectionDataset, results: Sequence[Result], *, score: float = 0.3, iou: float = 0.5
) -> np.ndarray:
    """How often an object of a class (row) is found as a class (column): (K + 1, K + 1) int64.

    The last column counts missed objects, the last row false detections, their corner stays 0. Detections of at least
    `score` find objects of any class, best score first, as in `greedy_match.match_greedily`; ignored objects and detections that lie on
    one of their class are left out. Raises InputError as `coco` does.
    """
    k = len(dataset.names)
    matrix = np.zeros((k + 1, k + 1), dtype=np.int64)
    for truth, labels, owner in _matched(dataset, results, score, iou):
        hit = owner >= 0
        np.add.at(matrix, (truth[owner[hit]], labels[hit]), 1)
        matrix[k, :k] += np.bincount(labels[owner == FALSE_POSITIVE], minlength=k)
        matrix[:k, k] += np.bincount(np.delete(truth, owner[hit]), minlength=k)
    return matrix


def find_worst_images(
    dataset: DetectionDataset, results: Sequence[Result], n: int = 16, score: float = 0.3, iou: float = 0.5
) -> list[tuple[int, float, int, int]]:
    """The n images with the lowest F1, worst first: (position in the dataset, F1 in 0..1, misses, false detections).

    Of equal F1 the one with more mistakes goes first, then the earlier one; images without a mistake are not listed. An
    object found as a wrong class is a miss and a false detection. MatchResult as in `confusion`.
    """
    rows = [(i, *row) for i, row in enumerate(_judged(dataset, results, score, iou)) if row[1] + row[2]]
    return sorted(rows, key=lambda row: (row[1], -row[2] - row[3], row[0]))[:n]


def find_differing_images(
    dataset: DetectionDataset,
    a: Sequence[Result] | DetectionTable,
    b: Sequence[Result] | DetectionTable,
    n: int = 16,
    score: float = 0.3,
    iou: float = 0.5,
) -> list[tuple[int, Judged, Judged]]:
    """The n images whose F1 differ most between two runs: (position in the dataset, a's F1, misses and false detections, b's).

    Of equal differences the one with more mistakes goes first, then the earlier one; equally good ones are not listed.
    MatchResult as in `confusion`.
    """
    both = zip(_judged(dataset, a, score, iou), _judged(dataset, b, score, iou), strict=True)
    rows = [(i, one, other) for i, (one, other) in enumerate(both) if one[0] != other[0]]
    return sorted(rows, key=lambda row: (-abs(row[2][0] - row[1][0]), -sum(row[1][1:] + row[2][1:]), row[0]))[:n]


def _judged(
    dataset: DetectionDataset, results: Sequence[Result] | DetectionTable, score: float, iou: float
) -> Iterator[Judged]:
    """Each image's F1, 1 where there is no mistake, misses and false detections."""
    for truth, labels, owner in _matched(dataset, results, score, iou):
        hit = owner >= 0
        right = int((truth[owner[hit]] == labels[hit]).sum())
        misses, false = len(truth) - right, int((owner != IGNORED).sum()) - right
        yield (2 * right / (2 * right + misses + false) if misses + false else 1.0), misses, false


def _matched(
    dataset: DetectionDataset, results: Sequence[Result] | DetectionTable, score: float, iou: float
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per image: classes (G,) of the objects that count, labels (D,) of the detections, and the owner (D,) of each."""
    if not 0 < iou <= 1:
        raise InputError(f"iou must lie in 0..1, it is {iou}")
    for record, (boxes, labels) in zip(
        dataset, build_detection_table(dataset, results).by_image(len(dataset), score), strict=True
    ):
        keep = ~record.eval_ignore
        classes = record.labels[keep]
        yield (
            classes,
            labels,
            match_greedily(boxes, labels, record.boxes[keep], classes, record.boxes[~keep], record.labels[~keep], iou),
        )
