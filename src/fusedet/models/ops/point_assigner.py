"""RepPoints' first assignment: "RepPoints: Point Set Representation for Object Detection", Yang et al., 2019, section 4."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusedet.errors import InputError
from fusedet.models.ops.assigners import INSTANCES_AT_ONCE, resolve_claims
from fusedet.models.ops.boxes import box_centres
from fusedet.types import Priors, Target

_LEAST_SIDE = 1e-6  # pixels that a box's side counts as at least


@dataclass(frozen=True)
class PointAssigner:
    """By size and place (the paper's first stage, as MMDetection 3.x, where it is PointAssigner, settles what it leaves open).

    An object belongs to the level of stride 2^s with s = floor(log2(sqrt(width * height) / scale)), to the first or the last one where
    there is none so fine or so coarse, and between two to the finer. There it claims the `pos_num` points, centres of priors, that are
    nearest to its centre, distances along x and y being measured in its width and height. A point that several objects claim goes to
    the nearest, of equally near ones to the first; all others are background.
    Which of several equally distant points is claimed is left to torch.topk. Raises InputError for a scale of 0 or less and for
    pos_num below 1.
    """

    scale: float = 4.0
    pos_num: int = 1

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise InputError(f"scale={self.scale} must be above 0")
        if self.pos_num < 1:
            raise InputError(f"pos_num={self.pos_num} must be 1 or more")

    @torch.no_grad()
    def assign(self, priors: Priors, target: Target, valid: Tensor | None = None) -> Tensor:
        """(P,) int64: the object's index, -1 background, -2 not valid."""
        points = box_centres(priors.boxes)
        if valid is not None:
            points = points.masked_fill(~valid[:, None], torch.inf)
        return resolve_claims(*self._claims(points, priors, target.boxes.to(points.dtype)), len(priors), valid)

    def _claims(self, every: Tensor, priors: Priors, objects: Tensor) -> tuple[Tensor, Tensor]:
        """The distances (G, M) of the nearest points of (P, 2), `pos_num` (or all) of every level, endless but on the object's own level,
        and which ones they are."""
        middle, sides = box_centres(objects), (objects[:, 2:] - objects[:, :2]).clamp(min=_LEAST_SIDE)  # (G, 2)
        size = (sides / self.scale).log2().mean(dim=1)  # (G,)
        exponents = (
            torch.stack([strides[0] for strides in priors.strides.split(list(priors.counts))]).log2().floor()
        )  # (L,)
        level = ((size[:, None] >= exponents).sum(dim=1) - 1).clamp(min=0)  # (G,)
        distances, places, start = [], [], 0
        for i, points in enumerate(every.split(list(priors.counts))):
            k = min(self.pos_num, len(points))
            some = [
                ((points - m[:, None]) / s[:, None]).norm(dim=2).topk(k, dim=1, largest=False)  # (G', k)
                for m, s in zip(middle.split(INSTANCES_AT_ONCE), sides.split(INSTANCES_AT_ONCE))
            ]
            own = (level == i)[:, None]
            distances.append(torch.where(own, torch.cat([found.values for found in some]), torch.inf))
            places.append(start + torch.cat([found.indices for found in some]))
            start += len(points)
        return torch.cat(distances, dim=1), torch.cat(places, dim=1)
