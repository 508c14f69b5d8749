"""The pairs of an instance and a point inside its box, which AutoAssign weighs instead of an assignment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedet.models.ops.assigners import INSTANCES_AT_ONCE, gather_instances
from fusedet.models.ops.boxes import boxes_to_distances
from fusedet.types import Target


class Pairs(NamedTuple):
    """The M pairs of an instance and a point inside its box, ordered by image, instance and point.

    Attributes:
        image: (M,) index of the image.
        prior: (M,) index of the point.
        row: (M,) index of the instance in the batch, of R rows.
        boxes: (M, 4) ground-truth box.
        labels: (M,) ground-truth class.
    """

    image: Tensor
    prior: Tensor
    row: Tensor
    boxes: Tensor
    labels: Tensor


def inside_pairs(points: Tensor, targets: Sequence[Target], most: int) -> Pairs:
    """Collect the pairs of instances and points (P, 2) inside their boxes; a GPU is waited for once."""
    inside = torch.zeros(len(targets), most, len(points), dtype=torch.bool, device=points.device)
    for i, target in enumerate(targets):
        for first in range(0, len(target), INSTANCES_AT_ONCE):
            boxes = target.boxes[first : first + INSTANCES_AT_ONCE].to(points.dtype)
            own = boxes_to_distances(points, boxes[:, None]).amin(dim=2) > 0  # (G', P)
            inside[i, first : first + len(boxes)] = own
    image, instance, prior = inside.nonzero(as_tuple=True)
    return Pairs(image, prior, image * most + instance, *gather_instances(targets, image, instance))
