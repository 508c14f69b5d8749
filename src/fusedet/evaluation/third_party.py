"""COCO metrics by faster-coco-eval or pycocotools."""

import contextlib
import importlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from fusedet.data.dataset import DetectionDataset
from fusedet.errors import InputError
from fusedet.evaluation import coco_matching
from fusedet.evaluation.ground_truth import build_coco_ground_truth
from fusedet.evaluation.mask_iou import compute_mask_area
from fusedet.evaluation.results import Result


def evaluate_with_package(
    evaluator: str,
    dataset: DetectionDataset,
    results: Sequence[Result],
    iou_type: str,
    areas: np.ndarray,
    max_dets: Sequence[int],
) -> list[coco_matching.PrecisionRecallCurves]:
    """Compute the curves with "faster-coco-eval" or "pycocotools", which share their interface.

    Args:
        evaluator: The package.
        dataset: The ground truth.
        results: The detections.
        iou_type: "bbox" or "segm".
        areas: Area ranges (A, 2), of which the first is all areas.
        max_dets: 1, 10, and the limits of detections per image and class.

    Returns:
        The curves of each limit after 1 and 10.

    Raises:
        InputError: The package is not installed.
    """
    coco, evaluator_class = _load(evaluator)
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth, predictions = _build_datasets(coco, dataset, results, iou_type)
        run = evaluator_class(ground_truth, predictions, iou_type)
        run.params.areaRng = areas.tolist()
        run.params.areaRngLbl = [str(a) for a in range(len(areas))]
        run.params.maxDets = list(max_dets)
        run.evaluate()
        run.accumulate()
    class_order = np.argsort(np.argsort(dataset.category_ids))  # the packages sort the classes by id
    precision, scores, recall = (
        np.where(run.eval[key] < 0, np.nan, run.eval[key]) for key in ("precision", "scores", "recall")
    )
    precision, scores, recall = precision[:, :, class_order], scores[:, :, class_order], recall[:, class_order]
    return [
        coco_matching.PrecisionRecallCurves(
            precision[..., m], scores[..., m], recall[..., m], recall[:, :, 0, 0], recall[:, :, 0, 1]
        )
        for m in range(2, len(max_dets))
    ]


def _build_datasets(coco: Any, dataset: DetectionDataset, results: Sequence[Result], iou_type: str) -> list[Any]:
    """Return the ground truth and the detections as the package's datasets."""
    kept = "bbox" if iou_type == "bbox" else "segmentation"
    detections = [
        {
            "id": i,
            "image_id": r["image_id"],
            "category_id": r["category_id"],
            "score": r["score"],
            "iscrowd": 0,
            "area": r["bbox"][2] * r["bbox"][3] if iou_type == "bbox" else compute_mask_area(r["segmentation"]),
            kept: r[kept],
        }
        for i, r in enumerate(results, 1)
    ]
    truth = build_coco_ground_truth(dataset, masks=iou_type == "segm")
    built = []
    for content in (truth, {key: truth[key] for key in ("images", "categories")} | {"annotations": detections}):
        built.append(coco())
        built[-1].dataset = content
        built[-1].createIndex()
    return built


def _load(evaluator: str) -> tuple[Any, Any]:
    """Return the package's dataset and evaluator classes."""
    try:
        if evaluator == "pycocotools":
            coco, cocoeval = (importlib.import_module(f"pycocotools.{name}") for name in ("coco", "cocoeval"))
            return coco.COCO, cocoeval.COCOeval
        package = importlib.import_module("faster_coco_eval")
        return package.COCO, package.COCOeval_faster
    except ImportError as error:
        raise InputError(f"evaluator '{evaluator}' is not installed: pip install {evaluator}") from error
