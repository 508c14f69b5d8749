"""COCO's figures from dataset and results, by the project's own evaluator or by one of the two reference packages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from fusedet.data.dataset import DetectionDataset
from fusedet.errors import InputError, unknown
from fusedet.evaluation import coco_matching as rule
from fusedet.evaluation.dataset_matching import match_detections
from fusedet.evaluation.ground_truth import count_per_class
from fusedet.evaluation.mask_iou import validate_masks
from fusedet.evaluation.results import EVALUATORS, DetectionTable, Result, build_detection_table, nan_mean
from fusedet.evaluation.third_party import evaluate_with_package


def evaluate_coco(
    dataset: DetectionDataset,
    results: Sequence[Result],
    *,
    iou_type: Literal["bbox", "segm"] = "bbox",
    per_class: bool = True,
    evaluator: str = "fusedet",
) -> dict[str, Any]:
    """COCO's twelve figures in 0..1: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl.

    A figure is NaN where the dataset hold no object of that size (pycocotools prints -1 there). Images without results
    count as empty. `per_class` adds classes, a list of {name, AP, AP50, images, objects} in label order; images and
    objects count what is not ignored. For "segm" each result carries an RLE, whose area decides its size (its bbox is
    not read). `evaluator` is one of EVALUATORS.

    Raises InputError for results of an unknown image or category, for bad numbers, for dataset without masks where
    "segm" is asked for, and where the evaluator is not installed. Source: pycocotools' COCOeval.
    """
    if iou_type not in ("bbox", "segm"):
        raise unknown("iou_type", iou_type, ["bbox", "segm"])
    if evaluator not in EVALUATORS:
        raise unknown("evaluator", evaluator, EVALUATORS)
    table = build_detection_table(dataset, results, boxes=iou_type == "bbox")
    if iou_type == "segm":
        validate_masks(dataset, results)
    if evaluator == "fusedet":
        curves = _evaluate(dataset, table, results if iou_type == "segm" else None, rule.THRESHOLDS, rule.AREAS)
    else:
        curves = evaluate_with_package(evaluator, dataset, results, iou_type)
    precision, recall = curves.precision, curves.recall
    figures: dict[str, Any] = {
        "AP": nan_mean(precision[..., 0]),
        "AP50": nan_mean(precision[0, ..., 0]),
        "AP75": nan_mean(precision[5, ..., 0]),
        **{f"AP{size}": nan_mean(precision[..., a]) for a, size in enumerate("sml", 1)},
        "AR1": nan_mean(curves.recall_1),
        "AR10": nan_mean(curves.recall_10),
        "AR100": nan_mean(recall[..., 0]),
        **{f"AR{size}": nan_mean(recall[..., a]) for a, size in enumerate("sml", 1)},
    }
    if per_class:
        images, objects = count_per_class(dataset)
        figures["classes"] = [
            {
                "name": name,
                "AP": nan_mean(precision[:, :, k, 0]),
                "AP50": nan_mean(precision[0, :, k, 0]),
                "images": int(images[k]),
                "objects": int(objects[k]),
            }
            for k, name in enumerate(dataset.names)
        ]
    return figures


def compute_precision_recall(dataset: DetectionDataset, results: Sequence[Result], iou: float = 0.5) -> dict[str, Any]:
    """COCO's precision-recall curves at one overlap, over objects of all sizes.

    recall (101,), the levels 0, 0.01 .. 1; mean (101,), the mean precision over the classes that have objects; AP, its
    mean; classes, a list of {name, recall (101,), precision (101,), scores (101,), AP} in label order. Precision is made
    to fall and is 0 beyond the recall reached; scores are the lowest that reach each recall, 0 beyond; all are NaN for a
    class without objects. At `iou=0.5`, AP equals `evaluate_coco`'s AP50.
    """
    if not 0 < iou <= 1:
        raise InputError(f"iou must lie in 0..1, it is {iou}")
    curves = _evaluate(dataset, build_detection_table(dataset, results), None, np.array([iou]), rule.AREAS[:1])
    precision, scores = curves.precision[0, :, :, 0], curves.scores[0, :, :, 0]
    middle = np.array([nan_mean(level) for level in precision])
    return {
        "recall": rule.RECALLS,
        "mean": middle,
        "AP": nan_mean(middle),
        "classes": [
            {
                "name": name,
                "recall": rule.RECALLS,
                "precision": precision[:, k],
                "scores": scores[:, k],
                "AP": nan_mean(precision[:, k]),
            }
            for k, name in enumerate(dataset.names)
        ],
    }


def _evaluate(
    dataset: DetectionDataset,
    table: DetectionTable,
    masks: Sequence[Result] | None,
    thresholds: np.ndarray,
    areas: np.ndarray,
) -> rule.Curves:
    """The project's own evaluator: boxes, or the results' masks where these are given."""
    pairs = match_detections(dataset, table, masks, thresholds, areas)
    return rule.accumulate(pairs.guesses, pairs.objects, pairs.hit, pairs.void, areas, len(dataset), len(dataset.names))
