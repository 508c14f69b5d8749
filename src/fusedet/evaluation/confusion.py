"""The confusion matrix, and the images with the most errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fusedet.data.dataset import DetectionDataset
from fusedet.errors import InputError
from fusedet.evaluation.results import DetectionTable, Result, build_detection_table
from fusedet.models.ops.greedy_match import FALSE_POSITIVE, IGNORED, match_greedily

ImageScore = tuple[float, int, int]


def compute_confusion_matrix(
    dataset: DetectionDataset, results: Sequence[Result], *, score: float = 0.3, iou: float = 0.5
) -> np.ndarray:
    """Count how often instances of a class (row) are predicted as a class (column): (K + 1, K + 1) int64.

    The last column counts false negatives, the last row false positives; their corner is 0. Detections of at least
    `score` are matched regardless of class by `match_greedily`. Ignored instances and detections that lie on one of
    their class are left out.

    Raises:
        InputError: The results do not fit the dataset, as in `evaluate_coco`.
    """
    k = len(dataset.names)
    matrix = np.zeros((k + 1, k + 1), dtype=np.int64)
    for ground_truth, labels, matches in _match_images(dataset, results, score, iou):
        is_matched = matches >= 0
        np.add.at(matrix, (ground_truth[matches[is_matched]], labels[is_matched]), 1)
        matrix[k, :k] += np.bincount(labels[matches == FALSE_POSITIVE], minlength=k)
        matrix[:k, k] += np.bincount(np.delete(ground_truth, matches[is_matched]), minlength=k)
    return matrix


def find_worst_images(
    dataset: DetectionDataset, results: Sequence[Result], n: int = 16, score: float = 0.3, iou: float = 0.5
) -> list[tuple[int, float, int, int]]:
    """Find the n images with the lowest F1, worst first.

    Of equal F1 the image with more errors comes first, then the earlier one. Images without errors are not listed. An
    instance predicted as a wrong class is a false negative and a false positive. Matching is that of
    `compute_confusion_matrix`.

    Returns:
        Rows (index in the dataset, F1 in 0..1, false negatives, false positives).
    """
    rows = [(i, *row) for i, row in enumerate(_score_images(dataset, results, score, iou)) if row[1] + row[2]]
    return sorted(rows, key=lambda row: (row[1], -row[2] - row[3], row[0]))[:n]


def find_differing_images(
    dataset: DetectionDataset,
    a: Sequence[Result] | DetectionTable,
    b: Sequence[Result] | DetectionTable,
    n: int = 16,
    score: float = 0.3,
    iou: float = 0.5,
) -> list[tuple[int, ImageScore, ImageScore]]:
    """Find the n images whose F1 differs most between two runs.

    Of equal differences the image with more errors comes first, then the earlier one. Images of equal F1 are not
    listed. Matching is that of `compute_confusion_matrix`.

    Returns:
        Rows (index in the dataset, scores of a, scores of b); scores are (F1, false negatives, false positives).
    """
    both = zip(_score_images(dataset, a, score, iou), _score_images(dataset, b, score, iou), strict=True)
    rows = [(i, score_a, score_b) for i, (score_a, score_b) in enumerate(both) if score_a[0] != score_b[0]]
    return sorted(rows, key=lambda row: (-abs(row[2][0] - row[1][0]), -sum(row[1][1:] + row[2][1:]), row[0]))[:n]


def _score_images(
    dataset: DetectionDataset, results: Sequence[Result] | DetectionTable, score: float, iou: float
) -> Iterator[ImageScore]:
    """Yield F1 (1 without errors), false negatives and false positives of each image."""
    for ground_truth, labels, matches in _match_images(dataset, results, score, iou):
        is_matched = matches >= 0
        right = int((ground_truth[matches[is_matched]] == labels[is_matched]).sum())
        misses, false = len(ground_truth) - right, int((matches != IGNORED).sum()) - right
        yield (2 * right / (2 * right + misses + false) if misses + false else 1.0), misses, false


def _match_images(
    dataset: DetectionDataset, results: Sequence[Result] | DetectionTable, score: float, iou: float
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield per image the classes (G,) of the counted instances, and the labels and matches (D,) of the detections."""
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
