"""DetectionDataset and results matched by COCO's rule, once, for all that is computed from it: figures, intervals, kinds of errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusedet.data.dataset import DetectionDataset
from fusedet.evaluation import coco_matching as rule
from fusedet.evaluation.ground_truth import image_indices, xyxy_to_xywh
from fusedet.evaluation.mask_iou import compute_mask_area, encode_rle, find_mask_pairs
from fusedet.evaluation.results import MAX_DETS, DetectionTable, Result


@dataclass(frozen=True)
class MatchResult:
    """Detections and objects in `coco_rule`'s order and what became of them.

    Groups are class x len(dataset) + place, an image's place being its rank by rising id. results (D,) and annotations
    (G,) say which result and which of the dataset' objects each one is; hit and void (T, A, D), taken (T, A, G) bool.
    """

    guesses: rule.Guesses
    objects: rule.Objects
    results: np.ndarray
    annotations: np.ndarray
    hit: np.ndarray
    void: np.ndarray
    taken: np.ndarray


def rank_by_image_id(dataset: DetectionDataset) -> np.ndarray:
    """Each image's rank by rising id, (N,): COCO goes through the images in that order."""
    place = np.empty(len(dataset), dtype=np.int64)
    place[np.argsort(dataset.image_ids.numpy(), kind="stable")] = np.arange(len(dataset))
    return place


def match_detections(
    dataset: DetectionDataset,
    table: DetectionTable,
    masks: Sequence[Result] | None,
    thresholds: np.ndarray,
    areas: np.ndarray,
) -> MatchResult:
    """Match boxes, or the results' masks where these are given, at thresholds (T,) of overlap in ranges (A, 2) of area."""
    n, owner, place = len(dataset), image_indices(dataset), rank_by_image_id(dataset)
    group = dataset.labels.numpy() * n + place[owner]
    order = np.argsort(group, kind="stable")
    objects = rule.Objects(group[order], dataset.area.numpy()[order], dataset.eval_ignore.numpy()[order])

    group = table.labels * n + place[table.images]
    best = np.lexsort((-table.scores, group))
    best = best[rule.rank(group[best]) < MAX_DETS[-1]]
    group = group[best]
    if masks is None:
        boxes = table.boxes[best]
        area = boxes[:, 2] * boxes[:, 3]
        pairs = rule.find_box_pairs(
            group, boxes, objects, xyxy_to_xywh(dataset.boxes.numpy()[order]), min(thresholds.min(), rule.MAX_THRESHOLD)
        )
    else:
        answers = [masks[i]["segmentation"] for i in best]
        area = np.array([compute_mask_area(answer) for answer in answers])
        segments, sizes = [s for record in dataset for s in record.segmentations], dataset.sizes.tolist()
        truth = [encode_rle(segments[j], *sizes[owner[j]]) for j in order]
        pairs = find_mask_pairs(group, [encode_rle(answer, *answer["size"]) for answer in answers], objects, truth)
    guesses = rule.Guesses(group, rule.rank(group), area, table.scores[best])
    return MatchResult(guesses, objects, best, order, *rule.match(guesses, objects, pairs, thresholds, areas))
