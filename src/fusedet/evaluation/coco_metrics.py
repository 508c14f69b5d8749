"""COCO metrics of results, by this package's evaluator or by a reference package."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from fusedet.data.dataset import DetectionDataset
from fusedet.errors import InputError, make_unknown_error
from fusedet.evaluation import coco_matching
from fusedet.evaluation.dataset_matching import match_detections
from fusedet.evaluation.ground_truth import count_per_class
from fusedet.evaluation.mask_iou import validate_masks
from fusedet.evaluation.results import (
    EVALUATORS,
    MAX_DETS,
    DetectionTable,
    Result,
    build_detection_table,
    extend_max_dets,
    nan_mean,
)
from fusedet.evaluation.third_party import evaluate_with_package

COCO_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def evaluate_coco(
    dataset: DetectionDataset,
    results: Sequence[Result],
    *,
    iou_type: Literal["bbox", "segm"] = "bbox",
    per_class: bool = True,
    evaluator: str = "fusedet",
    size_bins: Sequence[float] = (),
    max_det: int = MAX_DETS[-1],
) -> dict[str, Any]:
    """Compute the twelve COCO metrics: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl, in 0..1.

    A metric is NaN if the dataset has no instance of that size (pycocotools prints -1). Images without results count as
    empty.

    Args:
        dataset: The ground truth.
        results: The detections in COCO's results format. For "segm" each has an RLE, whose area is the size of the
            detection; its bbox is not read.
        iou_type: "bbox" or "segm".
        per_class: Whether to add classes, a list of {name, AP, AP50, images, objects} in label order; images and
            objects count what is not ignored.
        evaluator: One of EVALUATORS.
        size_bins: B + 1 increasing edges in pixels. They add size_bins, a list of B bins {from, to, AP, AR, objects} of
            the instances whose square root of the area lies between two edges, both included, as COCO's areaRng does.
        max_det: Detections per image and class. With N above COCO's 100, the metrics of N detections are added:
            AP@N, AP50@N, AP75@N, APs@N, APm@N, APl@N, AR@N, ARs@N, ARm@N, ARl@N, and AP@N and AP50@N of each class.
            The twelve metrics stay those of 100 detections.

    Raises:
        InputError: A result has an unknown image or category id or a bad number, the dataset has no masks for "segm",
            or the evaluator is not installed.

    References:
        pycocotools, COCOeval.
    """
    if iou_type not in ("bbox", "segm"):
        raise make_unknown_error("iou_type", iou_type, ["bbox", "segm"])
    if evaluator not in EVALUATORS:
        raise make_unknown_error("evaluator", evaluator, EVALUATORS)
    table = build_detection_table(dataset, results, boxes=iou_type == "bbox")
    if iou_type == "segm":
        validate_masks(dataset, results)
    areas, limits = coco_matching.extend_areas(size_bins), extend_max_dets(max_det)
    if evaluator == "fusedet":
        masks = results if iou_type == "segm" else None
        curves = _evaluate(dataset, table, masks, coco_matching.THRESHOLDS, areas, limits[2:])
    else:
        curves = evaluate_with_package(evaluator, dataset, results, iou_type, areas, limits)
    metrics: dict[str, Any] = _summarize(curves[0])
    metrics |= {"AR1": nan_mean(curves[0].recall_1), "AR10": nan_mean(curves[0].recall_10)}
    metrics = {name: metrics[name] for name in COCO_METRICS}
    for limit, more in zip(limits[3:], curves[1:], strict=True):
        names = {name: f"{name}@{limit}".replace("100@", "@") for name in COCO_METRICS}  # AR100 becomes AR@N
        metrics |= {names[name]: value for name, value in _summarize(more).items()}
    if size_bins:
        counts = ~coco_matching.is_outside(dataset.area.numpy(), areas) & ~dataset.eval_ignore.numpy()
        metrics["size_bins"] = [
            {
                "from": float(low),
                "to": float(high),
                "AP": nan_mean(curves[0].precision[..., a]),
                "AR": nan_mean(curves[0].recall[..., a]),
                "objects": int(counts[a].sum()),
            }
            for a, (low, high) in enumerate(pairwise(size_bins), len(coco_matching.AREAS))
        ]
    if per_class:
        images, instances = count_per_class(dataset)
        metrics["classes"] = [
            {
                "name": name,
                **{
                    f"{metric}{suffix}": nan_mean(own.precision[:last, :, k, 0])
                    for suffix, own in zip(["", *(f"@{limit}" for limit in limits[3:])], curves, strict=True)
                    for metric, last in (("AP", None), ("AP50", 1))
                },
                "images": int(images[k]),
                "objects": int(instances[k]),
            }
            for k, name in enumerate(dataset.names)
        ]
    return metrics


def _summarize(curves: coco_matching.PrecisionRecallCurves) -> dict[str, Any]:
    """Average the curves of one limit of detections to the metrics that have that limit."""
    precision, recall = curves.precision, curves.recall
    return {
        "AP": nan_mean(precision[..., 0]),
        "AP50": nan_mean(precision[0, ..., 0]),
        "AP75": nan_mean(precision[5, ..., 0]),
        **{f"AP{size}": nan_mean(precision[..., a]) for a, size in enumerate("sml", 1)},
        "AR100": nan_mean(recall[..., 0]),
        **{f"AR{size}": nan_mean(recall[..., a]) for a, size in enumerate("sml", 1)},
    }


def compute_precision_recall(
    dataset: DetectionDataset, results: Sequence[Result] | DetectionTable, iou: float = 0.5
) -> dict[str, Any]:
    """Compute COCO's precision-recall curves at one IoU threshold, for instances of all sizes.

    At `iou=0.5`, AP equals AP50 of `evaluate_coco`.

    Returns:
        recall (101,), the levels 0, 0.01 .. 1; mean (101,), the mean precision over the classes with instances; AP, its
        mean; classes, a list of {name, recall (101,), precision (101,), scores (101,), AP} in label order. Precision is
        interpolated, and 0 beyond the final recall. scores are the lowest that reach each recall, 0 beyond. All are NaN
        for a class without instances.

    Raises:
        InputError: `iou` is not in (0, 1].
    """
    if not 0 < iou <= 1:
        raise InputError(f"iou must lie in 0..1, it is {iou}")
    table = build_detection_table(dataset, results)
    curves = _evaluate(dataset, table, None, np.array([iou]), coco_matching.AREAS[:1], MAX_DETS[-1:])[0]
    precision, scores = curves.precision[0, :, :, 0], curves.scores[0, :, :, 0]
    middle = np.array([nan_mean(level) for level in precision])
    return {
        "recall": coco_matching.RECALLS,
        "mean": middle,
        "AP": nan_mean(middle),
        "classes": [
            {
                "name": name,
                "recall": coco_matching.RECALLS,
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
    limits: Sequence[int],
) -> list[coco_matching.PrecisionRecallCurves]:
    """Evaluate boxes, or masks if results with masks are given, with each limit of detections, ascending."""
    pairs = match_detections(dataset, table, masks, thresholds, areas, limits[-1])
    all_curves = []
    for limit in limits:
        # A match depends on the better detections only. A slice of all of them copies nothing.
        keep = slice(None) if limit == limits[-1] else pairs.detections.rank < limit
        detections = coco_matching.RankedDetections(*(column[keep] for column in vars(pairs.detections).values()))
        matched, ignored = pairs.matched[..., keep], pairs.ignored[..., keep]
        all_curves.append(
            coco_matching.accumulate_curves(
                detections, pairs.ground_truths, matched, ignored, areas, len(dataset), len(dataset.names)
            )
        )
    return all_curves
