"""How good the detections are: COCO and VOC average precision, its curves, confusion, kinds of errors, intervals of all these."""

from fusedet.evaluation.bootstrap import paired_bootstrap
from fusedet.evaluation.coco_metrics import coco, precision_recall
from fusedet.evaluation.confidence_intervals import difference_over_seeds, over_seeds
from fusedet.evaluation.confusion import confusion, differing_images, worst_images
from fusedet.evaluation.error_analysis import error_kinds
from fusedet.evaluation.ground_truth import coco_ground_truth
from fusedet.evaluation.results import EVALUATORS, found, load_results, stamp
from fusedet.evaluation.voc_metrics import voc

__all__ = [
    "EVALUATORS",
    "coco",
    "coco_ground_truth",
    "confusion",
    "difference_over_seeds",
    "differing_images",
    "error_kinds",
    "found",
    "load_results",
    "over_seeds",
    "paired_bootstrap",
    "precision_recall",
    "stamp",
    "voc",
    "worst_images",
]
