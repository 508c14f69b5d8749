"""Objects cut by the borders of overlapping tiles: their parts become one detection."""

import torch
from torch import Tensor

from fusedet.models.detectors.tta import ImageDetections
from fusedet.models.roi.mask import stretch_masks

_MARGIN = 0.05  # of the box's side; boxes of cut objects end near the border, not at it


def find_cut(boxes: Tensor, low: Tensor, high: Tensor, size: Tensor) -> Tensor:
    """Find the boxes that end at a border of their window inside the image.

    Args:
        boxes: (D, 4) in pixels of the image.
        low: (2,) left and top of the window.
        high: (2,) right and bottom of the window.
        size: (2,) width and height of the image.

    Returns:
        (D,) bool.
    """
    margin = 1 + _MARGIN * (boxes[:, 2:] - boxes[:, :2])
    at_low = (boxes[:, :2] - low <= margin) & (low > 0)
    at_high = (high - boxes[:, 2:] <= margin) & (high < size)
    return (at_low | at_high).any(dim=1)


def join_cut_objects(detections: ImageDetections, ios: float) -> ImageDetections:
    """Join the parts of objects that tiles cut, by the intersection over the smaller box (IoS).

    - A part joins the whole detection of its class, at least as large, with which its IoS is largest. The whole box and
      its mask stay.
    - The other parts are taken by descending score. Each is joined with the parts of its class in other tiles; the
      result is the box around all of them, and joins further parts. Its mask is the maximum of theirs, resampled.

    The joined detection has the highest score of its parts.

    Args:
        detections: After NMS; `cut_by` says which tile cuts each box.
        ios: The least IoS of what is joined, above 0 and at most 1.

    Returns:
        The detections, highest score first; of equal scores in their order.
    """
    assert detections.cut_by is not None, "detections of tiles"
    boxes, scores, labels, tile = (x.cpu() for x in (*detections[:3], detections.cut_by))
    masks = None if detections.masks is None else detections.masks.cpu()
    boxes, scores = boxes.clone(), scores.clone()
    masks = None if masks is None else masks.clone()
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    is_cut, is_left = tile >= 0, torch.ones(len(boxes), dtype=torch.bool)
    for i in is_cut.nonzero()[:, 0].tolist():
        share = _compute_ios(boxes[i], boxes)
        share[is_cut | (labels != labels[i]) | (areas < areas[i])] = 0
        best = int(share.argmax())
        if share[best] >= ios:
            is_left[i] = False
            scores[best] = torch.maximum(scores[best], scores[i])
    for i in scores.argsort(descending=True, stable=True).tolist():
        if not (is_cut[i] and is_left[i]):
            continue
        is_left[i] = False  # so that it does not join itself
        while len(rows := _find_parts(boxes, labels, tile, is_cut & is_left, i, ios)):
            is_left[rows] = False
            parts = [i, *rows.tolist()]
            around = torch.cat([boxes[parts, :2].amin(dim=0), boxes[parts, 2:].amax(dim=0)])
            if masks is not None:
                masks[i] = stretch_masks(masks[parts], boxes[parts], around).amax(dim=0)
            boxes[i] = around
        is_left[i], is_cut[i] = True, False
    order = scores.argsort(descending=True, stable=True)
    order = order[is_left[order]]
    return ImageDetections(boxes[order], scores[order], labels[order], None if masks is None else masks[order])


def _find_parts(boxes: Tensor, labels: Tensor, tile: Tensor, is_open: Tensor, i: int, ios: float) -> Tensor:
    """Return the rows of the open parts that join part i."""
    fits = is_open & (labels == labels[i]) & (tile != tile[i]) & (_compute_ios(boxes[i], boxes) >= ios)
    return fits.nonzero()[:, 0]


def _compute_ios(box: Tensor, boxes: Tensor) -> Tensor:
    """Return the intersections of a box (4,) with boxes (D, 4) over the smaller of both, (D,)."""
    sides = (torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2])).clamp(min=0)
    smaller = torch.minimum((box[2:] - box[:2]).prod(), (boxes[:, 2:] - boxes[:, :2]).prod(dim=1))
    return sides.prod(dim=1) / smaller.clamp(min=1e-9)
