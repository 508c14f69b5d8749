"""Counts at every score threshold, and the threshold of maximal F1 per class with its interval over images."""

from dataclasses import dataclass

import numpy as np

from fusedet.data.dataset import DetectionDataset
from fusedet.evaluation.confidence_intervals import LEVEL, compute_percentile_interval
from fusedet.evaluation.image_matching import IGNORED, ImageMatches

THRESHOLDS = np.arange(101) / 100
"""The thresholds at which detections are counted: 0, 0.01 .. 1."""


@dataclass(frozen=True)
class BestThreshold:
    """The threshold of maximal F1 of one class or of all.

    Attributes:
        threshold: In 0..1; NaN without instances or without a true positive.
        low: Lower end of its interval over images.
        high: Upper end.
        f1: F1 there, in 0..1; NaN without instances.
        precision: Precision there; NaN where `threshold` is.
        recall: Recall there; NaN where `threshold` is.
    """

    threshold: float
    low: float
    high: float
    f1: float
    precision: float
    recall: float


def find_score_bins(scores: np.ndarray) -> np.ndarray:
    """Return the index of the highest of `THRESHOLDS` that each score reaches; 0 below all of them.

    >>> find_score_bins(np.array([0.29, 0.299, 0.3, 1.0, 1.5, -1.0])).tolist()
    [29, 29, 30, 100, 100, 0]
    """
    return (np.searchsorted(THRESHOLDS, scores, side="right") - 1).clip(min=0)


def find_best_thresholds(
    dataset: DetectionDataset, pairs: ImageMatches, weights: np.ndarray, level: float = LEVEL
) -> list[BestThreshold]:
    """Find the threshold of maximal F1 of each class, and then that of all classes together.

    F1 = 2 TP / (detections + instances). A true positive matches an instance of its class at the IoU of `pairs`;
    ignored detections do not count. Where neighboring thresholds have the same F1, the middle one is taken. The
    interval is that of the best thresholds on resamples of the images, and holds the threshold itself.

    Args:
        dataset: The ground truth of N images.
        pairs: The detections and their matches.
        weights: (1 + B, N), as `bootstrap.draw_image_weights` returns them.
        level: Confidence level.
    """
    bins, labels, is_true_positive = find_score_bins(pairs.scores), pairs.labels, pairs.is_true_positive
    gt_images = dataset.image_indices
    numbers = weights.astype(np.float32)
    all_true_positives, all_detections = np.zeros((2, len(weights), len(THRESHOLDS)), dtype=np.float32)
    all_objects, best = np.zeros(len(weights), dtype=np.float32), []
    by_class = np.argsort(labels, kind="stable")
    by_class = by_class[pairs.matches[by_class] != IGNORED]
    edges = np.searchsorted(labels[by_class], np.arange(len(dataset.names) + 1))
    for k in range(len(dataset.names)):
        own = by_class[edges[k] : edges[k + 1]]
        counts = np.bincount(gt_images[pairs.counted & (pairs.gt_labels == k)], minlength=len(dataset))
        objects = numbers @ counts.astype(np.float32)
        true_positives = _count(numbers, pairs.images[own], bins[own], is_true_positive[own])
        detections = _count(numbers, pairs.images[own], bins[own], np.ones(len(own), dtype=bool))
        all_objects += objects
        all_true_positives += true_positives
        all_detections += detections
        best.append(_choose(true_positives, detections, objects, len(dataset), level))
    return [*best, _choose(all_true_positives, all_detections, all_objects, len(dataset), level)]


def _count(weights: np.ndarray, images: np.ndarray, bins: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Count detections of at least each threshold on each resample: (B, 101)."""
    known, place = np.unique(images, return_inverse=True)
    table = np.zeros((len(known), len(THRESHOLDS)), dtype=np.float32)
    np.add.at(table, (place[counted], bins[counted]), 1)
    return np.asarray(weights[:, known] @ table[:, ::-1].cumsum(axis=1)[:, ::-1])


def _choose(
    true_positives: np.ndarray, detections: np.ndarray, objects: np.ndarray, images: int, level: float
) -> BestThreshold:
    """Choose the threshold for the first row, and its interval by the others."""
    both = detections + objects[:, None].astype(np.float64)
    f1 = np.divide(2 * true_positives, both, out=np.zeros_like(both), where=both > 0)
    most = f1.max(axis=1)
    is_best = f1 >= most[:, None] - 1e-9
    first = is_best.argmax(axis=1)
    after = ~is_best & (np.arange(len(THRESHOLDS)) > first[:, None])
    last = np.where(after.any(axis=1), after.argmax(axis=1), len(THRESHOLDS)) - 1
    chosen = np.where(most > 0, (first + last) // 2 / 100, np.nan)
    if not objects[0] or not most[0]:
        nan = float("nan")
        return BestThreshold(nan, nan, nan, 0.0 if objects[0] else nan, nan, nan)
    low, high = (float(end) for end in compute_percentile_interval(chosen[1:], images, level))
    low, high = min(low, float(chosen[0])), max(high, float(chosen[0]))  # NaN stays
    at = int(first[0] + last[0]) // 2
    hits = float(true_positives[0, at])
    return BestThreshold(
        float(chosen[0]), low, high, float(most[0]), hits / float(detections[0, at]), hits / float(objects[0])
    )
