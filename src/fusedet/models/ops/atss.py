"""ATSS label assignment.

References:
    "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training Sample Selection",
    Zhang et al., 2020.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedet.errors import InputError
from fusedet.models.ops.assigners import INSIDE, INSTANCES_AT_ONCE, resolve_claims
from fusedet.models.ops.boxes import aligned_iou, box_centers, boxes_to_distances
from fusedet.types import Priors, Target


@dataclass(frozen=True)
class ATSSAssigner:
    """Assignment by the statistics of the nearest priors (algorithm 1; details as in MMDetection 3.x).

    An instance's candidates are the `topk` priors of every level whose centers are nearest to its own. Positive are
    those whose IoU is at least the mean plus the (unbiased) standard deviation of all its candidates' IoUs and whose
    centers lie inside its box. A prior that is positive for several instances takes the one with the largest IoU, the
    first of equal ones. All others are background. `torch.topk` chooses among equally distant priors.

    Args:
        topk: Candidates per level.

    Raises:
        InputError: `topk` is below 1.
    """

    topk: int = 9

    def __post_init__(self) -> None:
        if self.topk < 1:
            raise InputError(f"topk={self.topk} must be 1 or more")

    def assign(self, priors: Priors, target: Target, valid: Tensor | None = None) -> Tensor:
        """Assign the priors of an image, as `protocols.Assigner` says."""
        return self.assign_by(
            lambda indices, instances: aligned_iou(priors.boxes[indices], instances), priors, target, valid
        )

    @torch.no_grad()
    def assign_by(
        self,
        similarity: Callable[[Tensor, Tensor], Tensor],
        priors: Priors,
        target: Target,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Assign the priors of an image by another similarity than the IoU of their boxes.

        Args:
            similarity: Function from indices of priors (G, M) and the instances' boxes (G, 1, 4) to (G, M).
            priors: As in `assign`.
            target: As in `assign`.
            valid: As in `assign`.
        """
        instances = target.boxes.to(priors.boxes.dtype)[:, None]  # (G, 1, 4)
        points = box_centers(priors.boxes)
        if valid is not None:
            points = points.masked_fill(~valid[:, None], math.inf)  # a candidate only where a level has fewer than topk
        indices = self._candidates(points, priors.counts, box_centers(instances))  # (G, M)
        real = points[indices].isfinite().all(dim=2)  # (G, M)
        candidates = priors.boxes[indices]  # (G, M, 4)
        ious = similarity(indices, instances)  # (G, M)
        number = real.sum(dim=1, keepdim=True)  # (G, 1)
        mean = (ious * real).sum(dim=1, keepdim=True) / number
        variance = ((ious - mean).square() * real).sum(dim=1, keepdim=True) / (number - 1).clamp(min=1)
        inside = boxes_to_distances(box_centers(candidates), instances).amin(dim=2) > INSIDE
        # invalid priors may be taken here: no instance loses one by it, and they become ignored
        taken = (ious >= mean + variance.sqrt()) & inside
        return resolve_claims(torch.where(taken, -ious, math.inf), indices, len(priors), valid)

    def _candidates(self, points: Tensor, counts: tuple[int, ...], centers: Tensor) -> Tensor:
        """Return the indices (G, M) of the points (P, 2) nearest to the centers (G, 1, 2), `topk` of every level."""
        levels, start = [], 0
        for level_points in points.split(list(counts)):
            # the root does not change the order, but its rounding makes the ties that MMDetection has
            distances = [(level_points - c).square().sum(dim=2).sqrt() for c in centers.split(INSTANCES_AT_ONCE)]
            k = min(self.topk, len(level_points))
            levels.append(start + torch.cat([d.topk(k, dim=1, largest=False).indices for d in distances]))
            start += len(level_points)
        return torch.cat(levels, dim=1)
