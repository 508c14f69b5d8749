"""The confusion matrix, and the images with the most errors."""

from collections.abc import Sequence

import numpy as np

from fusedet.data.dataset import DetectionDataset
from fusedet.evaluation.image_matching import FALSE_POSITIVE, IGNORED, match_images
from fusedet.evaluation.results import DetectionTable, Result

ImageScore = tuple[float, int, int]


def compute_confusion_matrix(
    dataset: DetectionDataset, results: Sequence[Result], *, score: float = 0.3, iou: float = 0.5
) -> np.ndarray:
    """Count how often instances of a class (row) are predicted as a class (column): (K + 1, K + 1) int64.

    The last column counts false negatives, the last row false positives; their corner is 0. Detections are matched
    regardless of class by `match_images`. Ignored instances and detections that lie on one of their class are left out.

    Args:
        dataset: The dataset.
        results: In COCO's result format, with image and category ids of the dataset.
        score: Least score of a detection that counts.
        iou: Least IoU of a match, in (0, 1].

    Raises:
        InputError: The results do not fit the dataset, as in `evaluate_coco`.
    """
    k = len(dataset.names)
    matrix = np.zeros((k + 1, k + 1), dtype=np.int64)
    pairs = match_images(dataset, results, iou=iou, score=score)
    is_matched = pairs.matches >= 0
    np.add.at(matrix, (pairs.gt_labels[pairs.matches[is_matched]], pairs.labels[is_matched]), 1)
    matrix[k, :k] = np.bincount(pairs.labels[pairs.matches == FALSE_POSITIVE], minlength=k)
    is_missed = pairs.counted.copy()
    is_missed[pairs.matches[is_matched]] = False
    matrix[:k, k] = np.bincount(pairs.gt_labels[is_missed], minlength=k)
    return matrix


def find_worst_images(
    dataset: DetectionDataset, results: Sequence[Result], n: int = 16, score: float = 0.3, iou: float = 0.5
) -> list[tuple[int, float, int, int]]:
    """Find the n images with the lowest F1, worst first.

    Of equal F1 the image with more errors comes first, then the earlier one. Images without errors are not listed. An
    instance predicted as a wrong class is a false negative and a false positive. Matching is that of
    `compute_confusion_matrix`.

    Args:
        dataset: The dataset.
        results: In COCO's result format, with image and category ids of the dataset.
        n: Maximum number of rows.
        score: Least score of a detection that counts.
        iou: Least IoU of a match, in (0, 1].

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

    Args:
        dataset: The dataset.
        a: Results of one run.
        b: Results of the other run.
        n: Maximum number of rows.
        score: Least score of a detection that counts.
        iou: Least IoU of a match, in (0, 1].

    Returns:
        Rows (index in the dataset, scores of a, scores of b); scores are (F1, false negatives, false positives).
    """
    both = zip(_score_images(dataset, a, score, iou), _score_images(dataset, b, score, iou), strict=True)
    rows = [(i, score_a, score_b) for i, (score_a, score_b) in enumerate(both) if score_a[0] != score_b[0]]
    return sorted(rows, key=lambda row: (-abs(row[2][0] - row[1][0]), -sum(row[1][1:] + row[2][1:]), row[0]))[:n]


def _score_images(
    dataset: DetectionDataset, results: Sequence[Result] | DetectionTable, score: float, iou: float
) -> list[ImageScore]:
    """Return F1 (1 without errors), false negatives and false positives of each image."""
    pairs, n = match_images(dataset, results, iou=iou, score=score), len(dataset)
    instances = np.bincount(dataset.image_indices[pairs.counted], minlength=n)
    detections = np.bincount(pairs.images[pairs.matches != IGNORED], minlength=n)
    true_positives = np.bincount(pairs.images[pairs.is_true_positive], minlength=n)
    return [
        (2 * hits / (g + d) if g + d > 2 * hits else 1.0, g - hits, d - hits)
        for g, d, hits in zip(instances.tolist(), detections.tolist(), true_positives.tolist(), strict=True)
    ]
