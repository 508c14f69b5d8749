"""Matching of detections with the instances of their image, of any class."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusedet.data.dataset import DetectionDataset
from fusedet.errors import InputError
from fusedet.evaluation import coco_matching
from fusedet.evaluation.results import DetectionTable, Result, build_detection_table

FALSE_POSITIVE, IGNORED = -1, -2
"""What a detection that matches no instance has in the place of an annotation's index."""


@dataclass(frozen=True)
class ImageMatches:
    """D detections and what they match, by image and then best score first.

    A match depends on detections of higher score only. So a threshold on the score changes none of the others.

    Attributes:
        images: (D,), indices in the dataset.
        labels: (D,), predicted classes.
        scores: (D,).
        boxes: (D, 4) xyxy in pixels.
        matches: (D,), index of the annotation in the dataset, FALSE_POSITIVE (-1) or IGNORED (-2).
        same_class_iou: (D,), the highest IoU with a counted instance of the predicted class, 0 without one.
        same_class_annotation: (D,), the index of that annotation, -1 without one.
        counted: (M,) bool, the annotations that are not ignored in evaluation.
        gt_labels: (M,), classes of the annotations.
    """

    images: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    matches: np.ndarray
    same_class_iou: np.ndarray
    same_class_annotation: np.ndarray
    counted: np.ndarray
    gt_labels: np.ndarray

    @property
    def is_true_positive(self) -> np.ndarray:
        """Whether each detection (D,) matches an instance of its class."""
        return np.asarray(self.labels == np.append(self.gt_labels, -1)[self.matches.clip(min=-1)])


def match_images(
    dataset: DetectionDataset, results: Sequence[Result] | DetectionTable, *, iou: float = 0.5, score: float = -np.inf
) -> ImageMatches:
    """Match the detections of at least `score` with the instances of their image, of any class, best score first.

    A detection takes the free instance of maximal IoU, if that is at least `iou`; of equal IoUs one of its own class.
    An unmatched detection is ignored if at least `iou` of its area lies in an ignored instance of its class.

    Args:
        dataset: The dataset.
        results: In COCO's result format, or as arrays.
        iou: Least IoU of a match, in (0, 1].
        score: Least score of a detection that is matched.

    Raises:
        InputError: The IoU is out of range, or the results do not fit the dataset, as in `evaluate_coco`.
    """
    if not 0 < iou <= 1:
        raise InputError(f"iou must lie in 0..1, it is {iou}")
    table = build_detection_table(dataset, results)
    order = np.lexsort((-table.scores, table.images))
    order = order[table.scores[order] >= score]
    images, labels = table.images[order], table.labels[order]
    boxes = table.boxes[order]
    boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    gt_boxes, gt_labels, gt_images = dataset.boxes.numpy(), dataset.labels.numpy(), dataset.image_indices
    is_counted = ~dataset.eval_ignore.numpy()
    counted, ignored = np.flatnonzero(is_counted), np.flatnonzero(~is_counted)

    own_iou, own = np.zeros(len(order)), np.full(len(order), -1)
    near: list[tuple[np.ndarray, ...]] = [(np.zeros(0, int), np.zeros(0, int), np.zeros(0))]
    for det, gt in coco_matching.pair_within_groups(images, gt_images[counted]):
        inner, area, gt_area = _overlap(boxes[det], gt_boxes[counted[gt]])
        overlap = np.divide(inner, area + gt_area - inner, out=np.zeros_like(inner), where=inner > 0)
        same = np.flatnonzero((labels[det] == gt_labels[counted[gt]]) & (overlap > 0))
        rising = same[np.argsort(overlap[same], kind="stable")]
        own_iou[det[rising]], own[det[rising]] = overlap[rising], counted[gt[rising]]  # the last one stays
        keep = overlap >= iou
        near.append((det[keep], gt[keep], overlap[keep]))
    det, gt, overlap = (np.concatenate(column) for column in zip(*near))
    # a detection prefers the highest IoU, of equal ones its own class, of these the last instance
    preference = np.empty(len(det))
    preference[np.lexsort((gt, labels[det] == gt_labels[counted[gt]], overlap))] = np.arange(len(det))
    matches, taken = np.full(len(order), FALSE_POSITIVE), np.zeros(len(counted), dtype=bool)
    for d, g, _, first in coco_matching.iterate_rounds(images, coco_matching.OverlapPairs(det, gt, preference)):
        best = np.maximum.reduceat(np.where(taken[g], 0, np.arange(1, len(g) + 1)), first)
        has_match = best > 0
        chosen = g[best[has_match] - 1]
        taken[chosen] = True
        matches[d[first[has_match]]] = counted[chosen]

    for det, gt in coco_matching.pair_within_groups(images, gt_images[ignored]):
        inner, area, _ = _overlap(boxes[det], gt_boxes[ignored[gt]])
        inside = det[(inner >= iou * area) & (inner > 0) & (labels[det] == gt_labels[ignored[gt]])]
        matches[inside[matches[inside] == FALSE_POSITIVE]] = IGNORED
    return ImageMatches(images, labels, table.scores[order], boxes, matches, own_iou, own, is_counted, gt_labels)


def _overlap(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the intersections (P,) of pairs of boxes (P, 4) xyxy, and the areas (P,) of both."""
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    return sides.clip(min=0).prod(axis=1), (a[:, 2:] - a[:, :2]).prod(axis=1), (b[:, 2:] - b[:, :2]).prod(axis=1)
