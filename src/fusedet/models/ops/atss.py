"""ATSS: "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training Sample Selection", Zhang et al., 2020."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedet.errors import InputError
from fusedet.models.ops.assigners import INSTANCES_AT_ONCE, resolve_claims
from fusedet.models.ops.boxes import aligned_iou, box_centres, boxes_to_distances
from fusedet.types import Priors, Target

_INSIDE = 0.01  # pixels by which a prior's centre lies inside its object (the authors' code; the paper says "inside")


@dataclass(frozen=True)
class ATSSAssigner:
    """By the statistics of the nearest priors (algorithm 1, as MMDetection 3.x settles what it leaves open).

    An object's candidates are the `topk` priors of every level whose centres are nearest to its own. It takes those that overlap it by
    at least the mean plus the (unbiased) standard deviation of all its candidates' overlaps and whose centres lie inside it. A prior
    that several objects take goes to the one that it overlaps most, of equal ones to the first; all others are background.
    Which of several equally distant priors is a candidate is left to torch.topk. Raises InputError for topk below 1.
    """

    topk: int = 9

    def __post_init__(self) -> None:
        if self.topk < 1:
            raise InputError(f"topk={self.topk} must be 1 or more")

    @torch.no_grad()
    def assign(self, priors: Priors, target: Target, valid: Tensor | None = None) -> Tensor:
        """(P,) int64: the object's index, -1 background, -2 not valid."""
        objects = target.boxes.to(priors.boxes.dtype)[:, None]  # (G, 1, 4)
        points = box_centres(priors.boxes)
        if valid is not None:
            points = points.masked_fill(~valid[:, None], math.inf)  # no candidate but where a level has less than topk
        places = self._candidates(points, priors.counts, box_centres(objects))  # (G, M)
        real = points[places].isfinite().all(dim=2)  # (G, M)
        candidates = priors.boxes[places]  # (G, M, 4)
        overlap = aligned_iou(candidates, objects)  # (G, M)
        number = real.sum(dim=1, keepdim=True)  # (G, 1)
        mean = (overlap * real).sum(dim=1, keepdim=True) / number
        variance = ((overlap - mean).square() * real).sum(dim=1, keepdim=True) / (number - 1).clamp(min=1)
        inside = boxes_to_distances(box_centres(candidates), objects).amin(dim=2) > _INSIDE
        # an invalid one may be taken here: from nobody, and it is ignored in the end
        taken = (overlap >= mean + variance.sqrt()) & inside
        return resolve_claims(torch.where(taken, -overlap, math.inf), places, len(priors), valid)

    def _candidates(self, every: Tensor, counts: tuple[int, ...], middle: Tensor) -> Tensor:
        """Which points (G, M) of (P, 2) are nearest to the objects' centres (G, 1, 2), `topk` (or all) of every level."""
        levels, start = [], 0
        for points in every.split(list(counts)):
            # the root orders nothing anew, but its rounding makes the ties that MMDetection sees
            some = [(points - m).square().sum(dim=2).sqrt() for m in middle.split(INSTANCES_AT_ONCE)]
            k = min(self.topk, len(points))
            levels.append(start + torch.cat([distance.topk(k, dim=1, largest=False).indices for distance in some]))
            start += len(points)
        return torch.cat(levels, dim=1)
