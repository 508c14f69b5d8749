"""Counts of a page at every threshold: confusions, errors by type, and true and false positives per class."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusedet.evaluation.image_matching import FALSE_POSITIVE, IGNORED, ImageMatches
from fusedet.evaluation.score_thresholds import THRESHOLDS, find_score_bins

CORRECT, CLASSIFICATION, LOCALIZATION = "correct", "classification", "localization"
DUPLICATE, BACKGROUND, MISSED = "duplicate", "background", "missed"
KINDS = (MISSED, BACKGROUND, DUPLICATE, LOCALIZATION, CLASSIFICATION, CORRECT)
"""What a detection or an instance is at a threshold, the errors first."""

DEFAULT = 30
"""The threshold that the page starts with, in hundredths: that of the confusion matrix and of the worst images."""

SHOWN_CLASSES = 24
"""Classes of the confusion matrix; of more, the others share a row and a column."""

NEAR = 0.1
"""The IoU with an instance of its class from which a false positive is a localization error."""

OTHERS = "other classes"


@dataclass(frozen=True)
class Counts:
    """Counts by threshold, as the page embeds them.

    A histogram is a flat list [bin, count, bin, count, ...] of the bins that are not empty, ascending. A detection of
    bin b counts at each threshold up to b hundredths.

    Attributes:
        kinds: Histograms of detections by all of `KINDS` but missed.
        objects: Instances per class.
        true_positives: Histograms of the true positives per class.
        false_positives: Histograms of the other detections per class.
        rows: Names of the confusion matrix's rows and columns before the last, which is the background.
        totals: Instances of each row; 0 of the background.
        cells: (row, column, histogram) of each cell that is not empty, without the column of missed instances.
    """

    kinds: dict[str, list[int]]
    objects: list[int]
    true_positives: list[list[int]]
    false_positives: list[list[int]]
    rows: list[str]
    totals: list[int]
    cells: list[tuple[int, int, list[int]]]

    def to_plain(self) -> dict[str, Any]:
        """Return what the page's script reads; names are in the page itself."""
        return {
            "kinds": self.kinds,
            "objects": self.objects,
            "true_positives": self.true_positives,
            "false_positives": self.false_positives,
            "totals": self.totals,
            "cells": self.cells,
        }


def classify(pairs: ImageMatches) -> np.ndarray:
    """Return the index in `KINDS` of each detection (D,), -1 of an ignored one.

    A detection is correct or a classification error if it matches an instance. Others are duplicates if their IoU with
    an instance of their class is at least 0.5, localization errors if it is at least `NEAR`, else background errors.
    """
    is_false = pairs.matches == FALSE_POSITIVE
    choices = [
        (pairs.matches == IGNORED, -1),
        (is_false & (pairs.same_class_iou >= 0.5), KINDS.index(DUPLICATE)),
        (is_false & (pairs.same_class_iou >= NEAR), KINDS.index(LOCALIZATION)),
        (is_false, KINDS.index(BACKGROUND)),
        (pairs.is_true_positive, KINDS.index(CORRECT)),
    ]
    return np.select([own for own, _ in choices], [value for _, value in choices], KINDS.index(CLASSIFICATION))


def count_by_threshold(pairs: ImageMatches, kinds: np.ndarray, names: Sequence[str]) -> Counts:
    """Count everything that follows the threshold on the score.

    Args:
        pairs: D detections and their matches.
        kinds: (D,) kind of each detection, as `classify` returns it.
        names: (K,) class names.
    """
    bins, k = find_score_bins(pairs.scores), len(names)
    is_counted = kinds >= 0
    objects = np.bincount(pairs.gt_labels[pairs.counted], minlength=k)
    labels, is_true_positive = pairs.labels, pairs.is_true_positive
    true_positives, false_positives = (
        _make_histograms(labels[part], bins[part], k) for part in (is_true_positive, is_counted & ~is_true_positive)
    )
    group, rows = _group_classes(pairs, bins, objects, names)
    matched = pairs.matches >= 0
    row = np.full(len(bins), len(rows))
    row[matched] = group[pairs.gt_labels[pairs.matches[matched]]]
    column = group[pairs.labels]
    place = row * (len(rows) + 1) + column
    by_cell = _make_histograms(place[is_counted], bins[is_counted], (len(rows) + 1) ** 2)
    cells = [(*divmod(at, len(rows) + 1), own) for at, own in enumerate(by_cell) if own]
    totals = np.bincount(group, weights=objects, minlength=len(rows)).astype(int)
    of_kind = _make_histograms(kinds[is_counted], bins[is_counted], len(KINDS))
    by_kind = {kind: own for kind, own in zip(KINDS, of_kind, strict=True) if kind != MISSED}
    return Counts(by_kind, objects.tolist(), true_positives, false_positives, rows, [*totals.tolist(), 0], cells)


def count_from(histogram: Sequence[int], threshold: int) -> int:
    """Return how many items of a histogram lie at a threshold in hundredths or above.

    >>> count_from([29, 4, 30, 2, 90, 1], 30)
    3
    """
    return sum(count for at, count in zip(histogram[::2], histogram[1::2]) if at >= threshold)


def fill_matrix(counts: Counts, threshold: int) -> list[list[int]]:
    """Return the confusion matrix at a threshold: rows are true classes and background, the last column is missed."""
    size = len(counts.rows) + 1
    matrix = [[0] * size for _ in range(size)]
    for row, column, histogram in counts.cells:
        matrix[row][column] = count_from(histogram, threshold)
    for row, total in enumerate(counts.totals[:-1]):
        matrix[row][-1] = total - sum(matrix[row])
    return matrix


def _group_classes(
    pairs: ImageMatches, bins: np.ndarray, objects: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, list[str]]:
    """Return the row of each class in the matrix, and the rows' names: of many classes those with the most errors."""
    k = len(names)
    if k <= SHOWN_CLASSES:
        return np.arange(k), list(names)
    counted = (bins >= DEFAULT) & (pairs.matches != IGNORED)
    hits = np.bincount(pairs.labels[counted & pairs.is_true_positive], minlength=k)
    errors = objects + np.bincount(pairs.labels[counted], minlength=k) - 2 * hits
    kept = np.sort(np.argsort(-errors, kind="stable")[: SHOWN_CLASSES - 1])
    group = np.full(k, len(kept))
    group[kept] = np.arange(len(kept))
    return group, [*(names[c] for c in kept.tolist()), OTHERS]


def _make_histograms(groups: np.ndarray, bins: np.ndarray, count: int) -> list[list[int]]:
    """Return the histogram of the bins of each of `count` groups."""
    size = len(THRESHOLDS)
    table = np.bincount(groups * size + bins, minlength=count * size).reshape(count, size)
    histograms = []
    for row in table:
        at = np.flatnonzero(row)
        histograms.append(np.stack([at, row[at]], axis=1).ravel().tolist())
    return histograms
