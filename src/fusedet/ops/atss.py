"""ATSS: "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training Sample Selection", Zhang et al., 2020."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusedet.errors import InputError
from fusedet.ops.assign import BACKGROUND
from fusedet.ops.boxes import centres, iou, to_distances
from fusedet.types import Priors, Target

_OBJECTS_AT_ONCE = 64  # bounds the distance matrix: 64 x 200,000 priors are 51 MB
_INSIDE = 0.01  # pixels by which a prior's centre lies inside its object (the authors' code; the paper says "inside")


@dataclass(frozen=True)
class ATSS:
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
    def assign(self, priors: Priors, target: Target) -> Tensor:
        """(P,) int64: the object's index, or -1, background."""
        objects = target.boxes.to(priors.boxes.dtype)[:, None]  # (G, 1, 4)
        places = self._candidates(priors, centres(objects))  # (G, M)
        candidates = priors.boxes[places]  # (G, M, 4)
        overlap = iou(candidates, objects)  # (G, M)
        mean = overlap.mean(dim=1, keepdim=True)
        variance = (overlap - mean).square().sum(dim=1, keepdim=True) / max(1, overlap.shape[1] - 1)
        inside = to_distances(centres(candidates), objects).amin(dim=2) > _INSIDE
        taken = (overlap >= mean + variance.sqrt()) & inside

        count = len(objects)
        claims = torch.where(taken, overlap, -1.0)
        best = claims.new_full((len(priors),), -1.0).scatter_reduce(0, places.flatten(), claims.flatten(), "amax")
        index = torch.arange(count, device=places.device)[:, None]  # (G, 1)
        winners = torch.where(taken & (overlap == best[places]), index, count)
        owner = winners.new_full((len(priors),), count).scatter_reduce(0, places.flatten(), winners.flatten(), "amin")
        return torch.where(owner < count, owner, BACKGROUND)

    def _candidates(self, priors: Priors, middle: Tensor) -> Tensor:
        """Which priors (G, M) are nearest to the objects' centres (G, 1, 2), `topk` (or all) of every level."""
        levels, start = [], 0
        for points in centres(priors.boxes).split(list(priors.counts)):
            # the root orders nothing anew, but its rounding makes the ties that MMDetection sees
            some = [(points - m).square().sum(dim=2).sqrt() for m in middle.split(_OBJECTS_AT_ONCE)]
            k = min(self.topk, len(points))
            levels.append(start + torch.cat([distance.topk(k, dim=1, largest=False).indices for distance in some]))
            start += len(points)
        return torch.cat(levels, dim=1)
