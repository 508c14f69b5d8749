"""Matching of a dataset with results by COCO's rule, for metrics, intervals and error types."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusedet.data.dataset import DetectionDataset
from fusedet.evaluation import coco_matching
from fusedet.evaluation.ground_truth import xyxy_to_xywh
from fusedet.evaluation.mask_iou import compute_mask_area, encode_rle, find_mask_pairs
from fusedet.evaluation.results import MAX_DETS, DetectionTable, Result


@dataclass(frozen=True)
class MatchResult:
    """Detections and ground truths in the order of `coco_matching`, and their matches.

    A group is class x len(dataset) + the rank of the image by ascending id.

    Attributes:
        detections: The D detections.
        ground_truths: The G ground truths.
        results: (D,), the index of each detection in the results.
        annotations: (G,), the index of each ground truth in the dataset.
        matched: (T, A, D) bool.
        ignored: (T, A, D) bool.
        gt_matched: (T, A, G) bool.
    """

    detections: coco_matching.RankedDetections
    ground_truths: coco_matching.GroundTruths
    results: np.ndarray
    annotations: np.ndarray
    matched: np.ndarray
    ignored: np.ndarray
    gt_matched: np.ndarray


def rank_by_image_id(dataset: DetectionDataset) -> np.ndarray:
    """Return the rank (N,) of each image by ascending id, the order in which COCO visits images."""
    place = np.empty(len(dataset), dtype=np.int64)
    place[np.argsort(dataset.image_ids.numpy(), kind="stable")] = np.arange(len(dataset))
    return place


def match_detections(
    dataset: DetectionDataset,
    table: DetectionTable,
    masks: Sequence[Result] | None,
    thresholds: np.ndarray,
    areas: np.ndarray,
    max_det: int = MAX_DETS[-1],
) -> MatchResult:
    """Match the detections of a dataset with its instances, by boxes or masks.

    Args:
        dataset: The dataset.
        table: The detections.
        masks: The results behind `table`, to match masks; None to match boxes.
        thresholds: (T,) IoU thresholds.
        areas: (A, 2) least and largest area, in square pixels.
        max_det: Best detections of each image and class that are matched.
    """
    n, image_index, place = len(dataset), dataset.image_indices, rank_by_image_id(dataset)
    group = dataset.labels.numpy() * n + place[image_index]
    order = np.argsort(group, kind="stable")
    ground_truths = coco_matching.GroundTruths(
        group[order], dataset.area.numpy()[order], dataset.eval_ignore.numpy()[order]
    )

    group = table.labels * n + place[table.images]
    best = _sort_by_group(group, table.scores)
    best = best[coco_matching.rank_in_group(group[best]) < max_det]
    group = group[best]
    if masks is None:
        boxes = table.boxes[best]
        area = boxes[:, 2] * boxes[:, 3]
        pairs = coco_matching.find_box_pairs(
            group,
            boxes,
            ground_truths,
            xyxy_to_xywh(dataset.boxes.numpy()[order]),
            min(thresholds.min(), coco_matching.MAX_THRESHOLD),
        )
    else:
        rles = [masks[i]["segmentation"] for i in best]
        area = np.array([compute_mask_area(rle) for rle in rles])
        segments, sizes = [s for record in dataset for s in record.segmentations], dataset.sizes.tolist()
        gt_rles = [encode_rle(segments[j], *sizes[image_index[j]]) for j in order]
        pairs = find_mask_pairs(group, [encode_rle(rle, *rle["size"]) for rle in rles], ground_truths, gt_rles)
    detections = coco_matching.RankedDetections(group, coco_matching.rank_in_group(group), area, table.scores[best])
    return MatchResult(
        detections,
        ground_truths,
        best,
        order,
        *coco_matching.match_groups(detections, ground_truths, pairs, thresholds, areas),
    )


def _sort_by_group(group: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the stable order (D,) by group, then descending score; faster than `np.lexsort`."""
    by_score = np.argsort(-scores, kind="stable")
    count = max(len(scores), 1)
    keys = group[by_score] * count + np.arange(len(scores))
    keys.sort()  # all keys differ, so that an unstable sort, which numpy vectorizes, gives the stable order
    return by_score[keys % count]
