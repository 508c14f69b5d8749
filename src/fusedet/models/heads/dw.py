"""DW's head.

References:
    "A Dual Weighting Label Assignment Scheme for Object Detection", Li et al., 2022.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from fusedet.models.heads.fcos import FCOSHead
from fusedet.models.heads.scores import scores_with_objectness
from fusedet.models.heads.towers import InteractionFactory, TowerOptions
from fusedet.models.ops.argument_checks import check_loss_weights, check_weight
from fusedet.models.ops.boxes import box_centers
from fusedet.models.ops.cells import boxes_around_cells, cell_positions, sample_sides
from fusedet.models.ops.dual_weighting import DualWeighting, Weighting
from fusedet.models.ops.inside_pairs import inside_pairs, last_of_class, offsets_from_centers
from fusedet.models.ops.layers import conv, init_normal
from fusedet.models.ops.losses import bounded_log_loss, giou_loss, mean_over_ranks
from fusedet.types import Candidates, Levels, Losses, Outputs, Target

BOX_BIAS = 4.0  # initial distance, in strides


class DWHead(FCOSHead):
    """FCOS's head whose points inside a box have a positive and a negative weight, and a refinement of the boxes.

    The map "centerness" is the authors' objectness, predicted in the box tower: the score s of a class is the product
    of both sigmoids. `dw_r50` has 32,090,466 trainable parameters with 80 classes: those of FCOS, and 18,440 of the
    convolution that predicts the offsets of the refinement.

    Args:
        levels: As in `FCOSHead`.
        num_classes: As in `FCOSHead`.
        interact: As in `FCOSHead`.
        refine: Refine the boxes (section 3.4).
        weighting: As in `DualWeighting`.
        beta: As in `DualWeighting`.
        mu: As in `DualWeighting`.
        gamma_iou: `gamma` of `DualWeighting` (gamma_1).
        gamma_score: Exponent of the score in the importance of a negative (gamma_2).
        sigma: As in `DualWeighting`.
        positive_weight: Weight of the positive classification loss.
        negative_weight: Weight of the negative classification loss.
        box_weight: Weight of the box loss.
        prior: Initial class score of every point.
        **towers: As in `FCOSHead`.

    Raises:
        InputError: An option is unknown or out of its range.
    """

    def __init__(
        self,
        levels: Levels,
        num_classes: int,
        interact: InteractionFactory | None = None,
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
        **towers: Unpack[TowerOptions],
    ) -> None:
        super().__init__(
            levels, num_classes, interact, normalize_boxes=True, centerness_on_box=True, prior=prior, **towers
        )
        check_weight("gamma_score", gamma_score)
        self.dual_weighting = DualWeighting(weighting, beta, mu, gamma_iou, sigma)
        self.gamma_score = gamma_score
        self.loss_weights = {
            "loss_positive": positive_weight,
            "loss_negative": negative_weight,
            "loss_box": box_weight,
        }
        check_loss_weights(self.loss_weights)
        nn.init.constant_(self.reg.bias, BOX_BIAS)  # type: ignore[arg-type]
        self.refine = conv(self.reg.in_channels, 8, 3) if refine else None
        if self.refine is not None:
            init_normal(self.refine)

    def predict_level(self, cls: Tensor, box: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """Compute the maps of a level as `FCOSHead` does, with refined distances "reg" where the head refines."""
        maps = super().predict_level(cls, box, scale)
        if self.refine is not None:
            maps["reg"] = refine_distances(maps["reg"], self.refine(box).float())
        return maps

    def loss(self, outputs: Outputs, targets: Sequence[Target], sizes: Tensor | None = None) -> Losses:
        """Compute the positive and the negative classification loss and the GIoU loss (section 3.5).

        Points inside a box are its candidates. w_pos of `DualWeighting` weights -log s and the GIoU loss. P_neg times
        the importance s^gamma_2 weights -log(1 - s) (section 3.3). Of several instances of one class at a point the
        last one counts. All other points and classes have P_neg = 1, which makes it their focal loss.

        Positive terms are divided by the number of instances, the negative one by the sum of 1 - P_neg, both at
        least 1. `sizes` is unused: points beyond an image's edge count as background.
        """
        priors, most = outputs.priors, max(map(len, targets))
        scores = scores_with_objectness(outputs, self.num_classes)  # (N, P, K)
        points = box_centers(priors.boxes)
        pairs = inside_pairs(points, targets, most)
        place = (pairs.image, pairs.prior)
        predicted, score = self.decode_all(outputs)[place], scores[(*place, pairs.labels)]  # (M, 4), (M,)
        away = offsets_from_centers(pairs, points, priors.strides)
        box_losses = giou_loss(predicted, pairs.boxes)
        weights, probability = self.dual_weighting.weigh(
            pairs, max(1, len(targets) * most), score, predicted, box_losses, away
        )
        factors = last_of_class(pairs, probability, 1.0, scores.shape)  # (N, P, K)
        negative = (factors * scores**self.gamma_score * bounded_log_loss(1 - scores)).sum()
        counts = torch.stack([(1 - factors).sum(), factors.new_full((), sum(map(len, targets)))])
        discount, instances = mean_over_ranks(counts)
        return {
            "loss_positive": (weights * bounded_log_loss(score)).sum() / instances,
            "loss_negative": negative / discount,
            "loss_box": (weights * box_losses).sum() / instances,
        }

    def decode(self, outputs: Outputs) -> Candidates:
        """Decode boxes (N, P, 4) and scores (N, P, K), class scores times objectness."""
        return Candidates(self.decode_all(outputs), scores_with_objectness(outputs, self.num_classes))


def refine_distances(distances: Tensor, offsets: Tensor) -> Tensor:
    """Take every side of a box from the box predicted at a point near that side (section 3.4).

    The point of a side is the foot of the cell on the side, moved by the side's offset. Its box is interpolated between
    four cells; outside the map the nearest cell counts.

    Shape:
        distances (N, 4, H, W) to the left, upper, right and lower side, in cells; offsets (N, 8, H, W), in cells, a
        pair (dy, dx) for each side; result (N, 4, H, W), 0 or more.
    """
    left, top, right, bottom = distances.unbind(dim=1)
    zero = torch.zeros_like(left)
    feet = torch.stack([zero, -left, -top, zero, zero, right, bottom, zero], dim=1)
    sides = sample_sides(boxes_around_cells(distances), feet + offsets, padding="border")
    cells = cell_positions(distances)
    return torch.cat([cells - sides[:, :2], sides[:, 2:] - cells], dim=1).relu()
