"""COCO's rule of matching and averaging on flat arrays: every image, class, threshold and area range at once.

The same decisions as pycocotools' COCOeval (the tests hold the two equal), without its loop over image x class pairs.
Below, D detections are sorted by class, then image, then falling score; G objects by class, then image; T thresholds
of overlap, A ranges of area, K classes, R = 101 recall levels. A group is one class in one image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
AREAS = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])
"""All, small, medium, large, in square pixels, both ends included."""

MAX_THRESHOLD = 1 - 1e-10
"""pycocotools never asks for more overlap than this."""

BLOCK = 1 << 20  # pairs whose overlap is computed at a time, a bound on memory


@dataclass(frozen=True)
class Objects:
    """group (N,) of each object, ascending; area (N,) in pixels; crowd (N,) bool, objects that neither count nor harm."""

    group: np.ndarray
    area: np.ndarray
    crowd: np.ndarray


@dataclass(frozen=True)
class Guesses:
    """group (D,) ascending; rank (D,) in the group, best first from 0; area (D,) in pixels; scores (D,)."""

    group: np.ndarray
    rank: np.ndarray
    area: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Pairs:
    """Detections and objects of the same group that overlap: indices det (P,) and obj (P,), and iou (P,)."""

    det: np.ndarray
    obj: np.ndarray
    iou: np.ndarray


@dataclass(frozen=True)
class Curves:
    """precision and scores (T, R, K, A), recall (T, K, A) at 100 detections, recall_1 and recall_10 (T, K) over all areas.

    NaN where a class has no object of that size.
    """

    precision: np.ndarray
    scores: np.ndarray
    recall: np.ndarray
    recall_1: np.ndarray
    recall_10: np.ndarray


def rank(group: np.ndarray) -> np.ndarray:
    """Each item's place in its group, from 0; equal groups must lie together.

    >>> rank(np.array([4, 4, 7, 9, 9, 9])).tolist()
    [0, 1, 0, 0, 1, 2]
    """
    starts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])[: len(group)]
    return np.arange(len(group)) - np.repeat(starts, np.diff(np.r_[starts, len(group)]))


def same_group(det_group: np.ndarray, obj_group: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All (det, obj) index pairs of one group, det by det and in blocks; obj_group is ascending."""
    first = np.searchsorted(obj_group, det_group, side="left")
    count = np.searchsorted(obj_group, det_group, side="right") - first
    end = np.cumsum(count)
    cuts = np.searchsorted(end, np.arange(BLOCK, end[-1] if len(end) else 0, BLOCK))
    for part in np.split(np.arange(len(det_group)), cuts):
        n = count[part]
        det = np.repeat(part, n)
        obj = np.arange(len(det)) - np.repeat(np.cumsum(n) - n, n) + first[det]
        yield det, obj


def box_iou(det: np.ndarray, obj: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Overlap (P,) of boxes (P, 4) as x, y, width, height; for a crowd, the share of the detection that lies in it."""
    left, top = np.maximum(det[:, 0], obj[:, 0]), np.maximum(det[:, 1], obj[:, 1])
    width = np.minimum(det[:, 0] + det[:, 2], obj[:, 0] + obj[:, 2]) - left
    height = np.minimum(det[:, 1] + det[:, 3], obj[:, 1] + obj[:, 3]) - top
    inner = np.where((width > 0) & (height > 0), width * height, 0.0)
    own = det[:, 2] * det[:, 3]
    union = np.where(crowd, own, own + obj[:, 2] * obj[:, 3] - inner)
    return np.divide(inner, union, out=np.zeros_like(inner), where=inner > 0)


def find_box_pairs(det_group: np.ndarray, det: np.ndarray, objects: Objects, boxes: np.ndarray, least: float) -> Pairs:
    """Pairs of boxes (x, y, width, height) that overlap by at least `least`."""
    dets, objs, ious = [np.zeros(0, int)], [np.zeros(0, int)], [np.zeros(0)]
    for d, o in same_group(det_group, objects.group):
        iou = box_iou(det[d], boxes[o], objects.crowd[o])
        near = iou >= least
        dets.append(d[near])
        objs.append(o[near])
        ious.append(iou[near])
    return Pairs(np.concatenate(dets), np.concatenate(objs), np.concatenate(ious))


def match(
    guesses: Guesses, objects: Objects, pairs: Pairs, thresholds: np.ndarray, areas: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which detections hit an object, which do not count (T, A, D), and which objects are hit (T, A, G); all bool.

    Best score first, a detection takes the free object that it overlaps most; an object that counts goes before one that
    does not (a crowd, which is never used up, or one outside the area range). What hits no object and lies outside the
    area range does not count.
    """
    T, A, D = len(thresholds), len(areas), len(guesses.scores)
    hit, void = np.zeros((T, A, D), dtype=bool), np.zeros((T, A, D), dtype=bool)
    taken = np.zeros((T, A, len(objects.group)), dtype=bool)
    idle = objects.crowd | outside(objects.area, areas)  # (A, G)
    least = np.minimum(thresholds, MAX_THRESHOLD)[:, None, None]
    for det, obj, iou, first in _rounds(guesses.group, pairs):
        free = (iou >= least) & (objects.crowd[obj] | ~taken[:, :, obj])  # (T, A, p)
        p = len(obj)
        worth = np.arange(1, p + 1) + np.where(idle[:, obj], 0, p)  # (A, p): in a detection's run, later is better
        best = np.maximum.reduceat(np.where(free, worth, 0), first, axis=2)  # (T, A, detections of the round)
        got = best > 0
        t, a, d = np.nonzero(got)
        taken[t, a, obj[(best[t, a, d] - 1) % p]] = True
        hit[:, :, det[first]] = got
        void[:, :, det[first]] = got & (best <= p)
    return hit, void | (~hit & outside(guesses.area, areas)), taken


def outside(area: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """Which of N areas lie outside which of A ranges: (A, N)."""
    return (area < areas[:, :1]) | (area > areas[:, 1:])


def _rounds(group: np.ndarray, pairs: Pairs) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Pairs in rounds, such that a round holds one detection of a group, the n-th best of those that overlap anything.

    Yields det, obj, iou and where each detection's run begins; in a run the overlap rises, and equal overlaps keep the
    objects' order, so that the last one is COCO's choice.
    """
    order = np.lexsort((pairs.obj, pairs.iou, pairs.det))
    det = pairs.det[order]
    if not len(det):
        return
    owners, count = np.unique(det, return_counts=True)
    turn = np.repeat(rank(group[owners]), count)
    by_turn = np.argsort(turn, kind="stable")
    order, det, turn = order[by_turn], det[by_turn], turn[by_turn]
    for part in np.split(np.arange(len(det)), np.flatnonzero(np.diff(turn)) + 1):
        d = det[part]
        yield d, pairs.obj[order[part]], pairs.iou[order[part]], np.flatnonzero(np.r_[True, d[1:] != d[:-1]])


def by_class(guesses: Guesses, objects: Objects, images: int, classes: int) -> Iterator[tuple[np.ndarray, slice]]:
    """Each class's detections over all images, best score first and of equal ones the earlier, and where its objects are."""
    edges = np.arange(classes + 1) * images
    object_edges, guess_edges = np.searchsorted(objects.group, edges), np.searchsorted(guesses.group, edges)
    for k in range(classes):
        own = np.arange(guess_edges[k], guess_edges[k + 1])
        yield own[np.argsort(-guesses.scores[own], kind="stable")], slice(object_edges[k], object_edges[k + 1])


def accumulate(
    guesses: Guesses, objects: Objects, hit: np.ndarray, void: np.ndarray, areas: np.ndarray, images: int, classes: int
) -> Curves:
    """Precision at 101 recalls, made to fall, and the final recall, per threshold, class and area range."""
    T, A, _ = hit.shape
    precision, scores = np.full((2, T, len(RECALLS), classes, A), np.nan)
    recall, few = np.full((T, classes, A), np.nan), np.full((2, T, classes), np.nan)
    counts = ~(objects.crowd | outside(objects.area, areas))  # (A, G)
    for k, (own, of_class) in enumerate(by_class(guesses, objects, images, classes)):
        total = counts[:, of_class].sum(axis=1)  # (A,)
        good = hit[:, :, own] & ~void[:, :, own]
        false = np.cumsum(~hit[:, :, own] & ~void[:, :, own], axis=2, dtype=np.int32)
        for a in np.flatnonzero(total):
            recall[:, k, a] = good[:, a].sum(axis=1) / total[a]
            for t in range(T):
                at = np.flatnonzero(good[t, a])  # precision has its peaks, recall its steps, at the hits
                hits = np.arange(1.0, len(at) + 1)
                curve = hits / (false[t, a, at] + hits + np.spacing(1))
                curve = np.maximum.accumulate(curve[::-1])[::-1]
                place = np.searchsorted(hits / total[a], RECALLS, side="left")
                reached = place < len(at)
                place = place[reached]
                precision[t, :, k, a] = scores[t, :, k, a] = 0
                precision[t, reached, k, a] = curve[place]
                scores[t, reached, k, a] = guesses.scores[own[at[place]]]
        if total[0]:
            for m, most in enumerate((1, 10)):
                few[m, :, k] = (good[:, 0] & (guesses.rank[own] < most)).sum(axis=1) / total[0]
    return Curves(precision, scores, recall, *few)
