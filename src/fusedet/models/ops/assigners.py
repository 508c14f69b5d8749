"""Label assignment: which prior is a positive for which ground-truth instance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_area, box_iou

from fusedet.models.ops.boxes import box_centers, boxes_to_distances
from fusedet.models.protocols import Assigner
from fusedet.types import MULTIPLE, Outputs, Priors, Target

BACKGROUND, IGNORED = -1, -2
INSIDE = 0.01  # pixels by which a center lies inside a box: from the code of ATSS and TOOD, not from their papers
INSTANCES_AT_ONCE = 64  # bounds the matrix of instances and priors: 64 x 200,000 numbers are 51 MB


def valid_prior_mask(
    outputs: Outputs, strides: Sequence[int], sizes: Tensor | None, border: float | None = None
) -> Tensor:
    """Compute which priors take part in each image's loss: those of cells inside the image's own padding.

    An image's own padding makes its sides multiples of 32, which may be less than the batch's padding. A cell lies
    inside where its upper left corner does (MMDetection 3.x).

    Args:
        outputs: Maps and priors of a dense head.
        strides: Stride of every level.
        sizes: Height and width of every image inside the padding; None for no padding.
        border: Pixels by which a prior's box may reach outside the image, None for any number. The right and the lower
            edge count as outside, as in MMDetection.

    Shape:
        sizes (N, 2); result (N, P) bool.
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


def assign_batch(assigner: Assigner, priors: Priors, targets: Sequence[Target], valid: Tensor | None = None) -> Tensor:
    """Assign the priors of every image: (N, P) int64.

    Args:
        assigner: Assigns the priors of one image.
        priors: P priors, the same in every image.
        targets: Of each image.
        valid: (N, P) bool, priors that take part; None for all.
    """
    rows = [None] * len(targets) if valid is None else valid.unbind()
    return torch.stack([assigner.assign(priors, target, row) for target, row in zip(targets, rows, strict=True)])


def resolve_claims(costs: Tensor, indices: Tensor, count: int, valid: Tensor | None) -> Tensor:
    """Assign every prior to the claiming instance of the lowest cost, the first of equal ones.

    Args:
        costs: Cost of every claim; infinite for no claim.
        indices: The priors that each instance claims.
        count: P, the number of priors.
        valid: Priors that take part; None for all.

    Shape:
        costs and indices (G, M); valid (P,); result (P,) int64, unclaimed priors are background.
    """
    lowest = costs.new_full((count,), math.inf).scatter_reduce(0, indices.flatten(), costs.flatten(), "amin")
    index = torch.arange(len(costs), device=indices.device)[:, None]  # (G, 1)
    winners = torch.where(costs.isfinite() & (costs == lowest[indices]), index, len(costs))
    assigned = winners.new_full((count,), len(costs)).scatter_reduce(0, indices.flatten(), winners.flatten(), "amin")
    return ignore_invalid(torch.where(assigned < len(costs), assigned, BACKGROUND), valid)


def ignore_invalid(assigned: Tensor, valid: Tensor | None) -> Tensor:
    """Mark priors (P,) as ignored where not valid."""
    return assigned if valid is None else torch.where(valid, assigned, IGNORED)


class Positives(NamedTuple):
    """The R positive priors of a batch with their ground truth.

    Attributes:
        image: (R,) index of the image in the batch.
        prior: (R,) index of the prior.
        boxes: (R, 4) ground-truth box.
        labels: (R,) ground-truth class.
    """

    image: Tensor
    prior: Tensor
    boxes: Tensor
    labels: Tensor


def gather_positives(assigned: Tensor, targets: Sequence[Target]) -> Positives:
    """Collect the positives of an assignment (N, P). It is the only GPU synchronization in a loss."""
    image, prior = (assigned >= 0).nonzero(as_tuple=True)
    return Positives(image, prior, *gather_instances(targets, image, assigned[image, prior]))


def gather_instances(targets: Sequence[Target], image: Tensor, instance: Tensor) -> tuple[Tensor, Tensor]:
    """Collect boxes (R, 4), at least float32, and labels (R,) of ground-truth instances.

    image, instance (R,): index of the image in the batch, and of the instance in the image.
    """
    boxes, labels = (
        pad_sequence([getattr(t, name) for t in targets], batch_first=True)[image, instance]
        for name in ("boxes", "labels")
    )
    return boxes.to(torch.promote_types(boxes.dtype, torch.float32)), labels


@dataclass(frozen=True)
class MaxIoUAssigner:
    """Assignment by IoU; ties as in MMDetection 3.x.

    A prior is assigned to the instance with which its IoU is largest.

    Args:
        positive: IoU from which the prior is positive.
        negative: IoU below which it is background; between the two it is ignored.
        min_positive: Least IoU of a low-quality match, above 0 in any case.
        low_quality: Each instance also takes the priors with which its IoU is largest. Of several instances that claim
            a prior so, the last one takes it.

    References:
        "Faster R-CNN", Ren et al., 2015, section 3.1.2.
    """

    positive: float | Tensor = 0.5
    negative: float | Tensor = 0.4
    min_positive: float = 0.0
    low_quality: bool = True

    def assign(self, priors: Priors, target: Target, valid: Tensor | None = None) -> Tensor:
        """Assign the priors of an image, as `protocols.Assigner` says."""
        return self.match_boxes(priors.boxes, target, valid)[0]

    @torch.no_grad()
    def match_boxes(self, boxes: Tensor, target: Target, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Assign boxes (P, 4): the assignment (P,), and every box's largest IoU (P,) with an instance."""
        if valid is not None:
            boxes = boxes.masked_fill(~valid[:, None], 0)  # an empty box has IoU 0
        best = boxes.new_zeros(len(boxes))
        assigned = torch.full((len(boxes),), BACKGROUND, device=best.device)
        claimed = assigned.clone()
        for first in range(0, len(target), INSTANCES_AT_ONCE):
            ious = box_iou(target.boxes[first : first + INSTANCES_AT_ONCE].to(best.dtype), boxes)  # (G', P)
            value, index = ious.max(dim=0)
            higher = value > best  # the earlier instance keeps a tie
            best, assigned = torch.where(higher, value, best), torch.where(higher, index + first, assigned)
            if self.low_quality:
                peak = ious.max(dim=1, keepdim=True).values
                claims = (ious == peak) & (peak >= self.min_positive) & (peak > 0)
                rank = torch.arange(1, len(ious) + 1, device=best.device)[:, None]
                last = (claims * rank).amax(dim=0)
                claimed = torch.where(last > 0, last - 1 + first, claimed)
        assigned = torch.where(best >= self.positive, assigned, torch.where(best < self.negative, BACKGROUND, IGNORED))
        return ignore_invalid(torch.where(claimed >= 0, claimed, assigned), valid), best


@dataclass(frozen=True)
class PointInBoxAssigner:
    """Assignment by location and size; ties as in MMDetection 3.x.

    A point, the center of a prior, is positive for an instance whose box contains it and whose farthest side is at a
    distance within the range of the point's level, both ends included. Of several instances it takes the one of the
    smallest area, of equal areas the first. All other points are background.

    Args:
        limits: Limits between the ranges of neighboring levels, in pixels. The first range begins at 0, the last has
            no end.
        radius: Center sampling: a point must also be nearer than radius * stride to the box's center, along x and y.
            None for the whole box.

    References:
        "FCOS", Tian et al., 2019, sections 3.1 and 3.2.
    """

    limits: tuple[float, ...]
    radius: float | None = None

    @torch.no_grad()
    def assign(self, priors: Priors, target: Target, valid: Tensor | None = None) -> Tensor:
        """Assign the priors of an image, as `protocols.Assigner` says."""
        points = box_centers(priors.boxes)  # (P, 2)
        ends = [0.0, *self.limits, math.inf]
        low, high = (torch.cat([points.new_full((n,), e) for n, e in zip(priors.counts, ends[i:])]) for i in (0, 1))
        smallest = points.new_full((len(priors),), math.inf)
        assigned = torch.full((len(priors),), BACKGROUND, device=points.device)
        for first in range(0, len(target), INSTANCES_AT_ONCE):
            boxes = target.boxes[first : first + INSTANCES_AT_ONCE].to(points.dtype)
            sides = boxes_to_distances(points, boxes[:, None])  # (G', P, 4)
            farthest = sides.amax(dim=2)
            fits = (sides.amin(dim=2) > 0) & (farthest >= low) & (farthest <= high)
            if self.radius is not None:
                away = (points - box_centers(boxes)[:, None]).abs().amax(dim=2)
                fits &= away < self.radius * priors.strides
            area, index = torch.where(fits, box_area(boxes)[:, None], math.inf).min(dim=0)
            smaller = area < smallest  # the earlier instance keeps a tie
            smallest = torch.where(smaller, area, smallest)
            assigned = torch.where(smaller, index + first, assigned)
        return ignore_invalid(assigned, valid)
