"""Calibration of scores: how often detections of a score are true positives."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Calibration:
    """Precision by score in bins of equal width.

    Attributes:
        edges: (B + 1,), edges of the bins, 0 to 1.
        count: (B,), detections in each bin.
        score: (B,), their mean score, NaN in an empty bin.
        precision: (B,), the share of true positives, NaN in an empty bin.
        ece: The expected calibration error in 0..1, NaN without detections.
    """

    edges: np.ndarray
    count: np.ndarray
    score: np.ndarray
    precision: np.ndarray
    ece: float


def compute_calibration(scores: np.ndarray, is_true_positive: np.ndarray, bins: int = 10) -> Calibration:
    """Compute the reliability diagram and the expected calibration error of detections.

    ECE is the mean of |precision - mean score| over the bins, weighted by their detections. A bin holds its lower edge,
    and the last one 1 too.

    Args:
        scores: (D,) in 0..1.
        is_true_positive: (D,) bool, whether each detection is a true positive.
        bins: Number of bins B.

    References:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3; for detections Küppers et al.,
        "Multivariate Confidence Calibration for Object Detection", CVPR Workshops 2020.
    """
    edges = np.arange(bins + 1) / bins
    place = (np.searchsorted(edges, scores, side="right") - 1).clip(0, bins - 1)
    count = np.bincount(place, minlength=bins)
    score, precision = (
        np.divide(np.bincount(place, values, bins), count, out=np.full(bins, np.nan), where=count > 0)
        for values in (scores, is_true_positive)
    )
    gaps = count * np.nan_to_num(np.abs(precision - score))
    return Calibration(edges, count, score, precision, float(gaps.sum() / count.sum()) if count.sum() else float("nan"))
