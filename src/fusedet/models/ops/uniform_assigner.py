"""YOLOF's label assignment.

References:
    "You Only Look One-level Feature", Chen et al., 2021, section 4.2.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from fusedet.errors import InputError
from fusedet.models.ops.assigners import BACKGROUND, IGNORED, INSTANCES_AT_ONCE, ignore_invalid
from fusedet.models.ops.boxes import aligned_iou
from fusedet.types import Target


class UniformMatches(NamedTuple):
    """The matches of one image.

    Attributes:
        assigned: (P,) index of each prior's instance, -1 background, -2 ignored.
        priors: (G, M) each instance's matches, some of them twice.
        positive: (G, M) bool, whether the prior overlaps the instance enough.
    """

    assigned: Tensor
    priors: Tensor
    positive: Tensor


@dataclass(frozen=True)
class UniformMatcher:
    """Match every instance with as many priors, whatever its size (details as in MMDetection 3.x).

    An instance takes the `topk` predicted boxes and the `topk` anchors nearest to it, by the L1 distance of centers and
    sizes. Those whose anchor overlaps it by less than `positive` are ignored, as are others whose predicted box
    overlaps an instance by more than `negative`. Of several claims on a prior the last one counts: that of the farther
    rank, of an anchor rather than a predicted box, and of the later instance. `torch.topk` chooses among equally near
    ones.

    Args:
        topk: Predicted boxes and anchors per instance.
        positive: IoU of anchor and instance from which a match is positive.
        negative: IoU of predicted box and instance up to which an unmatched prior is background.

    Raises:
        InputError: An option is out of its range.
    """

    topk: int = 4
    positive: float = 0.15
    negative: float = 0.7

    def __post_init__(self) -> None:
        if self.topk < 1 or not 0 <= self.positive <= 1 or not 0 <= self.negative <= 1:
            raise InputError(
                f"topk={self.topk} must be 1 or more, positive={self.positive}, negative={self.negative} 0 to 1"
            )

    @torch.no_grad()
    def match(self, anchors: Tensor, predicted: Tensor, target: Target, valid: Tensor) -> UniformMatches:
        """Match the priors of one image.

        Args:
            anchors: xyxy in pixels.
            predicted: Predicted boxes, xyxy in pixels.
            target: Of the image.
            valid: Priors that take part.

        Shape:
            anchors and predicted (P, 4); valid (P,) bool, the others are ignored and influence nothing.
        """
        instances = target.boxes.to(anchors.dtype)
        k = min(self.topk, len(anchors))
        far = torch.where(valid, 0.0, torch.inf)  # (P,)
        overlap, nearest = anchors.new_zeros(len(anchors)), []
        for some in instances.split(INSTANCES_AT_ONCE) if len(instances) else ():
            overlap = torch.maximum(overlap, box_iou(predicted, some).amax(dim=1))
            own, *all_ = (box_convert(b, "xyxy", "cxcywh") for b in (some, predicted, anchors))
            distances = [torch.cdist(own, b, p=1) + far for b in all_]
            nearest.append(torch.stack([d.topk(k, dim=1, largest=False).indices for d in distances], dim=2))
        assigned = torch.where(overlap > self.negative, IGNORED, BACKGROUND)
        count = len(instances)
        # (G, k, 2): rank, and predicted box or anchor
        matches = torch.cat(nearest) if nearest else assigned.new_zeros(0, k, 2)
        own = torch.arange(count, device=anchors.device)[:, None, None].expand_as(matches)
        claims = matches.permute(1, 2, 0).flatten()  # the order of claims: rank, kind, instance
        claiming = own.permute(1, 2, 0).flatten()
        positive = aligned_iou(anchors[claims], instances[claiming]) >= self.positive
        order = torch.arange(len(claims), device=anchors.device)
        last = order.new_full((len(anchors),), -1).scatter_reduce(0, claims, order, "amax")
        if count:
            claimed = torch.where(positive, claiming, IGNORED)[last.clamp(min=0)]
            assigned = torch.where(last >= 0, claimed, assigned)
        positive = positive.view(k, 2, count).permute(2, 0, 1).flatten(1) & valid[matches.flatten(1)]
        return UniformMatches(ignore_invalid(assigned, valid), matches.flatten(1), positive)
