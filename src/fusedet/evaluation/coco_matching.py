"""COCO's matching and averaging on flat arrays: all images, classes, thresholds and area ranges at once.

It makes the same decisions as pycocotools' COCOeval (the tests compare the two) without its loop over images and
classes.
Notation: D detections, sorted by class, image and descending score; G ground truths, sorted by class and image; T IoU
thresholds, A area ranges, K classes, R = 101 recall levels. A group is one class in one image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
AREAS = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])
"""All, small, medium, large, in square pixels, both ends included."""

MAX_THRESHOLD = 1 - 1e-10
"""The largest IoU threshold in effect, as in pycocotools."""

BLOCK = 1 << 20  # pairs whose IoU is computed at a time, which bounds memory


@dataclass(frozen=True)
class GroundTruths:
    """Ground-truth instances.

    Attributes:
        group: (G,), ascending.
        area: (G,), in pixels.
        crowd: (G,) bool, instances that are ignored and can be matched many times.
    """

    group: np.ndarray
    area: np.ndarray
    crowd: np.ndarray


@dataclass(frozen=True)
class RankedDetections:
    """Detections.

    Attributes:
        group: (D,), ascending.
        rank: (D,), rank in the group, from 0 for the best score.
        area: (D,), in pixels.
        scores: (D,).
    """

    group: np.ndarray
    rank: np.ndarray
    area: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class OverlapPairs:
    """Detections and ground truths of the same group that overlap: indices det (P,) and gt (P,), and iou (P,)."""

    det: np.ndarray
    gt: np.ndarray
    iou: np.ndarray


@dataclass(frozen=True)
class PrecisionRecallCurves:
    """Curves and their ends, NaN where a class has no instance of that size.

    Attributes:
        precision: (T, R, K, A).
        scores: (T, R, K, A).
        recall: (T, K, A), with all detections.
        recall_1: (T, K), with one detection, all areas.
        recall_10: (T, K), with ten detections, all areas.
    """

    precision: np.ndarray
    scores: np.ndarray
    recall: np.ndarray
    recall_1: np.ndarray
    recall_10: np.ndarray


def extend_areas(size_bins: Sequence[float]) -> np.ndarray:
    """Return `AREAS` and the area ranges of the size bins between edges in pixels: (4 + B, 2)."""
    edges = np.asarray(size_bins, dtype=np.float64) ** 2
    return np.concatenate([AREAS, np.stack([edges[:-1], edges[1:]], axis=1)])


def rank_in_group(group: np.ndarray) -> np.ndarray:
    """Return the position of each item in its group, from 0; equal groups must be adjacent.

    >>> rank_in_group(np.array([4, 4, 7, 9, 9, 9])).tolist()
    [0, 1, 0, 0, 1, 2]
    """
    starts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])[: len(group)]
    return np.arange(len(group)) - np.repeat(starts, np.diff(np.r_[starts, len(group)]))


def pair_within_groups(det_group: np.ndarray, gt_group: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield all (det, gt) index pairs of equal group in blocks, by detection; `gt_group` is ascending."""
    first = np.searchsorted(gt_group, det_group, side="left")
    count = np.searchsorted(gt_group, det_group, side="right") - first
    end = np.cumsum(count)
    cuts = np.searchsorted(end, np.arange(BLOCK, end[-1] if len(end) else 0, BLOCK))
    for part in np.split(np.arange(len(det_group)), cuts):
        n = count[part]
        det = np.repeat(part, n)
        gt = np.arange(len(det)) - np.repeat(np.cumsum(n) - n, n) + first[det]
        yield det, gt


def compute_box_iou(det: np.ndarray, gt: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Return the IoU (P,) of boxes (P, 4) xywh; for a crowd, the intersection over the area of the detection."""
    left, top = np.maximum(det[:, 0], gt[:, 0]), np.maximum(det[:, 1], gt[:, 1])
    width = np.minimum(det[:, 0] + det[:, 2], gt[:, 0] + gt[:, 2]) - left
    height = np.minimum(det[:, 1] + det[:, 3], gt[:, 1] + gt[:, 3]) - top
    inner = np.where((width > 0) & (height > 0), width * height, 0.0)
    own = det[:, 2] * det[:, 3]
    union = np.where(crowd, own, own + gt[:, 2] * gt[:, 3] - inner)
    return np.divide(inner, union, out=np.zeros_like(inner), where=inner > 0)


def find_box_pairs(
    det_group: np.ndarray, det: np.ndarray, ground_truths: GroundTruths, boxes: np.ndarray, min_iou: float
) -> OverlapPairs:
    """Return the pairs of boxes (xywh) with an IoU of at least `min_iou`."""
    dets, gts, ious = [np.zeros(0, int)], [np.zeros(0, int)], [np.zeros(0)]
    for d, o in pair_within_groups(det_group, ground_truths.group):
        iou = compute_box_iou(det[d], boxes[o], ground_truths.crowd[o])
        near = iou >= min_iou
        dets.append(d[near])
        gts.append(o[near])
        ious.append(iou[near])
    return OverlapPairs(np.concatenate(dets), np.concatenate(gts), np.concatenate(ious))


def match_groups(
    detections: RankedDetections,
    ground_truths: GroundTruths,
    pairs: OverlapPairs,
    thresholds: np.ndarray,
    areas: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Match detections with ground truths in every group.

    In descending score, a detection takes the free ground truth of maximal IoU. Counted ground truths go before ignored
    ones (crowds, which stay free, and those outside the area range). An unmatched detection outside the area range is
    ignored.

    Returns:
        matched (T, A, D), ignored (T, A, D) and gt_matched (T, A, G), all bool.
    """
    T, A, D = len(thresholds), len(areas), len(detections.scores)
    matched, ignored = np.zeros((T, A, D), dtype=bool), np.zeros((T, A, D), dtype=bool)
    gt_matched = np.zeros((T, A, len(ground_truths.group)), dtype=bool)
    gt_ignored = ground_truths.crowd | is_outside(ground_truths.area, areas)  # (A, G)
    min_iou = np.minimum(thresholds, MAX_THRESHOLD)[:, None, None]
    for det, gt, iou, first in iterate_rounds(detections.group, pairs):
        free = (iou >= min_iou) & (ground_truths.crowd[gt] | ~gt_matched[:, :, gt])  # (T, A, p)
        p = len(gt)
        # (A, p): in a detection's run, later is better
        priority = np.arange(1, p + 1) + np.where(gt_ignored[:, gt], 0, p)
        best = np.maximum.reduceat(np.where(free, priority, 0), first, axis=2)  # (T, A, detections of the round)
        has_match = best > 0
        t, a, d = np.nonzero(has_match)
        gt_matched[t, a, gt[(best[t, a, d] - 1) % p]] = True
        matched[:, :, det[first]] = has_match
        ignored[:, :, det[first]] = has_match & (best <= p)
    return matched, ignored | (~matched & is_outside(detections.area, areas)), gt_matched


def is_outside(area: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """Return which of N areas lie outside which of A ranges: (A, N)."""
    return (area < areas[:, :1]) | (area > areas[:, 1:])


def iterate_rounds(
    group: np.ndarray, pairs: OverlapPairs
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the pairs in rounds: round n holds the n-th best overlapping detection of every group.

    Each round is (det, gt, iou, first), where first holds the start of each detection's run. Within a run IoU ascends,
    and pairs of equal IoU keep the order of the ground truths, so that the last one is COCO's choice.
    """
    order = np.lexsort((pairs.gt, pairs.iou, pairs.det))
    det = pairs.det[order]
    if not len(det):
        return
    owners, count = np.unique(det, return_counts=True)
    turn = np.repeat(rank_in_group(group[owners]), count)
    by_turn = np.argsort(turn, kind="stable")
    order, det, turn = order[by_turn], det[by_turn], turn[by_turn]
    for part in np.split(np.arange(len(det)), np.flatnonzero(np.diff(turn)) + 1):
        d = det[part]
        yield d, pairs.gt[order[part]], pairs.iou[order[part]], np.flatnonzero(np.r_[True, d[1:] != d[:-1]])


def iterate_classes(
    detections: RankedDetections, ground_truths: GroundTruths, images: int, classes: int
) -> Iterator[tuple[np.ndarray, slice]]:
    """Yield each class's detections over all images, stably by descending score, and the slice of its ground truths."""
    edges = np.arange(classes + 1) * images
    gt_edges, det_edges = np.searchsorted(ground_truths.group, edges), np.searchsorted(detections.group, edges)
    for k in range(classes):
        own = np.arange(det_edges[k], det_edges[k + 1])
        yield own[np.argsort(-detections.scores[own], kind="stable")], slice(gt_edges[k], gt_edges[k + 1])


def accumulate_curves(
    detections: RankedDetections,
    ground_truths: GroundTruths,
    matched: np.ndarray,
    ignored: np.ndarray,
    areas: np.ndarray,
    images: int,
    classes: int,
) -> PrecisionRecallCurves:
    """Compute the interpolated precision at 101 recall levels, and the final recall."""
    T, A, _ = matched.shape
    precision, scores = np.full((2, T, len(RECALLS), classes, A), np.nan)
    recall, limited_recall = np.full((T, classes, A), np.nan), np.full((2, T, classes), np.nan)
    counts = ~(ground_truths.crowd | is_outside(ground_truths.area, areas))  # (A, G)
    for k, (own, of_class) in enumerate(iterate_classes(detections, ground_truths, images, classes)):
        total = counts[:, of_class].sum(axis=1)  # (A,)
        is_true_positive = matched[:, :, own] & ~ignored[:, :, own]
        false = np.cumsum(~matched[:, :, own] & ~ignored[:, :, own], axis=2, dtype=np.int32)
        for a in np.flatnonzero(total):
            recall[:, k, a] = is_true_positive[:, a].sum(axis=1) / total[a]
            for t in range(T):
                at = np.flatnonzero(is_true_positive[t, a])  # precision has its peaks, recall its steps, at the hits
                hits = np.arange(1.0, len(at) + 1)
                curve = hits / (false[t, a, at] + hits + np.spacing(1))
                curve = np.maximum.accumulate(curve[::-1])[::-1]
                place = np.searchsorted(hits / total[a], RECALLS, side="left")
                reached = place < len(at)
                place = place[reached]
                precision[t, :, k, a] = scores[t, :, k, a] = 0
                precision[t, reached, k, a] = curve[place]
                scores[t, reached, k, a] = detections.scores[own[at[place]]]
        if total[0]:
            for m, most in enumerate((1, 10)):
                counted = is_true_positive[:, 0] & (detections.rank[own] < most)
                limited_recall[m, :, k] = counted.sum(axis=1) / total[0]
    return PrecisionRecallCurves(precision, scores, recall, *limited_recall)
