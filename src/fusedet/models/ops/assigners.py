"""Assignment: which object each prior answers for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_area, box_iou

from fusedet.models.ops.boxes import box_centres, boxes_to_distances
from fusedet.types import MULTIPLE, Outputs, Priors, Target

BACKGROUND, IGNORED = -1, -2
INSTANCES_AT_ONCE = 64  # bounds the matrix of objects and priors: 64 x 200,000 numbers are 51 MB

Assign = Callable[[Priors, Target, Tensor | None], Tensor]
"""The method of an assigner: priors of P places, an image's objects and which priors take part, (P,) bool, None: all, to (P,) int64:
the object's index, -1 background, -2 ignored, as all are that do not take part. It is as if these were not there."""


def valid_prior_mask(
    outputs: Outputs, strides: Sequence[int], sizes: Tensor | None, border: float | None = None
) -> Tensor:
    """Which priors take part in the loss of each image, (N, P) bool: those of the cells inside its own padding (MMDetection 3.x).

    sizes (N, 2): height and width of the images inside the canvas of the batch, None: all of it. An image's own padding makes its
    sides multiples of 32, a cell lies inside if it begins there. border: by how many pixels a prior's box may reach outside the image,
    None: by any number; the right and the lower edge count as outside, as there.
    """
    maps, priors = next(iter(outputs.maps.values())), outputs.priors
    if sizes is None:
        canvas = [side * strides[0] for side in maps[0].shape[2:]]
        sizes = torch.tensor(canvas, device=priors.boxes.device).expand(len(maps[0]), 2)
    padded = (sizes + MULTIPLE - 1) // MULTIPLE * MULTIPLE
    levels = []
    for level, stride, count in zip(maps, strides, priors.counts):
        rows, columns = (
            torch.arange(n, device=sizes.device) * stride < padded[:, i, None] for i, n in enumerate(level.shape[2:])
        )
        cells = (rows[:, :, None] & columns[:, None]).flatten(1)  # (N, H * W)
        levels.append(cells.repeat_interleave(count // cells.shape[1], dim=1))
    valid = torch.cat(levels, dim=1)
    if border is None:
        return valid
    low, high = priors.boxes.split(2, dim=1)
    return valid & (low >= -border).all(dim=1) & (high < sizes.flip(1)[:, None] + border).all(dim=2)


def assign_batch(assign: Assign, priors: Priors, targets: Sequence[Target], valid: Tensor | None = None) -> Tensor:
    """What `assign` says of all images, (N, P), of whose priors those of valid (N, P) take part, None: all."""
    rows = [None] * len(targets) if valid is None else valid.unbind()
    return torch.stack([assign(priors, target, row) for target, row in zip(targets, rows, strict=True)])


def resolve_claims(costs: Tensor, places: Tensor, count: int, valid: Tensor | None) -> Tensor:
    """Whose each of `count` priors is, (count,), of G objects that claim M priors each, at places (G, M): the object of the lowest cost,
    of equal ones the first. costs (G, M), infinite: no claim. Unclaimed ones are background."""
    lowest = costs.new_full((count,), math.inf).scatter_reduce(0, places.flatten(), costs.flatten(), "amin")
    index = torch.arange(len(costs), device=places.device)[:, None]  # (G, 1)
    winners = torch.where(costs.isfinite() & (costs == lowest[places]), index, len(costs))
    owner = winners.new_full((count,), len(costs)).scatter_reduce(0, places.flatten(), winners.flatten(), "amin")
    return ignore_invalid(torch.where(owner < len(costs), owner, BACKGROUND), valid)


def ignore_invalid(owner: Tensor, valid: Tensor | None) -> Tensor:
    """The same (P,), but ignored where not valid."""
    return owner if valid is None else torch.where(valid, owner, IGNORED)


class Positives(NamedTuple):
    """The priors of a batch that answer for objects, R of them: their image and prior, (R,) each, and their objects' boxes (R, 4) and
    labels (R,)."""

    image: Tensor
    prior: Tensor
    boxes: Tensor
    labels: Tensor


def gather_positives(owners: Tensor, targets: Sequence[Target]) -> Positives:
    """Of what `assign` gave for each image, (N, P). The one place in a loss where a GPU is waited for."""
    image, prior = (owners >= 0).nonzero(as_tuple=True)
    return Positives(image, prior, *gather_instances(targets, image, owners[image, prior]))


def gather_instances(targets: Sequence[Target], image: Tensor, owned: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes (R, 4), of float32 at least, and labels (R,) of the objects with numbers owned (R,) in the images image (R,)."""
    boxes, labels = (
        pad_sequence([getattr(t, name) for t in targets], batch_first=True)[image, owned]
        for name in ("boxes", "labels")
    )
    return boxes.to(torch.promote_types(boxes.dtype, torch.float32)), labels


@dataclass(frozen=True)
class MaxIoUAssigner:
    """By overlap (Faster R-CNN, 2015, 3.1.2, as MMDetection 3.x settles ties).

    A prior takes the object that it overlaps most, if by `positive` or more; below `negative` it is background; between
    them it is ignored. With `low_quality`, each object also takes the priors that overlap it most, if by `min_positive`
    or more and at all; where two objects claim one prior, the later object has it.
    """

    positive: float | Tensor = 0.5
    negative: float | Tensor = 0.4
    min_positive: float = 0.0
    low_quality: bool = True

    def assign(self, priors: Priors, target: Target, valid: Tensor | None = None) -> Tensor:
        """(P,) int64: the object's index, -1 background, -2 ignored."""
        return self.match_boxes(priors.boxes, target, valid)[0]

    @torch.no_grad()
    def match_boxes(self, boxes: Tensor, target: Target, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """For boxes (P, 4) the same (P,), and the largest overlap (P,) of each with an object."""
        if valid is not None:
            boxes = boxes.masked_fill(~valid[:, None], 0)  # an empty box overlaps nothing
        best = boxes.new_zeros(len(boxes))
        owner = torch.full((len(boxes),), BACKGROUND, device=best.device)
        claimed = owner.clone()
        for first in range(0, len(target), INSTANCES_AT_ONCE):
            overlap = box_iou(target.boxes[first : first + INSTANCES_AT_ONCE].to(best.dtype), boxes)  # (G', P)
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
        return ignore_invalid(torch.where(claimed >= 0, claimed, assigned), valid), best


@dataclass(frozen=True)
class PointInBoxAssigner:
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
    def assign(self, priors: Priors, target: Target, valid: Tensor | None = None) -> Tensor:
        """(P,) int64: the object's index, -1 background, -2 not valid."""
        points = box_centres(priors.boxes)  # (P, 2)
        ends = [0.0, *self.limits, math.inf]
        low, high = (torch.cat([points.new_full((n,), e) for n, e in zip(priors.counts, ends[i:])]) for i in (0, 1))
        smallest = points.new_full((len(priors),), math.inf)
        owner = torch.full((len(priors),), BACKGROUND, device=points.device)
        for first in range(0, len(target), INSTANCES_AT_ONCE):
            boxes = target.boxes[first : first + INSTANCES_AT_ONCE].to(points.dtype)
            sides = boxes_to_distances(points, boxes[:, None])  # (G', P, 4)
            farthest = sides.amax(dim=2)
            fits = (sides.amin(dim=2) > 0) & (farthest >= low) & (farthest <= high)
            if self.radius is not None:
                away = (points - box_centres(boxes)[:, None]).abs().amax(dim=2)
                fits &= away < self.radius * priors.strides
            area, index = torch.where(fits, box_area(boxes)[:, None], math.inf).min(dim=0)
            better = area < smallest  # an earlier object keeps a tie
            smallest, owner = torch.where(better, area, smallest), torch.where(better, index + first, owner)
        return ignore_invalid(owner, valid)
