"""COCO's figures by the packages that others use: faster-coco-eval and pycocotools."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from fusedet.data.dataset import DetectionDataset
from fusedet.errors import InputError
from fusedet.evaluation import coco_matching as rule
from fusedet.evaluation.ground_truth import build_coco_ground_truth
from fusedet.evaluation.mask_iou import compute_mask_area
from fusedet.evaluation.results import Result


def evaluate_with_package(
    evaluator: str, dataset: DetectionDataset, results: Sequence[Result], iou_type: str
) -> rule.Curves:
    """The figures' curves by "faster-coco-eval" or "pycocotools", which share their interface.

    Raises InputError where the package is not installed.
    """
    coco, judge = _load(evaluator)
    kept = "bbox" if iou_type == "bbox" else "segmentation"
    answers = [
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
    truth, guess = coco(), coco()
    truth.dataset = build_coco_ground_truth(dataset, masks=iou_type == "segm")
    guess.dataset = {
        "images": truth.dataset["images"],
        "categories": truth.dataset["categories"],
        "annotations": answers,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        guess.createIndex()
        run = judge(truth, guess, iou_type)
        run.evaluate()
        run.accumulate()
    back = np.argsort(np.argsort(dataset.category_ids))  # the packages sort the classes by id
    precision, scores, recall = (
        np.where(run.eval[key] < 0, np.nan, run.eval[key]) for key in ("precision", "scores", "recall")
    )
    precision, scores, recall = precision[..., -1][:, :, back], scores[..., -1][:, :, back], recall[:, back]
    return rule.Curves(precision, scores, recall[..., -1], recall[:, :, 0, 0], recall[:, :, 0, 1])


def _load(evaluator: str) -> tuple[Any, Any]:
    """The package's classes of a dataset and of its evaluation."""
    try:
        if evaluator == "pycocotools":
            return importlib.import_module("pycocotools.coco").COCO, importlib.import_module(
                "pycocotools.cocoeval"
            ).COCOeval
        package = importlib.import_module("faster_coco_eval")
        return package.COCO, package.COCOeval_faster
    except ImportError as error:
        raise InputError(f"evaluator '{evaluator}' is not installed: pip install {evaluator}") from error
