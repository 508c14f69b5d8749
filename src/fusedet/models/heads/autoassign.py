"""AutoAssign's head, with the semantics of MMDetection 3.x.

References:
    "AutoAssign: Differentiable Label Assignment for Dense Object Detection", Zhu et al., 2020.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from fusedet.models.heads.fcos import FCOSHead
from fusedet.models.heads.scores import scores_with_objectness
from fusedet.models.heads.towers import InteractionFactory, TowerOptions
from fusedet.models.ops.argument_checks import check_loss_weights, check_weight
from fusedet.models.ops.assigners import INSTANCES_AT_ONCE
from fusedet.models.ops.boxes import box_centers
from fusedet.models.ops.inside_pairs import (
    Pairs,
    extremes_of_instance,
    inside_pairs,
    last_of_class,
    offsets_from_centers,
)
from fusedet.models.ops.losses import bounded_log_loss, giou_loss, mean_over_ranks
from fusedet.types import Levels, Losses, Outputs, Priors, Target

BOX_BIAS = 4.0  # initial distance, in strides
SHARPNESS = 3.0  # of the confidence weighting, exp(3 p) in eq. 5
EPS = 1e-12


class AutoAssignHead(FCOSHead):
    """FCOS's head without assignment: every point inside a box is positive and negative with learned weights.

    The center prior, a Gaussian per class around the box's center, has its mean and width as parameters. The centerness
    map is the implicit objectness, predicted in the box tower.

    Args:
        levels: As in `FCOSHead`.
        num_classes: As in `FCOSHead`.
        interact: As in `FCOSHead`.
        positive_weight: Weight of the positive loss.
        negative_weight: Weight of the negative loss.
        center_weight: Weight of the center prior's loss.
        box_weight: Weight of the GIoU loss within a location's likelihood.
        prior: Initial score of every point.
        **towers: As in `FCOSHead`.

    Raises:
        InputError: An option is out of its range.
    """

    def __init__(
        self,
        levels: Levels,
        num_classes: int,
        interact: InteractionFactory | None = None,
        positive_weight: float = 0.25,
        negative_weight: float = 0.75,
        center_weight: float = 0.75,
        box_weight: float = 5.0,
        prior: float = 0.02,
        **towers: Unpack[TowerOptions],
    ) -> None:
        super().__init__(
            levels,
            num_classes,
            interact,
            normalize_boxes=True,
            centerness_on_box=True,
            prior=prior,
            offset=0.0,  # as in MMDetection
            **towers,
        )
        check_weight("box_weight", box_weight)
        self.box_weight = box_weight
        self.loss_weights = {
            "loss_positive": positive_weight,
            "loss_negative": negative_weight,
            "loss_center": center_weight,
        }
        check_loss_weights(self.loss_weights)
        self.center = nn.Parameter(torch.zeros(num_classes, 2))  # mu and sigma of eq. 8, in strides
        self.width = nn.Parameter(torch.ones(num_classes, 2))
        nn.init.constant_(self.reg.bias, BOX_BIAS)  # type: ignore[arg-type]

    def loss(self, outputs: Outputs, targets: Sequence[Target], sizes: Tensor | None = None) -> Losses:
        """Compute the positive and the negative loss (eq. 7), and the loss that keeps the center prior wide.

        The positive loss is divided by the number of instances, the negative one by the sum of the center prior, that
        of the center prior by the number of images. `sizes` is unused: points beyond an image's edge count, as in
        MMDetection 3.x.
        """
        priors, images = outputs.priors, len(targets)
        most = max(map(len, targets))
        scores = scores_with_objectness(outputs, self.num_classes)  # (N, P, K)
        points, predicted = box_centers(priors.boxes), self.decode_all(outputs)  # (P, 2), (N, P, 4)
        pairs = inside_pairs(points, targets, most)
        place = (pairs.image, pairs.prior)
        weights = self._center_prior(pairs, points, priors)  # (M,)
        likelihood = (
            scores[(*place, pairs.labels)] * (-self.box_weight * giou_loss(predicted[place], pairs.boxes)).exp()
        )
        mass = (SHARPNESS * likelihood).exp() * weights
        zeros = mass.new_zeros(images * most)
        total = zeros.index_add(0, pairs.row, mass).clamp(min=EPS)[pairs.row]
        mean = zeros.index_add(0, pairs.row, likelihood * mass / total)  # (N * G,)
        real = torch.cat([torch.arange(most, device=points.device) < len(t) for t in targets])
        positive = torch.where(real, bounded_log_loss(mean), 0.0).sum()
        factors = self._negative_factors(predicted.detach(), pairs, targets, scores.shape, len(zeros))
        p = scores * factors
        negative = (p.square() * bounded_log_loss(1 - p)).sum()
        sums = weights.new_zeros(images).index_add(0, pairs.image, weights)  # (N,)
        counts = torch.stack([sums.new_full((), len(t)) for t in targets])
        has_pairs = torch.zeros_like(sums).index_add(0, pairs.image, torch.ones_like(weights)) > 0
        center = torch.where(has_pairs, counts / sums.clamp(min=EPS), 0.0).mean()
        instances, prior_sum = mean_over_ranks(torch.stack([counts.sum(), sums.sum()]))
        return {"loss_positive": positive / instances, "loss_negative": negative / prior_sum, "loss_center": center}

    def _center_prior(self, pairs: Pairs, points: Tensor, priors: Priors) -> Tensor:
        """Compute the Gaussian weights (M,) of the pairs' points (eq. 8)."""
        away = offsets_from_centers(pairs, points, priors.strides)
        square = (away - self.center[pairs.labels].float()).square()
        return (-square / (2 * self.width[pairs.labels].float().square())).exp().prod(dim=1)

    @torch.no_grad()
    def _negative_factors(
        self, predicted: Tensor, pairs: Pairs, targets: Sequence[Target], shape: torch.Size, rows: int
    ) -> Tensor:
        """Compute the factors (N, P, K) of the scores in the negative loss (eq. 6).

        It is 1 except inside boxes, where it falls with the IoU of the predicted box, at best with any instance of the
        image: 1 / (1 - IoU), stretched to 0..1 over the instance's points, is subtracted. Of several instances of one
        class at a point the last one counts.
        """
        best = torch.stack([_largest_iou(boxes, target) for boxes, target in zip(predicted, targets)])  # (N, P)
        fit = 1 / (1 - best[pairs.image, pairs.prior]).clamp(min=EPS)  # (M,)
        low, high = extremes_of_instance(pairs, fit, rows)
        fit = (fit - low + EPS) / (high - low + EPS)
        return last_of_class(pairs, 1 - fit, 1.0, shape)


def _largest_iou(predicted: Tensor, target: Target) -> Tensor:
    """Compute the largest IoU (P,) of predicted boxes (P, 4) with an instance."""
    best = predicted.new_zeros(len(predicted))
    for boxes in target.boxes.to(predicted.dtype).split(INSTANCES_AT_ONCE):
        best = torch.maximum(best, box_iou(predicted, boxes).nan_to_num().amax(dim=1)) if len(boxes) else best
    return best
