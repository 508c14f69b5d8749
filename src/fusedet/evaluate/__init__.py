"""How good the detections are: COCO and VOC average precision, precision-recall curves, confusion, the worst pictures."""

from fusedet.evaluate.coco_metrics import coco, precision_recall
from fusedet.evaluate.ground_truth import coco_ground_truth
from fusedet.evaluate.mistakes import confusion, worst_images
from fusedet.evaluate.results import EVALUATORS, load_results, stamp
from fusedet.evaluate.voc_metrics import voc

__all__ = ["EVALUATORS", "coco", "coco_ground_truth", "confusion", "load_results", "precision_recall", "stamp", "voc", "worst_images"]
