"""Label assignment by the central region of a box: FoveaBox's and FSAF's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_area

from fusedet.models.ops.assigners import BACKGROUND, INSTANCES_AT_ONCE, ignore_invalid
from fusedet.models.ops.boxes import box_centers, boxes_to_distances
from fusedet.types import Priors, Target

_LEAST_SHARE = 0.01  # of a prior's area that must lie in the central region (MMDetection's min_pos_iof)


def _take_smallest(
    fits: Tensor, areas: Tensor, first: int, smallest: Tensor, assigned: Tensor
) -> tuple[Tensor, Tensor]:
    """Assign priors (P,) to the smallest of G' instances that they fit, the last of equal ones.

    Args:
        fits: (G', P) bool.
        areas: (G',).
        first: Index of the first of these instances.
        smallest: (P,) area of each prior's instance so far.
        assigned: (P,) that instance.
    """
    area, reverse = torch.where(fits, areas[:, None], math.inf).flip(0).min(dim=0)
    takes = (area <= smallest) & area.isfinite()
    index = first + len(areas) - 1 - reverse
    return torch.where(takes, area, smallest), torch.where(takes, index, assigned)


@dataclass(frozen=True)
class FoveaAssigner:
    """FoveaBox's assignment: the cells of the central part of a box (section 3.3; details as in MMDetection 3.x).

    An instance belongs to the levels whose range contains the root of its area, both ends included. There it takes the
    cells from ceil(x1 + (1 - sigma) w / 2 - 0.5) to floor(x1 + (1 + sigma) w / 2 - 0.5) in strides, likewise along y,
    both clipped to the map. Of several instances a cell takes the smallest, of equal ones the last.

    Args:
        ranges: Least and greatest root of an area, in pixels, for each level.
        sigma: Size of the central part in sizes of the box.

    References:
        "FoveaBox: Beyond Anchor-Based Object Detection", Kong et al., 2020.
    """

    ranges: Sequence[tuple[float, float]]
    sigma: float = 0.4

    @torch.no_grad()
    def assign(self, priors: Priors, target: Target, valid: Tensor | None = None) -> Tensor:
        """Assign the priors, whose centers are the middles of cells, as `protocols.Assigner` says."""
        cells = (box_centers(priors.boxes) / priors.strides[:, None] - 0.5).round()  # (P, 2): column and row
        levels = list(zip(self.ranges, priors.counts, cells.split(list(priors.counts)), strict=True))
        low, high = (torch.cat([cells.new_full((n,), ends[i]) for ends, n, _ in levels]) for i in (0, 1))
        last = torch.cat([level.amax(dim=0).expand(n, 2) for _, n, level in levels])  # (P, 2)
        smallest = cells.new_full((len(priors),), math.inf)
        assigned = torch.full((len(priors),), BACKGROUND, device=cells.device)
        for first in range(0, len(target), INSTANCES_AT_ONCE):
            boxes = target.boxes[first : first + INSTANCES_AT_ONCE].to(cells.dtype)[:, None]  # (G', 1, 4)
            sizes = box_area(boxes[:, 0]).sqrt()  # (G',)
            boxes = boxes / priors.strides[:, None]  # (G', P, 4)
            half = 0.5 * (boxes[..., 2:] - boxes[..., :2])
            start = (boxes[..., :2] + (1 - self.sigma) * half - 0.5).ceil().clamp(min=0)
            end = (boxes[..., :2] + (1 + self.sigma) * half - 0.5).floor().clamp(min=0)
            inside = (cells >= torch.minimum(start, last)) & (cells <= torch.minimum(end, last))
            fits = inside.all(dim=2) & (sizes[:, None] >= low) & (sizes[:, None] <= high)
            smallest, assigned = _take_smallest(fits, sizes, first, smallest, assigned)
        return ignore_invalid(assigned, valid)


@dataclass(frozen=True)
class CenterRegionAssigner:
    """FSAF's assignment on every level: the cells of the central part of a box (details as in MMDetection 3.x).

    A prior belongs to an instance if more than 1 % of it lies in the instance's box scaled by `scale`, and its center
    in the box itself. Of several instances it takes the smallest, of equal ones the last.

    A prior loses the classification loss of another instance's class that it belongs to as well, or whose scaled box
    it touches without its center in the box. If that class is the prior's own, the prior is background.

    Args:
        num_classes: K.
        scale: Size of the central part, in sizes of the box.

    References:
        "Feature Selective Anchor-Free Module for Single-Shot Object Detection", Zhu et al., 2019, section 3.1.
    """

    num_classes: int
    scale: float = 0.2

    @torch.no_grad()
    def assign_with_contested(
        self, priors: Priors, target: Target, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Assign the priors (P,), and compute which classes (P, K) have no loss there."""
        boxes = priors.boxes
        centers, area = box_centers(boxes), box_area(boxes)
        smallest = boxes.new_full((len(priors),), math.inf)
        assigned = torch.full((len(priors),), BACKGROUND, device=boxes.device)
        claims = boxes.new_zeros(self.num_classes, len(priors))
        for first in range(0, len(target), INSTANCES_AT_ONCE):
            own, labels = (x[first : first + INSTANCES_AT_ONCE] for x in (target.boxes.to(boxes.dtype), target.labels))
            middle, half = box_centers(own), (own[:, 2:] - own[:, :2]) * 0.5 * self.scale
            low = torch.maximum((middle - half)[:, None], boxes[:, :2])
            high = torch.minimum((middle + half)[:, None], boxes[:, 2:])
            touches = (high - low).clamp(min=0).prod(dim=2) / area.clamp(min=1e-6) > _LEAST_SHARE  # (G', P)
            fits = touches & (boxes_to_distances(centers, own[:, None]).amin(dim=2) > 0)
            smallest, assigned = _take_smallest(fits, box_area(own), first, smallest, assigned)
            claims = claims.index_add(0, labels, touches.to(claims.dtype))
        if len(target):
            classes = target.labels[assigned.clamp(min=0)]  # (P,)
            claims = claims.scatter_add(0, classes[None], -(assigned >= 0).to(claims.dtype)[None])
            is_contested = claims.gather(0, classes[None])[0] > 0
            assigned = torch.where(is_contested, BACKGROUND, assigned)
        return ignore_invalid(assigned, valid), claims.T > 0
