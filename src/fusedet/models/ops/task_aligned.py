"""TOOD's label assignment.

References:
    "TOOD: Task-aligned One-stage Object Detection", Feng et al., 2021, section 3.2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedet.errors import InputError
from fusedet.models.ops.assigners import INSIDE, INSTANCES_AT_ONCE, resolve_claims
from fusedet.models.ops.boxes import aligned_iou, box_centers, boxes_to_distances
from fusedet.types import Priors, Target

_LEAST_METRIC = 1e-7  # added to an instance's largest metric before the division


@dataclass(frozen=True)
class TaskAlignedAssigner:
    """Assignment by how well a prior's score and box agree with an instance (details as in MMDetection 3.x).

    The alignment metric of a prior and an instance is score^alpha * IoU^beta, of the predicted score of the instance's
    class and the predicted box (eq. 2). An instance claims the `topk` priors of the largest metrics of all levels whose
    metric is above 0 and whose centers lie inside its box. A prior that several instances claim takes the one with the
    largest IoU, the first of equal ones. All others are background.

    Args:
        topk: Candidates per instance, m of the paper.
        alpha: Exponent of the score.
        beta: Exponent of the IoU.

    Raises:
        InputError: An option is out of its range.
    """

    topk: int = 13
    alpha: float = 1.0
    beta: float = 6.0

    def __post_init__(self) -> None:
        if self.topk < 1 or not 0 <= self.alpha < math.inf or not 0 <= self.beta < math.inf:
            raise InputError(
                f"topk={self.topk}, alpha={self.alpha}, beta={self.beta}: topk must be 1 or more, the exponents 0 or "
                "more"
            )

    @torch.no_grad()
    def assign_predictions(
        self, scores: Tensor, boxes: Tensor, priors: Priors, targets: Sequence[Target], valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Assign the priors of every image by the head's predictions.

        Args:
            scores: Predicted scores.
            boxes: Predicted boxes.
            priors: P priors of all levels.
            targets: Ground truth of every image.
            valid: Which priors take part; the others are ignored.

        Returns:
            The assignment, as of `protocols.Assigner`, and every positive's target score: its metric over the
            instance's largest, times the instance's largest IoU (eq. 3).

        Shape:
            scores (N, P, K); boxes (N, P, 4); valid (N, P) bool; result: (N, P) int64 and (N, P) float.
        """
        images = zip(scores, boxes, targets, valid, strict=True)
        assigned, quality = zip(*(self._assign_image(s, b, priors, t, v) for s, b, t, v in images))
        return torch.stack(assigned), torch.stack(quality)

    def _assign_image(
        self, scores: Tensor, boxes: Tensor, priors: Priors, target: Target, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Assign the priors of an image: assignment and target scores (P,)."""
        scores, boxes = (x.masked_fill(~valid[:, None], 0) for x in (scores, boxes))  # an empty box has IoU 0
        instances = target.boxes.to(boxes.dtype)
        k = min(self.topk, len(priors))
        parts = [
            self._claims(scores, boxes, priors, labels, own, k)
            for own, labels in zip(instances.split(INSTANCES_AT_ONCE), target.labels.split(INSTANCES_AT_ONCE))
        ]
        if not len(instances):
            parts = [(boxes.new_zeros(0, k), boxes.new_zeros(0, k), target.labels.new_zeros(0, k))]
        metrics, ious, indices = (torch.cat(column) for column in zip(*parts))  # (G, k)
        assigned = resolve_claims(torch.where(metrics > 0, -ious, math.inf), indices, len(priors), valid)
        own = (assigned[indices] == torch.arange(len(metrics), device=indices.device)[:, None]) & (metrics > 0)
        largest, best_iou = ((x * own).amax(dim=1, keepdim=True) for x in (metrics, ious))  # (G, 1)
        quality = torch.where(own, metrics / (largest + _LEAST_METRIC) * best_iou, 0.0)
        return assigned, metrics.new_zeros(len(priors)).scatter_add(0, indices.flatten(), quality.flatten())

    def _claims(
        self, scores: Tensor, boxes: Tensor, priors: Priors, labels: Tensor, instances: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return metrics, 0 for centers outside, IoUs, and priors (G, k) of the instances' candidates."""
        ious = aligned_iou(boxes, instances[:, None])  # (G, P)
        metrics, indices = (scores.mT[labels] ** self.alpha * ious**self.beta).topk(k, dim=1)
        points = box_centers(priors.boxes)[indices]  # (G, k, 2)
        inside = boxes_to_distances(points, instances[:, None]).amin(dim=2) > INSIDE
        return metrics * inside, ious.gather(1, indices), indices
