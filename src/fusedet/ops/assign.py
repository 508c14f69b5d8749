"""Assignment: which object each prior answers for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_area, box_iou

from fusedet.ops.boxes import centres, to_distances
from fusedet.types import Priors, Target

BACKGROUND, IGNORED = -1, -2


class Positives(NamedTuple):
    """The priors of a batch that answer for objects, R of them: their picture and prior, (R,) each, and their objects' boxes (R, 4) and
    labels (R,)."""

    picture: Tensor
    prior: Tensor
    boxes: Tensor
    labels: Tensor


def positives(owners: Tensor, targets: Sequence[Target]) -> Positives:
    """Of what `assign` gave for each picture, (N, P). The one place in a loss where a GPU is waited for."""
    picture, prior = (owners >= 0).nonzero(as_tuple=True)
    owned = owners[picture, prior]
    boxes, labels = (pad_sequence([getattr(t, name) for t in targets], batch_first=True)[picture, owned] for name in ("boxes", "labels"))
    return Positives(picture, prior, boxes.to(torch.promote_types(boxes.dtype, torch.float32)), labels)


_OBJECTS_AT_ONCE = 64  # bounds the overlap matrix: 64 x 200,000 priors are 51 MB


@dataclass(frozen=True)
class MaxIoU:
    """By overlap (Faster R-CNN, 2015, 3.1.2, as MMDetection 3.x settles ties).

    A prior takes the object that it overlaps most, if by `positive` or more; below `negative` it is background; between
    them it is ignored. With `low_quality`, each object also takes the priors that overlap it most, if by `min_positive`
    or more and at all; where two objects claim one prior, the later object has it.
    """

    positive: float | Tensor = 0.5
    negative: float | Tensor = 0.4
    min_positive: float = 0.0
    low_quality: bool = True

    def assign(self, priors: Priors, target: Target) -> Tensor:
        """(P,) int64: the object's index, -1 background, -2 ignored."""
        return self.match(priors.boxes, target)[0]

    @torch.no_grad()
    def match(self, boxes: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """For boxes (P, 4) the same (P,), and the largest overlap (P,) of each with an object."""
        best = boxes.new_zeros(len(boxes))
        owner = torch.full((len(boxes),), BACKGROUND, device=best.device)
        claimed = owner.clone()
        for first in range(0, len(target), _OBJECTS_AT_ONCE):
            overlap = box_iou(target.boxes[first : first + _OBJECTS_AT_ONCE].to(best.dtype), boxes)  # (G', P)
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
        return torch.where(claimed >= 0, claimed, assigned), best


@dataclass(frozen=True)
class PointInBox:
    """By place and size (FCOS, 2019, 3.1 and 3.2, as MMDetection 3.x settles ties).

    A point, the centre of a prior, answers for an object whose box it lies inside and whose farthest side is at a distance in its
    level's range, both ends included; of several, for the one of smallest area, and of equal areas for the first. The others are
    background.
    limits: between the ranges of neighbouring levels, in pixels; the first range begins at 0, the last has no end.
    radius: center sampling: a point must also be nearer than radius * stride to the box's centre, along x and y; None, all of the
    box counts.
    """

    limits: tuple[float, ...]
    radius: float | None = None

    @torch.no_grad()
    def assign(self, priors: Priors, target: Target) -> Tensor:
        """(P,) int64: the object's index, -1 background."""
        points = centres(priors.boxes)  # (P, 2)
        ends = [0.0, *self.limits, math.inf]
        low, high = (torch.cat([points.new_full((n,), e) for n, e in zip(priors.counts, ends[i:])]) for i in (0, 1))
        smallest = points.new_full((len(priors),), math.inf)
        owner = torch.full((len(priors),), BACKGROUND, device=points.device)
        for first in range(0, len(target), _OBJECTS_AT_ONCE):
            boxes = target.boxes[first : first + _OBJECTS_AT_ONCE].to(points.dtype)
            sides = to_distances(points, boxes[:, None])  # (G', P, 4)
            farthest = sides.amax(dim=2)
            fits = (sides.amin(dim=2) > 0) & (farthest >= low) & (farthest <= high)
            if self.radius is not None:
                away = (points - centres(boxes)[:, None]).abs().amax(dim=2)
                fits &= away < self.radius * priors.strides
            area, index = torch.where(fits, box_area(boxes)[:, None], math.inf).min(dim=0)
            better = area < smallest  # an earlier object keeps a tie
            smallest, owner = torch.where(better, area, smallest), torch.where(better, index + first, owner)
        return owner
