"""Which object each detection of an image found: the one rule behind the confusion matrix and the images of
mistakes."""

from __future__ import annotations

import numpy as np

FALSE_POSITIVE, IGNORED = -1, -2


def match_greedily(
    boxes: np.ndarray,
    labels: np.ndarray,
    truth: np.ndarray,
    classes: np.ndarray,
    idle: np.ndarray,
    idle_classes: np.ndarray,
    iou: float,
) -> np.ndarray:
    """Whose object each detection is: (D,) index into truth, FALSE_POSITIVE (-1) or IGNORED (-2).

    boxes (D, 4), best first, truth (G, 4) and idle (I, 4), ignored objects, are xyxy. Best first, a detection takes the
    free object, of any class, that it overlaps most and by at least `iou`; of equal overlaps one of its own class. A
    detection that takes none is excused where at least `iou` of its own area lies in an ignored object of its class.
    """
    owner = np.full(len(boxes), FALSE_POSITIVE)
    inner, area, true_area = _overlap(boxes, truth)
    overlap = np.divide(inner, area[:, None] + true_area - inner, out=np.zeros_like(inner), where=inner > 0)
    for d in range(len(boxes) if len(truth) else 0):
        g = int(np.lexsort((classes == labels[d], overlap[d]))[-1])
        if overlap[d, g] >= iou:
            owner[d] = g
            overlap[:, g] = 0  # taken
    inner, area, _ = _overlap(boxes, idle)
    inside = (inner >= iou * area[:, None]) & (inner > 0) & (labels[:, None] == idle_classes)
    owner[(owner == FALSE_POSITIVE) & inside.any(axis=1)] = IGNORED
    return owner


def _overlap(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shared area (A, B) of boxes xyxy and their own areas (A,), (B,)."""
    sides = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    return sides.clip(min=0).prod(axis=2), (a[:, 2:] - a[:, :2]).prod(axis=1), (b[:, 2:] - b[:, :2]).prod(axis=1)
