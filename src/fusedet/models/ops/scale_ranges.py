"""Valid ranges of object sizes for the branches of TridentNet.

References:
    "Scale-Aware Trident Networks for Object Detection", Li et al., 2019, section 3.3, eq. 1.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou

from fusedet.errors import InputError
from fusedet.models.ops.assigners import IGNORED
from fusedet.types import BatchDetections, Candidates, Target

ScaleRange = tuple[float, float | None]
"""Least and largest sqrt(width * height) in pixels of the network's input, both included; None for no limit."""

INVALID_IOU = 0.3  # of the authors' configs; the paper does not name it


def check_ranges(ranges: Sequence[ScaleRange], branches: int) -> None:
    """Check the valid ranges of the branches.

    Raises:
        InputError: There is not one per branch, or one is empty.
    """
    if len(ranges) != branches:
        raise InputError(
            f"model.roi.valid_ranges has {len(ranges)} ranges for {branches} branches of the backbone: one per branch "
            "of model.backbone.trident_dilations is needed, with model.backbone.trident_stages"
        )
    for low, high in ranges:
        if not 0 <= low < (math.inf if high is None else high):
            raise InputError(f"model.roi.valid_ranges: [{low}, {high}] must be a least and a larger size in pixels")


def is_in_range(boxes: Tensor, limits: ScaleRange) -> Tensor:
    """Compute which boxes (..., 4) have a size within the limits: (...) bool."""
    sides = boxes[..., 2:] - boxes[..., :2]
    size = sides.clamp(min=0).prod(dim=-1).sqrt()
    low, high = limits
    return (size >= low) & (size <= (math.inf if high is None else high))


def keep_in_range(target: Target, limits: ScaleRange) -> Target:
    """Return the ground truth with the instances whose size is within the limits."""
    kept = is_in_range(target.boxes, limits)
    masks = None if target.masks is None else target.masks[kept]
    return replace(target, boxes=target.boxes[kept], labels=target.labels[kept], masks=masks)


def merge_branches(
    detections: BatchDetections, branches: int, num_classes: int, ranges: Sequence[ScaleRange] = ()
) -> Candidates:
    """Put the detections of all branches of an image together, those within each branch's range.

    Args:
        detections: Of (branches * N) images, all images of the first branch first.
        branches: B.
        num_classes: K.
        ranges: Valid range of every branch; empty for no limits.

    Returns:
        Boxes (N, B * D, 4) and scores (N, B * D, K), 0 for other classes than the detection's.
    """
    scores = detections.scores
    if ranges:
        kept = [is_in_range(own, limits) for own, limits in zip(detections.boxes.chunk(branches), ranges, strict=True)]
        scores = scores * torch.cat(kept)
    one_hot = scores[..., None] * F.one_hot(detections.labels, num_classes)
    boxes, rows = (x.unflatten(0, (branches, -1)).transpose(0, 1).flatten(1, 2) for x in (detections.boxes, one_hot))
    return Candidates(boxes, rows)


def ignore_outside_ranges(
    assigned: Tensor, anchors: Tensor, targets: Sequence[Target], ranges: Sequence[ScaleRange]
) -> Tensor:
    """Ignore the anchors of instances outside the image's range, and those that overlap one with an IoU above 0.3.

    Args:
        assigned: Index of the instance, or background or ignored.
        anchors: xyxy in pixels.
        targets: Of each image.
        ranges: Least and largest size of each image, in pixels.

    Shape:
        assigned (N, P) int64, anchors (P, 4); result (N, P).
    """
    rows = []
    for row, target, limits in zip(assigned, targets, ranges, strict=True):
        is_outside = ~is_in_range(target.boxes, limits)
        if len(target):
            overlaps = (box_iou(target.boxes.to(anchors.dtype), anchors) * is_outside[:, None]).amax(dim=0)
            is_theirs = (row >= 0) & is_outside[row.clamp(min=0)]  # a low-quality match may have less
            row = torch.where((overlaps > INVALID_IOU) | is_theirs, IGNORED, row)
        rows.append(row)
    return torch.stack(rows)
