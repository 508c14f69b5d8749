"""Average precision by the rules of the PASCAL VOC challenge."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from fusedet.data.dataset import DetectionDataset
from fusedet.errors import InputError
from fusedet.evaluation import coco_matching
from fusedet.evaluation.ground_truth import count_per_class, xyxy_to_xywh
from fusedet.evaluation.results import Result, build_detection_table, nan_mean


def evaluate_voc(
    dataset: DetectionDataset, results: Sequence[Result], *, iou: float = 0.5, points: Literal["area", 11] = "area"
) -> dict[str, Any]:
    """Compute VOC's average precision per class and its mean, in 0..1.

    In descending score over the whole dataset, each detection belongs to the instance of its class and image with
    maximal IoU. If that is at least `iou`, the first detection of an instance is a true positive, and later ones are
    false positives. Detections that belong to a difficult instance are ignored. AP is the area under the monotone
    precision (VOC 2010 and later), or with `points=11` the mean precision at the recalls 0, 0.1 .. 1 (VOC 2007). A
    class without instances that count has NaN and is left out of mAP.

    Boxes are continuous, x2 - x1 wide. The devkit counts inclusive pixels (+ 1) with corners from 1. The reader turns
    VOC's (xmin, ymin, xmax, ymax) into (xmin - 1, ymin - 1, xmax, ymax), so that both give the same metrics.

    Args:
        dataset: The dataset.
        results: In COCO's result format, with image and category ids of the dataset.
        iou: Least IoU of a true positive, in (0, 1].
        points: "area" or 11, see above.

    Returns:
        {mAP, classes: [{name, AP, images, objects}]}.

    Raises:
        InputError: An option is out of range, or the results do not fit the dataset, as in `evaluate_coco`.

    References:
        VOCdevkit, VOCevaldet.m.
    """
    if points not in ("area", 11):
        raise InputError(f"points must be 'area' or 11, it is {points!r}")
    if not 0 < iou <= 1:
        raise InputError(f"iou must lie in 0..1, it is {iou}")
    table = build_detection_table(dataset, results)
    n, classes = len(dataset), len(dataset.names)
    group = dataset.labels.numpy() * n + dataset.image_indices
    order = np.argsort(group, kind="stable")
    difficult = dataset.eval_ignore.numpy()[order]
    boxes = xyxy_to_xywh(dataset.boxes.numpy()[order])
    ground_truths = coco_matching.GroundTruths(
        group[order], dataset.area.numpy()[order], np.zeros(len(order), dtype=bool)
    )

    best = np.lexsort((-table.scores, table.labels))  # by class, best score first over all images
    pairs = coco_matching.find_box_pairs(
        table.labels[best] * n + table.images[best], table.boxes[best], ground_truths, boxes, iou
    )
    choice = np.full(len(best), -1)  # the object that each detection belongs to
    rising = np.lexsort((-pairs.gt, pairs.iou, pairs.det))  # the last one stays: the most overlap, of equals the first
    choice[pairs.det[rising]] = pairs.gt[rising]

    is_true_positive = np.zeros(len(best), dtype=bool)
    claimed, first = np.unique(choice, return_index=True)
    is_true_positive[first[claimed >= 0]] = True
    is_ignored = np.zeros(len(best), dtype=bool)
    is_ignored[choice >= 0] = difficult[choice[choice >= 0]]

    images, totals = count_per_class(dataset)
    edges = np.searchsorted(table.labels[best], np.arange(classes + 1))
    aps, rows = [], []
    for k, name in enumerate(dataset.names):
        own = np.arange(edges[k], edges[k + 1])
        hits = is_true_positive[own[~is_ignored[own]]]
        ap = average_precision(hits, int(totals[k]), points)
        aps.append(ap)
        rows.append({"name": name, "AP": ap, "images": int(images[k]), "objects": int(totals[k])})
    return {"mAP": nan_mean(np.array(aps)), "classes": rows}


def average_precision(hits: np.ndarray, total: int, points: Literal["area", 11]) -> float:
    """Compute the AP of hits (D,) bool in descending score, for a class with `total` instances; NaN for none."""
    if not total:
        return float("nan")
    right = np.cumsum(hits)
    precision = right / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    if points == 11:
        # the first detection with recall >= n / 10, in whole numbers
        place = np.searchsorted(right * 10, np.arange(11) * total)
        return float(precision[place[place < len(hits)]].sum() / 11)
    return float(precision[hits].sum() / total)
