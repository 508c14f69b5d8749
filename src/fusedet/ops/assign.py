"""Assignment: which object each prior answers for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from fusedet.types import Priors, Target

BACKGROUND, IGNORED = -1, -2

_OBJECTS_AT_ONCE = 64  # bounds the overlap matrix: 64 x 200,000 priors are 51 MB


@dataclass(frozen=True)
class MaxIoU:
    """By overlap (Faster R-CNN, 2015, 3.1.2, as MMDetection 3.x settles ties).

    A prior takes the object that it overlaps most, if by `positive` or more; below `negative` it is background; between
    them it is ignored. With `low_quality`, each object also takes the priors that overlap it most, if by `min_positive`
    or more and at all; where two objects claim one prior, the later object has it.
    """

    positive: float = 0.5
    negative: float = 0.4
    min_positive: float = 0.0
    low_quality: bool = True

    @torch.no_grad()
    def assign(self, priors: Priors, target: Target) -> Tensor:
        """(P,) int64: the object's index, -1 background, -2 ignored."""
        best = priors.boxes.new_zeros(len(priors))
        owner = torch.full((len(priors),), BACKGROUND, device=best.device)
        claimed = owner.clone()
        for first in range(0, len(target), _OBJECTS_AT_ONCE):
            overlap = box_iou(target.boxes[first : first + _OBJECTS_AT_ONCE].to(best.dtype), priors.boxes)  # (G', P)
            value, index = overlap.max(dim=0)
            better = value > best  # an earlier object keeps a tie
            best, owner = torch.where(better, value, best), torch.where(better, index + first, owner)
            if self.low_quality:
                peak = overlap.max(dim=1, keepdim=True).values
                claims = (overlap == peak) & (peak >= self.min_positive) & (peak > 0)
                rank = torch.arange(1, len(overlap) + 1, device=best.device)[:, None]
                last = (claims * rank).amax(dim=0)
                claimed = torch.where(last > 0, last - 1 + first, claimed)
        assigned = torch.where(best >= self.positive, owner, torch.where(best < self.negative, BACKGROUND, IGNORED))
        return torch.where(claimed >= 0, claimed, assigned)
