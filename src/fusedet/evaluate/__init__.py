"""How good the detections are: COCO and VOC average precision, its curves, confusion, kinds of errors, intervals of all these."""

from fusedet.evaluate.bootstrap import paired_bootstrap
from fusedet.evaluate.coco_metrics import coco, precision_recall
from fusedet.evaluate.error_kinds import error_kinds
from fusedet.evaluate.ground_truth import coco_ground_truth
from fusedet.evaluate.intervals import difference_over_seeds, over_seeds
from fusedet.evaluate.mistakes import confusion, differing_images, worst_images
from fusedet.evaluate.results import EVALUATORS, found, load_results, stamp
from fusedet.evaluate.voc_metrics import voc

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
