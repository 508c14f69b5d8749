"""DW's head.

References:
    "A Dual Weighting Label Assignment Scheme for Object Detection", Li et al., 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fusedet.errors import InputError, one_of
from fusedet.models.heads.argument_checks import check_length, check_weight
from fusedet.models.heads.fcos import FCOSHead, scores_with_objectness
from fusedet.models.heads.task_decomposition import sample_sides
from fusedet.models.heads.towers import InteractionFactory
from fusedet.models.ops.boxes import aligned_iou, box_centres, distances_to_boxes
from fusedet.models.ops.inside_pairs import (
    Pairs,
    extremes_of_instance,
    inside_pairs,
    last_of_class,
    offsets_from_centres,
)
from fusedet.models.ops.layers import conv, flatten_maps
from fusedet.models.ops.losses import bounded_log_loss, giou_loss, mean_over_ranks
from fusedet.types import Candidates, Levels, Losses, Outputs, Priors, Target

BOX_BIAS = 4.0  # initial distance, in strides
LOW_IOU, HIGH_IOU = 0.5, 0.95  # where P_neg leaves 1 and reaches 0 (section 3.3)
CODE_SHARPNESS = 3.0  # of the exponential in the divisor of the authors' code
EPS = 1e-12

Weighting = Literal["paper", "code"]


class DWHead(FCOSHead):
    """FCOS's head whose points inside a box have a positive and a negative weight, and a refinement of the boxes.

    The map "centerness" is the authors' objectness, predicted in the box tower: the score s of a class is the product
    of both sigmoids. `dw_r50` has 32,090,466 trainable parameters with 80 classes: those of FCOS, and 18,440 of the
    convolution that predicts the offsets of the refinement.

    Args:
        levels: As in `FCOSHead`.
        num_classes: As in `FCOSHead`.
        interact: As in `FCOSHead`.
        convs: As in `FCOSHead`.
        channels: As in `FCOSHead`.
        norm: As in `FCOSHead`.
        bias: As in `FCOSHead`.
        refine: Refine the boxes (section 3.4).
        weighting: "paper", sections 3.2 and 3.3, or "code", the three differences of the authors' code (see `loss`).
        beta: Exponent of the IoU in the consistency t of score and box.
        mu: Sharpness of the positive weight.
        gamma_iou: Exponent of the IoU in the probability of a negative (gamma_1).
        gamma_score: Exponent of the score in the importance of a negative (gamma_2).
        sigma: Standard deviation of the center prior, in strides.
        positive_weight: Weight of the positive classification loss.
        negative_weight: Weight of the negative classification loss.
        box_weight: Weight of the box loss.
        prior: Initial class score of every point.

    Raises:
        InputError: An option is unknown or out of its range.
    """

    def __init__(
        self,
        levels: Levels,
        num_classes: int,
        interact: InteractionFactory | None = None,
        convs: int = 4,
        channels: int | None = None,
        norm: bool = True,
        bias: bool = True,
        refine: bool = True,
        weighting: Weighting = "paper",
        beta: float = 5.0,
        mu: float = 5.0,
        gamma_iou: float = 2.0,
        gamma_score: float = 2.0,
        sigma: float = 1.11,
        positive_weight: float = 0.25,
        negative_weight: float = 1.0,
        box_weight: float = 1.25,
        prior: float = 0.02,
    ) -> None:
        super().__init__(
            levels,
            num_classes,
            interact,
            convs=convs,
            channels=channels,
            norm=norm,
            bias=bias,
            normalize_boxes=True,
            centerness_on_box=True,
            prior=prior,
        )
        one_of("weighting", weighting, Weighting)
        check_length("sigma", sigma)
        for name, value in (("beta", beta), ("mu", mu), ("gamma_score", gamma_score)):
            check_weight(name, value)
        if not gamma_iou > 0:
            raise InputError(f"gamma_iou={gamma_iou} must be above 0")
        self.weighting, self.sigma = weighting, sigma
        self.beta, self.mu, self.gamma_iou, self.gamma_score = beta, mu, gamma_iou, gamma_score
        self.loss_weights = {
            "loss_positive": positive_weight,
            "loss_negative": negative_weight,
            "loss_box": box_weight,
        }
        for name, weight in self.loss_weights.items():
            check_weight(name.replace("loss_", "") + "_weight", weight)
        nn.init.constant_(self.reg.bias, BOX_BIAS)  # type: ignore[arg-type]
        self.refine = conv(self.reg.in_channels, 8, 3) if refine else None
        if self.refine is not None:
            nn.init.normal_(self.refine.weight, std=0.01)
            nn.init.zeros_(self.refine.bias)  # type: ignore[arg-type]

    def predict_level(self, cls: Tensor, box: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """Compute the maps of a level as `FCOSHead` does, with refined distances "reg" where the head refines."""
        maps = super().predict_level(cls, box, scale)
        if self.refine is not None:
            maps["reg"] = refine_distances(maps["reg"], self.refine(box).float())
        return maps

    def loss(self, outputs: Outputs, targets: Sequence[Target], sizes: Tensor | None = None) -> Losses:
        """Compute the positive and the negative classification loss and the GIoU loss (section 3.5).

        Points inside a box are its candidates. With s the score of the instance's class:

        - t = s * IoU^beta, and w_pos = e^(mu t) * t times the center prior, a Gaussian of the distance from the box's
          centre, over its sum over the candidates (section 3.2). It weights -log s and the GIoU loss.
        - w_neg = P_neg * I_neg weights -log(1 - s). P_neg = b - k * IoU^gamma_1 falls from 1 at an IoU of 0.5 to 0 at
          0.95, and I_neg = s^gamma_2 (section 3.3). Of several instances of one class at a point the last one counts.
          All other points and classes have P_neg = 1, which makes it their focal loss.

        In the authors' code ("code") exp(-beta * GIoU loss) stands for IoU^beta, the sum that divides w_pos has an
        exponential of 3 t, and P_neg reaches 0 at the instance's largest IoU, and 1 at its least one if above 0.5.

        w_pos and P_neg have no gradient. Positive terms are divided by the number of instances, the negative one by the
        sum of 1 - P_neg, both at least 1. `sizes` is unused: points beyond an image's edge count as background.
        """
        priors, most = outputs.priors, max(map(len, targets))
        scores = scores_with_objectness(outputs, self.num_classes)  # (N, P, K)
        points = box_centres(priors.boxes)
        distances = flatten_maps(outputs.maps["reg"], 4) * priors.strides[:, None]
        pairs = inside_pairs(points, targets, most)
        place = (pairs.image, pairs.prior)
        predicted = distances_to_boxes(points[pairs.prior], distances[place])  # (M, 4)
        box_losses = giou_loss(predicted, pairs.boxes)
        iou = aligned_iou(predicted.detach(), pairs.boxes)
        score = scores[(*place, pairs.labels)]
        zeros = iou.new_zeros(max(1, len(targets) * most))
        weights = self._positive_weights(
            score, iou, box_losses, self._center_prior(pairs, points, priors), pairs, zeros
        )
        factors = last_of_class(pairs, self._negative_probability(iou, pairs, zeros), 1.0, scores.shape)
        negative = (factors * scores**self.gamma_score * bounded_log_loss(1 - scores)).sum()
        counts = torch.stack([(1 - factors).sum(), factors.new_full((), sum(map(len, targets)))])
        discount, instances = mean_over_ranks(counts)
        return {
            "loss_positive": (weights * bounded_log_loss(score)).sum() / instances,
            "loss_negative": negative / discount,
            "loss_box": (weights * box_losses).sum() / instances,
        }

    def _center_prior(self, pairs: Pairs, points: Tensor, priors: Priors) -> Tensor:
        """Compute the Gaussian (M,) of the pairs' distances from the centre."""
        away = offsets_from_centres(pairs, points, priors.strides)
        return (-away.square().sum(dim=1) / (2 * self.sigma**2)).exp()

    def _positive_weights(
        self, score: Tensor, iou: Tensor, box_losses: Tensor, center: Tensor, pairs: Pairs, zeros: Tensor
    ) -> Tensor:
        """Compute w_pos (M,), without gradient; zeros (R,)."""
        location = (-self.beta * box_losses).exp() if self.weighting == "code" else iou**self.beta
        t = score * location
        mass = t * center
        sharpness = CODE_SHARPNESS if self.weighting == "code" else self.mu
        total = zeros.index_add(0, pairs.row, ((sharpness * t).exp() * mass).detach())
        total = total.clamp(min=torch.finfo(total.dtype).tiny)
        return ((self.mu * t).exp() * mass / total[pairs.row]).detach()

    def _negative_probability(self, iou: Tensor, pairs: Pairs, zeros: Tensor) -> Tensor:
        """Compute P_neg (M,)."""
        falling = -(iou**self.gamma_iou)
        if self.weighting == "paper":
            low, high = -(HIGH_IOU**self.gamma_iou), -(LOW_IOU**self.gamma_iou)
            return ((falling - low) / (high - low)).clamp(0, 1)
        low, high = extremes_of_instance(pairs, falling, len(zeros))
        high = high.clamp(max=-(LOW_IOU**self.gamma_iou))
        return torch.where(iou < LOW_IOU, 1.0, (falling - low + EPS) / (high - low + EPS))

    def decode(self, outputs: Outputs) -> Candidates:
        """Decode boxes (N, P, 4) and scores (N, P, K), class scores times objectness."""
        return Candidates(super().decode(outputs).boxes, scores_with_objectness(outputs, self.num_classes))


def refine_distances(distances: Tensor, offsets: Tensor) -> Tensor:
    """Take every side of a box from the box predicted at a point near that side (section 3.4).

    The point of a side is the foot of the cell on the side, moved by the side's offset. Its box is interpolated between
    four cells; outside the map the nearest cell counts.

    Shape:
        distances (N, 4, H, W) to the left, upper, right and lower side, in cells; offsets (N, 8, H, W), in cells, a
        pair (dy, dx) for each side; result (N, 4, H, W), 0 or more.
    """
    height, width = distances.shape[2:]
    left, top, right, bottom = distances.unbind(dim=1)
    zero = torch.zeros_like(left)
    feet = torch.stack([zero, -left, -top, zero, zero, right, bottom, zero], dim=1)
    y, x = (torch.arange(n, device=distances.device, dtype=distances.dtype) for n in (height, width))
    cells = torch.stack(torch.broadcast_tensors(x, y[:, None]))  # (2, H, W)
    low, high = distances.split(2, dim=1)
    sides = sample_sides(torch.cat([cells - low, cells + high], dim=1), feet + offsets, padding="border")
    low, high = sides.split(2, dim=1)
    return torch.cat([cells - low, high - cells], dim=1).relu()
