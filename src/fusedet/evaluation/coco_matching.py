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

BLOCK = 1 << 17  # pairs whose IoU is computed at a time, which bounds memory


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
    """Detections and ground truths of the same group that overlap.

    Attributes:
        det: (P,), indices of detections, ascending.
        gt: (P,), indices of ground truths.
        iou: (P,).
    """

    det: np.ndarray
    gt: np.ndarray
    iou: np.ndarray

    def select(self, keep: np.ndarray) -> OverlapPairs:
        """Return the pairs where `keep` (P,) is true."""
        return OverlapPairs(self.det[keep], self.gt[keep], self.iou[keep])


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
    """Find the pairs of boxes in a group with an IoU of at least `min_iou`.

    Args:
        det_group: Group of each detection; the groups of ground truths are ascending.
        det: Boxes of the detections, xywh in pixels.
        ground_truths: G instances.
        boxes: Boxes of the instances, xywh in pixels.
        min_iou: In 0..1.

    Shape:
        det_group (D,); det (D, 4); boxes (G, 4).
    """
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

    Args:
        detections: D detections.
        ground_truths: G instances.
        pairs: Pairs of a group with their IoU, at least all that reach the lowest threshold.
        thresholds: (T,) IoU thresholds.
        areas: (A, 2) least and largest area, in square pixels.

    Returns:
        matched (T, A, D), ignored (T, A, D) and gt_matched (T, A, G), all bool.
    """
    T, A, D = len(thresholds), len(areas), len(detections.scores)
    matched, ignored = np.zeros((T, A, D), dtype=bool), np.zeros((T, A, D), dtype=bool)
    gt_matched = np.zeros((T, A, len(ground_truths.group)), dtype=bool)
    gt_ignored = ground_truths.crowd | is_outside(ground_truths.area, areas)  # (A, G)
    effective = np.minimum(thresholds, MAX_THRESHOLD)
    pairs = pairs.select(pairs.iou >= effective.min(initial=1))
    has_choice = _find_choices(pairs, D, len(ground_truths.group))

    # Without a choice the best detection that overlaps enough takes the ground truth, whatever the area range.
    simple = pairs.select(~has_choice)
    order = np.argsort(simple.gt, kind="stable")
    det, gt, iou = simple.det[order], simple.gt[order], simple.iou[order]
    for least, is_matched, is_ignored, is_gt_matched in zip(effective, matched, ignored, gt_matched):
        near = np.flatnonzero(iou >= least)
        own = gt[near]
        near = near[ground_truths.crowd[own] | np.r_[True, own[1:] != own[:-1]][: len(own)]]
        is_matched[:, det[near]] = is_gt_matched[:, gt[near]] = True
        is_ignored[:, det[near]] = gt_ignored[:, gt[near]]

    for det, gt, iou, first in iterate_rounds(detections.group, pairs.select(has_choice)):
        free = (iou >= effective[:, None, None]) & (ground_truths.crowd[gt] | ~gt_matched[:, :, gt])  # (T, A, p)
        p = len(gt)
        # (A, p): in a detection's run, later is better
        priority = np.arange(1, p + 1) + np.where(gt_ignored[:, gt], 0, p)
        best = np.maximum.reduceat(np.where(free, priority, 0), first, axis=2)  # (T, A, detections of the round)
        has_match = best > 0
        t, a, d = np.nonzero(has_match)
        gt_matched[t, a, gt[(best[t, a, d] - 1) % p]] = True
        matched[:, :, det[first]] = has_match
        ignored[:, :, det[first]] = has_match & (best <= p)

    outside = is_outside(detections.area, areas)
    for is_matched, is_ignored in zip(matched, ignored):
        is_ignored |= outside & ~is_matched
    return matched, ignored, gt_matched


def _find_choices(pairs: OverlapPairs, detections: int, ground_truths: int) -> np.ndarray:
    """Return which pairs (P,) hold a ground truth that a detection with several ground truths overlaps."""
    is_choosing = np.bincount(pairs.det, minlength=detections) > 1
    is_chosen_from = np.zeros(ground_truths, dtype=bool)
    is_chosen_from[pairs.gt[is_choosing[pairs.det]]] = True
    return is_chosen_from[pairs.gt]


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
    paired, count = np.unique(det, return_counts=True)
    turn = np.repeat(rank_in_group(group[paired]), count)
    by_turn = np.argsort(turn, kind="stable")
    order, det, turn = order[by_turn], det[by_turn], turn[by_turn]
    for part in np.split(np.arange(len(det)), np.flatnonzero(np.diff(turn)) + 1):
        d = det[part]
        yield d, pairs.gt[order[part]], pairs.iou[order[part]], np.flatnonzero(np.r_[True, d[1:] != d[:-1]])


def iterate_classes(
    detections: RankedDetections, ground_truths: GroundTruths, images: int, classes: int
) -> Iterator[tuple[np.ndarray, slice]]:
    """Iterate over the classes, with their detections and ground truths of all images.

    Args:
        detections: D detections.
        ground_truths: G instances.
        images: Number of images; group = label * images + position of the image.
        classes: K.

    Yields:
        Of each class the indices of its detections, stably by descending score, and the slice of its ground truths.
    """
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
    """Compute the interpolated precision at 101 recall levels, and the final recall.

    Args:
        detections: D detections.
        ground_truths: G instances.
        matched: (T, A, D) bool, as `match_groups` returns it.
        ignored: (T, A, D) bool, as `match_groups` returns it.
        areas: (A, 2) least and largest area, in square pixels; the first holds all sizes.
        images: Number of images.
        classes: K.
    """
    T, A, _ = matched.shape
    precision, scores = np.full((2, T, len(RECALLS), classes, A), np.nan)
    recall, limited_recall = np.full((T, classes, A), np.nan), np.full((2, T, classes), np.nan)
    parts = list(iterate_classes(detections, ground_truths, images, classes))
    order = np.concatenate([np.zeros(0, dtype=int), *(own for own, _ in parts)])  # by class, then descending score
    label = np.repeat(np.arange(classes), [len(own) for own, _ in parts])
    start = np.searchsorted(label, np.arange(classes))
    counts = ~(ground_truths.crowd | is_outside(ground_truths.area, areas))  # (A, G)
    for a in range(A):
        total = np.array([np.count_nonzero(counts[a, of_class]) for _, of_class in parts], dtype=int)  # (K,)
        known = np.flatnonzero(total)
        needed = find_recall_steps(total[known])  # (K', R)
        for t in range(T):
            counted = ~ignored[t, a].take(order)
            # Precision has its peaks, and recall its steps, at the hits.
            at = np.flatnonzero(counted & matched[t, a].take(order))
            seen = np.r_[0, np.cumsum(counted)]
            hits_per_class = np.bincount(label[at], minlength=classes)
            first_hit = np.cumsum(hits_per_class) - hits_per_class
            recall[t, known, a] = hits_per_class[known] / total[known]
            if a == 0:
                for m, most in enumerate((1, 10)):
                    limited = np.bincount(label[at[detections.rank[order[at]] < most]], minlength=classes)
                    limited_recall[m, t, known] = limited[known] / total[known]
            precision[t, :, known, a] = scores[t, :, known, a] = 0
            is_hit = hits_per_class[known] > 0
            hit = known[is_hit]
            if not len(hit):
                continue
            hits = np.arange(1.0, len(at) + 1) - first_hit[label[at]]
            curve = hits / (seen[at + 1] - seen[start[label[at]]] + np.spacing(1))
            reached = needed[is_hit] < hits_per_class[hit, None]
            place = first_hit[hit, None] + np.where(reached, needed[is_hit], hits_per_class[hit, None] - 1)
            # The maximum between the places of two levels, then of all later ones of the class.
            between = np.maximum.reduceat(curve, place.ravel()).reshape(place.shape)
            best = np.maximum.accumulate(between[:, ::-1], axis=1)[:, ::-1]
            precision[t, :, hit, a] = np.where(reached, best, 0)
            scores[t, :, hit, a] = np.where(reached, detections.scores[order[at[place]]], 0)
    return PrecisionRecallCurves(precision, scores, recall, *limited_recall)


def find_recall_steps(total: np.ndarray) -> np.ndarray:
    """Return how many hits come before the one that reaches each recall level, for (K,) numbers of instances: (K, R).

    >>> find_recall_steps(np.array([1, 4]))[:, [0, 25, 26, 100]].tolist()
    [[0, 0, 0, 0], [0, 0, 1, 3]]
    """
    steps = [np.searchsorted(np.arange(1, n + 1) / n, RECALLS, side="left") for n in total.tolist()]
    return np.array(steps, dtype=int).reshape(-1, len(RECALLS))
