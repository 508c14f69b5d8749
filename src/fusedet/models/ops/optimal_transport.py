"""OTA's label assignment.

References:
    "OTA: Optimal Transport Assignment for Object Detection", Ge et al., 2021.
    "Sinkhorn Distances: Lightspeed Computation of Optimal Transport", Cuturi, 2013.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedet.errors import InputError
from fusedet.models.ops.assigners import BACKGROUND
from fusedet.models.ops.boxes import aligned_iou, box_centers
from fusedet.models.ops.inside_pairs import central_pairs
from fusedet.models.ops.losses import focal_loss_rows, iou_loss
from fusedet.types import Priors, Target

_LEAST_IOU = torch.finfo(torch.float32).eps  # in the logarithm of the box cost


@dataclass(frozen=True)
class OptimalTransportAssigner:
    """Assignment of a batch's points to instances and the background by optimal transport of labels.

    An instance supplies k labels, the background the remaining ones, and every point demands one label. The cost of a
    label is the focal loss of the point's class scores plus `box_weight` times -log IoU of its predicted box; a
    background label costs the focal loss only (section 3.2). Center prior: only points of a box and less than `radius`
    strides from its center take the box's labels. Dynamic k estimation: k is the sum of the `topk` largest IoUs of
    these points, rounded down, at least 1 (section 3.3). The Sinkhorn-Knopp iteration approximates the transport plan.

    A point belongs to the supplier with the largest share of its label, where the shares of each supplier are divided
    by its largest one, as in the authors' code.

    Args:
        radius: Half side of the center prior, in strides of the point's level.
        topk: IoUs that estimate k, q of the paper.
        box_weight: Weight of the box cost, alpha of the paper.
        regularization: Weight of the plan's entropy, gamma of the paper.
        steps: Iterations of Sinkhorn-Knopp, T of the paper.
        alpha: Weight of the positives in the focal loss.
        gamma: Exponent of the focal loss.

    Raises:
        InputError: An option is out of its range.
    """

    radius: float = 2.5
    topk: int = 20
    box_weight: float = 1.5
    regularization: float = 0.1
    steps: int = 50
    alpha: float = 0.25
    gamma: float = 2.0

    def __post_init__(self) -> None:
        for name in ("radius", "regularization"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)} must be above 0")
        for name in ("topk", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be 1 or more")

    @torch.no_grad()
    def assign_predictions(self, logits: Tensor, boxes: Tensor, priors: Priors, targets: Sequence[Target]) -> Tensor:
        """Assign the points of every image by the head's predictions, synchronizing with a GPU once.

        Args:
            logits: Class logits of every point.
            boxes: Predicted boxes, in pixels.
            priors: P points, centers of the priors.
            targets: Ground truth of every image.

        Shape:
            logits (N, P, K); boxes (N, P, 4); result (N, P) int64, as of `protocols.Assigner`.
        """
        images, count = logits.shape[:2]
        most = max(1, *map(len, targets))
        points = box_centers(priors.boxes)
        pairs = central_pairs(points, self.radius * priors.strides, targets, most)
        place = (pairs.image, pairs.prior)
        ious = aligned_iou(boxes[place], pairs.boxes)
        supply = estimate_supply(ious, pairs.row, images * most, self.topk)  # (N * G,)
        x = logits.float()
        background = ((1 - self.alpha) * x.sigmoid() ** self.gamma * F.softplus(x)).sum(dim=2)  # (N, P)
        cost = focal_loss_rows(logits[place], pairs.labels, self.alpha, self.gamma)
        cost = cost + self.box_weight * iou_loss(boxes[place], pairs.boxes, _LEAST_IOU)
        column = pairs.image * count + pairs.prior
        share, background_share = transport_labels(
            cost / self.regularization, background / self.regularization, pairs.row, column, supply, self.steps
        )
        largest = background_share.flatten().scatter_reduce(0, column, share, "amax")
        winner = torch.where(share == largest[column], pairs.row % most, most)
        assigned = winner.new_full((images * count,), most).scatter_reduce(0, column, winner, "amin")
        return torch.where(assigned < most, assigned, BACKGROUND).view(images, count)


def estimate_supply(ious: Tensor, row: Tensor, rows: int, topk: int) -> Tensor:
    """Estimate the number of labels of every instance: the sum of its `topk` largest IoUs, rounded down, at least 1.

    Shape:
        ious and row (M,), IoU and instance of every pair; result (rows,), 0 for an instance without a pair.
    """
    order = ious.argsort(descending=True)
    order = order[row[order].argsort(stable=True)]  # by row, then by falling IoU
    row = row[order]
    counts = row.new_zeros(rows).index_add(0, row, torch.ones_like(row))
    rank = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    total = ious.new_zeros(rows).index_add(0, row, torch.where(rank < topk, ious[order], 0.0))
    return torch.where(counts > 0, total.floor().clamp(min=1), 0.0)


def transport_labels(
    cost: Tensor, background: Tensor, row: Tensor, column: Tensor, supply: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Transport labels to N times P points by Sinkhorn-Knopp in the logarithmic domain.

    u_i = s_i / sum_j M_ij v_j and v_j = d_j / sum_i M_ij u_i in turn, v first, with M = exp(-cost) and demands d of 1.
    An instance and a point without a pair have the entry 0 in M, where the authors' code adds 1e6 to the cost. The
    background of an image supplies the labels that its instances leave, at least one.

    Args:
        cost: Cost of every pair of an instance and a point, over the regularization.
        background: Cost of a background label at every point, over the regularization.
        row: Instance of every pair; R = N * G, of which image i has those from i * G on.
        column: Point of every pair, N * P.
        supply: Labels of every instance; 0 for one without a pair.
        steps: Number of iterations.

    Returns:
        The logarithms of the plan's entries over the largest entry of their supplier, for pairs and background.

    Shape:
        cost, row and column (M,); background (N, P); supply (R,); result (M,) and (N, P).
    """
    images, count = background.shape
    rest = (count - supply.view(images, -1).sum(dim=1)).clamp(min=1).log()  # (N,)
    supply = supply.clamp(min=1).log()
    u, u_rest = torch.zeros_like(supply), torch.zeros_like(rest)
    v = torch.zeros_like(background).flatten()
    for _ in range(steps):
        entry, entry_rest = u[row] - cost, (u_rest[:, None] - background).flatten()
        peak = entry_rest.scatter_reduce(0, column, entry, "amax")
        total = (entry_rest - peak).exp().index_add(0, column, (entry - peak[column]).exp())
        v = -(peak + total.log())  # (N * P,)
        entry = v[column] - cost
        peak = torch.full_like(supply, -torch.inf).scatter_reduce(0, row, entry, "amax")
        total = torch.zeros_like(supply).index_add(0, row, (entry - peak[row]).exp())
        u = supply - peak - total.log()  # (R,)
        u_rest = rest - (v.view(images, count) - background).logsumexp(dim=1)  # (N,)
    entry, entry_rest = v[column] - cost, v.view(images, count) - background  # u does not change a supplier's shares
    peak = torch.full_like(supply, -torch.inf).scatter_reduce(0, row, entry, "amax")
    return entry - peak[row], entry_rest - entry_rest.amax(dim=1, keepdim=True)
