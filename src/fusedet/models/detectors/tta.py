"""Testing in several views: what a detector finds in each, moved back into the image's own pixels, becomes one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedet.models.ops.boxes import survivors
from fusedet.types import Batch


class ImageDetections(NamedTuple):
    """What was found in one image, best first: boxes (D, 4) in the image's own pixels, scores (D,), labels (D,), and masks
    (D, m, m), probabilities inside the boxes, or None."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None


def detect_view(detector: Any, batch: Batch) -> list[ImageDetections]:
    """What a detector finds in each image of a batch by its own selection; what was mirrored is turned back."""
    found = detector.detect(batch.images, batch.sizes, padded=False)
    masks = getattr(found, "masks", None)
    seen = []
    for i, n in enumerate(found.counts.tolist()):
        boxes, own = found.boxes[i, :n], None if masks is None else masks[i, :n]
        if batch.flipped:
            x1, y1, x2, y2 = boxes.unbind(dim=1)
            width = batch.sizes[i, 1]
            boxes, own = torch.stack([width - x2, y1, width - x1, y2], dim=1), None if own is None else own.flip(-1)
        seen.append(ImageDetections(boxes / batch.scales[i].repeat(2), found.scores[i, :n], found.labels[i, :n], own))
    return seen


def merge_detections(views: Sequence[ImageDetections], iou: float = 0.5, max_det: int = 100) -> ImageDetections:
    """What all views of an image show: class-wise suppression above `iou` over all of them, then the `max_det` best.

    A mask is that of the view in which its box was found; of equal scores the earlier view's comes first. As MMDetection 3.x's
    DetTTAModel, which has no masks.
    """
    boxes, scores, labels = (torch.cat(column) for column in list(zip(*views))[:3])
    masks = [view.masks for view in views if view.masks is not None]
    if not len(boxes):
        return views[0]
    inside = boxes - boxes.amin().clamp(max=0)  # Grid R-CNN's boxes may reach beyond the image
    apart = inside + (labels * (inside.amax() + 1))[:, None]  # classes are moved apart by more than any box is wide
    alive = survivors(apart[None], scores[None], iou)[0].nonzero().squeeze(1)
    best = alive[scores[alive].argsort(descending=True, stable=True)[:max_det]]
    return ImageDetections(boxes[best], scores[best], labels[best], torch.cat(masks)[best] if masks else None)
