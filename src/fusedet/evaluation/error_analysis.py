"""Error breakdown: every error has one type, and each type its cost in AP50.

References:
    Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020, sections 2.2 and 2.3.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusedet.data.dataset import DetectionDataset
from fusedet.evaluation import coco_matching
from fusedet.evaluation.dataset_matching import MatchResult, match_detections
from fusedet.evaluation.ground_truth import xyxy_to_xywh
from fusedet.evaluation.results import DetectionTable, Result, build_detection_table, nan_mean

ERROR_TYPES = ("classification", "localization", "both", "duplicate", "background", "missed")
CLASSIFICATION, LOCALIZATION, BOTH, DUPLICATE, BACKGROUND, MISSED = range(6)
FOREGROUND, NOTHING = 0.5, 0.1
"""IoU from which a detection matches an instance, and up to which it lies on the background."""


def analyze_errors(dataset: DetectionDataset, results: Sequence[Result] | DetectionTable) -> dict[str, Any]:
    """Assign one type to every false positive and missed instance, and compute what each type costs.

    Detections are matched as in `evaluate_coco` at IoU 0.5. A false positive has the first type that applies:

    - localization: IoU 0.1 to 0.5 with the instance of its class that it overlaps most;
    - classification: IoU 0.5 or more with an instance of another class;
    - duplicate: IoU 0.5 or more with an instance of its class that another detection has matched;
    - background: IoU at most 0.1 with every instance;
    - both: the rest, IoU below 0.5 with an instance of another class.

    An instance is missed if no detection matches it and no localization or classification error lies on it.

    dAP is the gain in AP50 when the errors of one type are corrected, not below 0. The best localization or
    classification error on an unmatched instance becomes a true positive, all other errors of the type are removed, and
    missed instances are removed from the ground truth. The gains do not add up to 1 - AP50.

    Ignored instances and detections matched to them have no type. A class without instances is left out of the mean.
    Two things differ from the authors' package: 100 detections count per image and class, not per image, and a class
    without instances is left out where the package counts 0.

    Returns:
        {AP50, types: {type: {count, dAP}}}.

    Raises:
        InputError: The results do not fit the dataset, as in `evaluate_coco`.
    """
    table = build_detection_table(dataset, results)
    pairs = match_detections(dataset, table, None, np.array([FOREGROUND]), coco_matching.AREAS[:1])
    n = len(dataset)
    labels, images = np.divmod(pairs.detections.group, n)
    classes, places = np.divmod(pairs.ground_truths.group, n)
    right, used, crowd = pairs.matched[0, 0] & ~pairs.ignored[0, 0], pairs.gt_matched[0, 0], pairs.ground_truths.crowd
    false = np.flatnonzero(~pairs.matched[0, 0])

    # pairs of each false positive with all counted instances of its image, in the order of the dataset
    others_in_image = np.lexsort((pairs.annotations, places))
    others_in_image = others_in_image[~crowd[others_in_image]]
    ground_truth = coco_matching.GroundTruths(
        places[others_in_image], pairs.ground_truths.area[others_in_image], crowd[others_in_image]
    )
    boxes = xyxy_to_xywh(dataset.boxes.numpy()[pairs.annotations[others_in_image]])
    near = coco_matching.find_box_pairs(images[false], table.boxes[pairs.results[false]], ground_truth, boxes, NOTHING)
    det, gt, same = near.det, others_in_image[near.gt], labels[false[near.det]] == classes[others_in_image[near.gt]]
    own, own_iou = _find_max_iou(det[same], gt[same], near.iou[same], len(false))
    other, other_iou = _find_max_iou(det[~same], gt[~same], near.iou[~same], len(false))
    error_type = np.select(
        [(own >= 0) & (own_iou <= FOREGROUND), other_iou >= FOREGROUND, own >= 0, other_iou > NOTHING],
        [LOCALIZATION, CLASSIFICATION, DUPLICATE, BOTH],
        BACKGROUND,
    )
    # the instance that the detection would match if corrected
    target = np.select([error_type == LOCALIZATION, error_type == CLASSIFICATION], [own, other], -1)
    target[np.append(used, False)[target]] = -1
    missed = ~used & ~crowd
    missed[target[target >= 0]] = False
    order = np.lexsort((pairs.results[false], -pairs.detections.scores[false]))
    # of the detections on one instance, only the best can be corrected
    ground_truths, first = np.unique(target[order], return_index=True)
    best = np.zeros(len(false), dtype=bool)
    best[order[first[ground_truths >= 0]]] = True

    nothing, names = pairs.ignored[0, 0], len(dataset.names)
    before = _ap50(pairs, labels, right, nothing, np.ones_like(missed), n, names)
    errors = {}
    for k, name in enumerate(ERROR_TYPES):
        new_labels, is_true_positive, removed = labels.copy(), right.copy(), nothing.copy()
        corrected = best & (error_type == k)
        is_true_positive[false[corrected]] = True
        new_labels[false[corrected]] = classes[target[corrected]]
        removed[false[(error_type == k) & ~best]] = True
        counted = ~missed if k == MISSED else np.ones_like(missed)
        after = _ap50(pairs, new_labels, is_true_positive, removed, counted, n, names)
        errors[name] = {
            "count": int(missed.sum() if k == MISSED else (error_type == k).sum()),
            "dAP": max(0.0, after - before),
        }
    return {"AP50": before, "types": errors}


def _find_max_iou(det: np.ndarray, gt: np.ndarray, iou: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each detection's instance of maximal IoU, the first of equal ones, else -1, and that IoU, else 0."""
    rising = np.lexsort((-np.arange(len(iou)), iou))
    max_iou_gt, overlap = np.full(count, -1), np.zeros(count)
    max_iou_gt[det[rising]], overlap[det[rising]] = gt[rising], iou[rising]  # the last one stays
    return max_iou_gt, overlap


def _ap50(
    pairs: MatchResult,
    labels: np.ndarray,
    right: np.ndarray,
    removed: np.ndarray,
    counted: np.ndarray,
    images: int,
    classes: int,
) -> float:
    """Return the mean AP50 of detections with these labels, some right and some removed, for the counted instances."""
    group = labels * images + pairs.detections.group % images
    left = np.flatnonzero(~removed)
    left = left[np.lexsort((-pairs.detections.scores[left], group[left]))]
    detections = coco_matching.RankedDetections(
        group[left],
        coco_matching.rank_in_group(group[left]),
        pairs.detections.area[left],
        pairs.detections.scores[left],
    )
    ground_truths = coco_matching.GroundTruths(
        pairs.ground_truths.group[counted], pairs.ground_truths.area[counted], pairs.ground_truths.crowd[counted]
    )
    matched = right[None, None, left]
    return nan_mean(
        coco_matching.accumulate_curves(
            detections, ground_truths, matched, np.zeros_like(matched), coco_matching.AREAS[:1], images, classes
        ).precision
    )
