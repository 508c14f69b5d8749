"""Greedy matching of one image's detections, for the confusion matrix and the drawn errors."""

import numpy as np

FALSE_POSITIVE, IGNORED = -1, -2


def match_greedily(
    boxes: np.ndarray,
    labels: np.ndarray,
    gt_boxes: np.ndarray,
    gt_labels: np.ndarray,
    ignored_boxes: np.ndarray,
    ignored_labels: np.ndarray,
    iou: float,
) -> np.ndarray:
    """Match detections with ground truths of any class, best score first.

    A detection takes the free ground truth of maximal IoU, if that is at least `iou`; of equal IoUs one of its own
    class. An unmatched detection is ignored if at least `iou` of its area lies in an ignored instance of its class.

    Args:
        boxes: (D, 4) xyxy, best score first.
        labels: (D,).
        gt_boxes: (G, 4) xyxy.
        gt_labels: (G,).
        ignored_boxes: (I, 4) xyxy.
        ignored_labels: (I,).
        iou: The least IoU.

    Returns:
        (D,), indices of ground truths, FALSE_POSITIVE (-1) or IGNORED (-2).
    """
    matches = np.full(len(boxes), FALSE_POSITIVE)
    inner, area, gt_area = _overlap(boxes, gt_boxes)
    overlap = np.divide(inner, area[:, None] + gt_area - inner, out=np.zeros_like(inner), where=inner > 0)
    for d in range(len(boxes) if len(gt_boxes) else 0):
        g = int(np.lexsort((gt_labels == labels[d], overlap[d]))[-1])
        if overlap[d, g] >= iou:
            matches[d] = g
            overlap[:, g] = 0  # taken
    inner, area, _ = _overlap(boxes, ignored_boxes)
    inside = (inner >= iou * area[:, None]) & (inner > 0) & (labels[:, None] == ignored_labels)
    matches[(matches == FALSE_POSITIVE) & inside.any(axis=1)] = IGNORED
    return matches


def _overlap(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the intersections (A, B) of boxes xyxy and their areas (A,) and (B,)."""
    sides = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    return sides.clip(min=0).prod(axis=2), (a[:, 2:] - a[:, :2]).prod(axis=1), (b[:, 2:] - b[:, :2]).prod(axis=1)
