"""Detections of an image's resized and flipped copies (test-time augmentation) and of its tiles, merged by NMS."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedet.models.ops.boxes import nms_keep_mask
from fusedet.models.protocols import InferenceDetector
from fusedet.types import Batch


class ImageDetections(NamedTuple):
    """Detections of one image in the pixels of its file, highest score first.

    Shape:
        boxes (D, 4); scores (D,); labels (D,); masks (D, m, m), probabilities inside the boxes, or None; cut_by (D,)
        int64, the number of the tile at whose border a box ends, -1 for whole objects, or None without tiles.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None
    cut_by: Tensor | None = None


def detect_augmented(detector: InferenceDetector, batch: Batch) -> list[ImageDetections]:
    """Detect instances in one augmented copy of every image, and undo its resizing, flipping and cutting."""
    padded = detector.detect(batch.images, batch.sizes, padded=False)
    results = []
    for i, n in enumerate(padded.counts.tolist()):
        boxes, masks = padded.boxes[i, :n], None if padded.masks is None else padded.masks[i, :n]
        if batch.flipped:
            x1, y1, x2, y2 = boxes.unbind(dim=1)
            width = batch.sizes[i, 1]
            boxes = torch.stack([width - x2, y1, width - x1, y2], dim=1)
            masks = None if masks is None else masks.flip(-1)
        boxes = boxes / batch.scales[i].repeat(2)
        if batch.windows is not None:
            boxes = boxes + batch.windows[i, :2].repeat(2)
        results.append(ImageDetections(boxes, padded.scores[i, :n], padded.labels[i, :n], masks))
    return results


def merge_detections(copies: Sequence[ImageDetections], iou: float = 0.5, max_det: int | None = 100) -> ImageDetections:
    """Merge the detections of an image's augmented copies and tiles by class-wise NMS.

    A detection keeps the mask of its own copy. Of equal scores, the earlier copy's comes first. This is MMDetection
    3.x's DetTTAModel, which has no masks.

    Args:
        copies: Detections of each copy of the image.
        iou: Overlap from which NMS removes the lower score.
        max_det: Detections to keep, the highest scores; None keeps all.
    """
    boxes, scores, labels = (torch.cat(column) for column in list(zip(*copies))[:3])
    masks = [copy.masks for copy in copies if copy.masks is not None]
    if not len(boxes):
        return copies[0]
    positive = boxes - boxes.amin().clamp(max=0)  # Grid R-CNN's boxes may reach outside the image
    shifted = positive + (labels * (positive.amax() + 1))[:, None]  # so that boxes of two classes never overlap
    kept = nms_keep_mask(shifted[None], scores[None], iou)[0].nonzero().squeeze(1)
    best = kept[scores[kept].argsort(descending=True, stable=True)[:max_det]]
    cut_by = [copy.cut_by for copy in copies if copy.cut_by is not None]
    return ImageDetections(
        boxes[best],
        scores[best],
        labels[best],
        torch.cat(masks)[best] if masks else None,
        torch.cat(cut_by)[best] if cut_by else None,
    )
