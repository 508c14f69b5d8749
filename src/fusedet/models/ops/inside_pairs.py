"""The pairs of an instance and a point inside its box, which AutoAssign, DW and OTA weigh.

Every function synchronizes with a GPU once.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedet.models.ops.assigners import INSIDE, INSTANCES_AT_ONCE, gather_instances
from fusedet.models.ops.boxes import box_centers, boxes_to_distances
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
    """Collect the pairs of instances, at most `most` of an image, and points (P, 2) inside their boxes."""
    return _collect(points, targets, most, lambda boxes: boxes_to_distances(points, boxes[:, None]).amin(dim=2) > 0)


def central_pairs(points: Tensor, reach: Tensor, targets: Sequence[Target], most: int) -> Pairs:
    """Collect the pairs of instances and points (P, 2) that are inside the box and near its center.

    A point lies more than 0.01 pixel inside the box, and less than its `reach` (P,), in pixels, from the box's center
    along x and y. An instance without such a point, as one that lies between the points, has all points near its
    center.
    """

    def choose(boxes: Tensor) -> Tensor:
        near = (points - box_centers(boxes)[:, None]).abs().amax(dim=2) < reach
        central = near & (boxes_to_distances(points, boxes[:, None]).amin(dim=2) > INSIDE)
        return torch.where(central.any(dim=1, keepdim=True), central, near)

    return _collect(points, targets, most, choose)


def _collect(points: Tensor, targets: Sequence[Target], most: int, choose: Callable[[Tensor], Tensor]) -> Pairs:
    """Collect the pairs that `choose` marks (G, P) for boxes (G, 4)."""
    chosen = torch.zeros(len(targets), most, len(points), dtype=torch.bool, device=points.device)
    for i, target in enumerate(targets):
        for first in range(0, len(target), INSTANCES_AT_ONCE):
            boxes = target.boxes[first : first + INSTANCES_AT_ONCE].to(points.dtype)
            chosen[i, first : first + len(boxes)] = choose(boxes)
    image, instance, prior = chosen.nonzero(as_tuple=True)
    return Pairs(image, prior, image * most + instance, *gather_instances(targets, image, instance))


def last_of_class(pairs: Pairs, values: Tensor, outside: float, shape: torch.Size) -> Tensor:
    """Scatter values of pairs to their images, points and classes; `outside` elsewhere.

    Of several instances of one class at a point the last one counts.

    Shape:
        values (M,); result (N, P, K).
    """
    _, count, classes = shape
    entry = (pairs.image * count + pairs.prior) * classes + pairs.labels
    order = torch.arange(len(entry), device=entry.device)
    last = order.new_full((shape.numel(),), -1).scatter_reduce(0, entry, order, "amax")
    table = values.new_full((shape.numel(),), outside)
    return table.index_copy(0, entry, values[last[entry]]).view(shape)


def offsets_from_centers(pairs: Pairs, points: Tensor, strides: Tensor) -> Tensor:
    """Compute the vectors (M, 2), in strides, from the center of each pair's box to its point.

    Shape:
        points (P, 2); strides (P,).
    """
    return (points[pairs.prior] - box_centers(pairs.boxes)) / strides[pairs.prior, None]


def extremes_of_instance(pairs: Pairs, values: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return the least and the largest value (M,) of each pair's instance, of values (M,) and `rows` instances."""
    low, high = (
        values.new_full((rows,), start).scatter_reduce(0, pairs.row, values, reduce)[pairs.row]
        for start, reduce in ((torch.inf, "amin"), (-torch.inf, "amax"))
    )
    return low, high
