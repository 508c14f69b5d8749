"""Errors by kind and what each kind costs, after TIDE (Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection
Errors", ECCV 2020, sections 2.2 and 2.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusedet.data.dataset import DetectionDataset
from fusedet.evaluation import coco_matching as rule
from fusedet.evaluation.dataset_matching import MatchResult, match_detections
from fusedet.evaluation.ground_truth import xyxy_to_xywh
from fusedet.evaluation.results import DetectionTable, Result, build_detection_table, nan_mean

KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
CLASS, PLACE, BOTH, DUPLICATE, BACKGROUND, MISSED = range(6)
FOREGROUND, NOTHING = 0.5, 0.1
"""Overlap from which a detection finds an object, and up to which it lies on the background."""


def analyze_errors(dataset: DetectionDataset, results: Sequence[Result] | DetectionTable) -> dict[str, Any]:
    """Every false detection and missed object has one kind: {AP50, kinds: {kind: {count, dAP}}}.

    With the detections matched as in `coco` at IoU 0.5, a false one is, by the first that holds, of kind
    localisation: it overlaps an object of its class by 0.1 to 0.5 (the one that it overlaps most); classification: it
    overlaps an object of another class by 0.5 or more; duplicate: it overlaps an object of its class by 0.5 or more, which a
    better detection has; background: it overlaps no object by more than 0.1; both: the rest, an object of another class
    overlapped by less than 0.5. An object is missed where no detection finds it and none of kind localisation or
    classification lies on it. dAP is what AP50 gains when that kind alone is mended, in 0..1 and not below 0: the best
    detection of kind localisation or classification on an object that none finds becomes right, every other false one of
    the kind goes, missed objects are not asked for. The parts do not add up to 1 - AP50.

    Ignored objects, and detections that lie on one of their class, have no kind. A class that has no object, mended or not,
    is left out of the mean. Raises InputError as `coco` does. Two things differ from the authors' package: as in `coco`
    100 detections count per image and class, not per image, and a class without objects is left out where it says 0.
    """
    table = build_detection_table(dataset, results)
    pairs = match_detections(dataset, table, None, np.array([FOREGROUND]), rule.AREAS[:1])
    n = len(dataset)
    labels, images = np.divmod(pairs.guesses.group, n)
    classes, places = np.divmod(pairs.objects.group, n)
    right, used, crowd = pairs.hit[0, 0] & ~pairs.void[0, 0], pairs.taken[0, 0], pairs.objects.crowd
    false = np.flatnonzero(~pairs.hit[0, 0])

    # each false detection beside all objects of its image that count, in the dataset' order
    beside = np.lexsort((pairs.annotations, places))
    beside = beside[~crowd[beside]]
    truth = rule.Objects(places[beside], pairs.objects.area[beside], crowd[beside])
    corners = xyxy_to_xywh(dataset.boxes.numpy()[pairs.annotations[beside]])
    near = rule.find_box_pairs(images[false], table.boxes[pairs.results[false]], truth, corners, NOTHING)
    det, obj, same = near.det, beside[near.obj], labels[false[near.det]] == classes[beside[near.obj]]
    own, own_iou = _most(det[same], obj[same], near.iou[same], len(false))
    other, other_iou = _most(det[~same], obj[~same], near.iou[~same], len(false))
    kind = np.select(
        [(own >= 0) & (own_iou <= FOREGROUND), other_iou >= FOREGROUND, own >= 0, other_iou > NOTHING],
        [PLACE, CLASS, DUPLICATE, BOTH],
        BACKGROUND,
    )
    meant = np.select(
        [kind == PLACE, kind == CLASS], [own, other], -1
    )  # the object that the detection could have found
    meant[np.append(used, False)[meant]] = -1
    missed = ~used & ~crowd
    missed[meant[meant >= 0]] = False
    order = np.lexsort((pairs.results[false], -pairs.guesses.scores[false]))
    objects, first = np.unique(
        meant[order], return_index=True
    )  # of the detections on one object the best can be mended
    best = np.zeros(len(false), dtype=bool)
    best[order[first[objects >= 0]]] = True

    nothing, names = pairs.void[0, 0], len(dataset.names)
    before = _ap50(pairs, labels, right, nothing, np.ones_like(missed), n, names)
    kinds = {}
    for k, name in enumerate(KINDS):
        mended, good, gone = labels.copy(), right.copy(), nothing.copy()
        turned = best & (kind == k)
        good[false[turned]] = True
        mended[false[turned]] = classes[meant[turned]]
        gone[false[(kind == k) & ~best]] = True
        wanted = ~missed if k == MISSED else np.ones_like(missed)
        after = _ap50(pairs, mended, good, gone, wanted, n, names)
        kinds[name] = {
            "count": int(missed.sum() if k == MISSED else (kind == k).sum()),
            "dAP": max(0.0, after - before),
        }
    return {"AP50": before, "kinds": kinds}


def _most(det: np.ndarray, obj: np.ndarray, iou: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The object that each of `count` detections overlaps most, of equal ones the first, else -1, and the overlap, else 0."""
    rising = np.lexsort((-np.arange(len(iou)), iou))
    most, overlap = np.full(count, -1), np.zeros(count)
    most[det[rising]], overlap[det[rising]] = obj[rising], iou[rising]  # the last one stays
    return most, overlap


def _ap50(
    pairs: MatchResult,
    labels: np.ndarray,
    right: np.ndarray,
    gone: np.ndarray,
    wanted: np.ndarray,
    images: int,
    classes: int,
) -> float:
    """Mean AP of detections with these labels, of which some are right and some gone, for the objects that are wanted."""
    group = labels * images + pairs.guesses.group % images
    left = np.flatnonzero(~gone)
    left = left[np.lexsort((-pairs.guesses.scores[left], group[left]))]
    guesses = rule.Guesses(group[left], rule.rank(group[left]), pairs.guesses.area[left], pairs.guesses.scores[left])
    objects = rule.Objects(pairs.objects.group[wanted], pairs.objects.area[wanted], pairs.objects.crowd[wanted])
    hit = right[None, None, left]
    return nan_mean(
        rule.accumulate(guesses, objects, hit, np.zeros_like(hit), rule.AREAS[:1], images, classes).precision
    )
