"""RepPoints' first label assignment.

References:
    "RepPoints: Point Set Representation for Object Detection", Yang et al., 2019, section 4.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusedet.errors import InputError
from fusedet.models.ops.assigners import INSTANCES_AT_ONCE, resolve_claims
from fusedet.models.ops.boxes import box_centers
from fusedet.types import Priors, Target

_LEAST_SIDE = 1e-6  # lower bound of a box's side, in pixels


@dataclass(frozen=True)
class PointAssigner:
    """Assignment by size and location (the paper's first stage; details as in MMDetection 3.x's PointAssigner).

    An instance belongs to the level of stride 2^s, s = floor(log2(sqrt(width * height) / scale)); to the finest or the
    coarsest level beyond the pyramid, and between two levels to the finer. There it claims the `pos_num` points,
    centers of priors, nearest to its center, with distances along x and y in units of its width and height. A point
    that several instances claim takes the nearest, the first of equally near ones. All others are background.
    `torch.topk` chooses among equally distant points.

    Args:
        scale: Size of an instance, in strides of its level.
        pos_num: Points per instance.

    Raises:
        InputError: `scale` is 0 or less, or `pos_num` below 1.
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
        """Assign the priors of an image, as `protocols.Assigner` says."""
        points = box_centers(priors.boxes)
        if valid is not None:
            points = points.masked_fill(~valid[:, None], torch.inf)
        return resolve_claims(*self._claims(points, priors, target.boxes.to(points.dtype)), len(priors), valid)

    def _claims(self, points: Tensor, priors: Priors, instances: Tensor) -> tuple[Tensor, Tensor]:
        """Return distances (G, M) and indices (G, M) of the nearest points (P, 2), `pos_num` of every level.

        Distances are infinite except on the instance's own level.
        """
        centers, sides = box_centers(instances), (instances[:, 2:] - instances[:, :2]).clamp(min=_LEAST_SIDE)  # (G, 2)
        size = (sides / self.scale).log2().mean(dim=1)  # (G,)
        strides = torch.stack([own[0] for own in priors.strides.split(list(priors.counts))])  # (L,)
        exponents = strides.log2().floor()
        level = ((size[:, None] >= exponents).sum(dim=1) - 1).clamp(min=0)  # (G,)
        distances, indices, start = [], [], 0
        for i, level_points in enumerate(points.split(list(priors.counts))):
            k = min(self.pos_num, len(level_points))
            nearest = [
                ((level_points - c[:, None]) / s[:, None]).norm(dim=2).topk(k, dim=1, largest=False)  # (G', k)
                for c, s in zip(centers.split(INSTANCES_AT_ONCE), sides.split(INSTANCES_AT_ONCE))
            ]
            own = (level == i)[:, None]
            distances.append(torch.where(own, torch.cat([top.values for top in nearest]), torch.inf))
            indices.append(start + torch.cat([top.indices for top in nearest]))
            start += len(level_points)
        return torch.cat(distances, dim=1), torch.cat(indices, dim=1)
