"""Evaluation: COCO and VOC metrics, confusion matrix, error breakdown and confidence intervals."""

from fusedet.evaluation.bootstrap import paired_bootstrap
from fusedet.evaluation.coco_metrics import COCO_METRICS, compute_precision_recall, evaluate_coco
from fusedet.evaluation.confidence_intervals import compute_seed_difference, compute_seed_interval
from fusedet.evaluation.confusion import compute_confusion_matrix, find_differing_images, find_worst_images
from fusedet.evaluation.error_analysis import analyze_errors
from fusedet.evaluation.ground_truth import build_coco_ground_truth
from fusedet.evaluation.mask_iou import add_mask_boxes
from fusedet.evaluation.results import (
    EVALUATORS,
    build_detection_table,
    create_stamp,
    extend_max_dets,
    load_results,
    to_dataset_ids,
)
from fusedet.evaluation.voc_metrics import evaluate_voc

__all__ = [
    "COCO_METRICS",
    "EVALUATORS",
    "add_mask_boxes",
    "analyze_errors",
    "build_coco_ground_truth",
    "build_detection_table",
    "compute_confusion_matrix",
    "compute_precision_recall",
    "compute_seed_difference",
    "compute_seed_interval",
    "create_stamp",
    "evaluate_coco",
    "evaluate_voc",
    "extend_max_dets",
    "find_differing_images",
    "find_worst_images",
    "load_results",
    "paired_bootstrap",
    "to_dataset_ids",
]
