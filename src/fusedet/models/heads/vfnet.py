"""VFNet's head, with the semantics of MMDetection 3.x.

References:
    "VarifocalNet: An IoU-aware Dense Object Detector", Zhang et al., 2021.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError, require_choice
from fusedet.models.heads.scores import class_scores
from fusedet.models.heads.towers import InteractionFactory, TwinTowers, make_tower
from fusedet.models.ops.argument_checks import check_focal, check_loss_weights
from fusedet.models.ops.assigners import assign_batch, gather_positives, valid_prior_mask
from fusedet.models.ops.atss import ATSSAssigner
from fusedet.models.ops.boxes import aligned_iou, box_centers, distances_to_boxes, grid_priors, make_level_points
from fusedet.models.ops.deformable import DeformConv
from fusedet.models.ops.layers import conv, flatten_maps, init_normal, init_prior_bias
from fusedet.models.ops.losses import giou_loss, mean_over_ranks
from fusedet.models.ops.quality_losses import varifocal_loss
from fusedet.types import Candidates, Features, Levels, Losses, Outputs, Target

PRIOR_SCALE = 8.0  # side of the square priors that ATSS compares with instances, in strides (ATSS, 2020)
BOX_UNITS = {"reg_denom": 8.0, "stride": 1.0}  # of the initial distances, in strides
MIN_IOU = 1e-6  # a positive's target of 0 would make it a negative

BoxNorm = Literal["reg_denom", "stride"]


class VFNetHead(nn.Module):
    """Two towers, an initial box per cell, then a refined box and IoU-aware class logits from the box's star points.

    Args:
        levels: Levels of the pyramid.
        num_classes: K.
        interact: Makes the interaction between the branches; None for no interaction. The initial
            box too is predicted from its outputs.
        convs: Number of convolutions in each tower.
        channels: Channels of the towers; those of the pyramid by default.
        bias: Give the towers' convolutions a bias.
        norm: Use GroupNorm(32) in the towers.
        deformable_last: Make each tower's last convolution deformable and modulated (MMDetection's dcn_on_last_conv).
        gradient_mul: Share of the star points' gradient that reaches the initial box.
        topk: Candidates per level of ATSS.
        box_norm: Unit of the initial distances: "reg_denom", 8 strides (64 to 1024 pixels for P3 to P7), or "stride".
        alpha: Weight of the negatives in the varifocal loss (eq. 2).
        gamma: Exponent of the varifocal loss.
        box_weight: Weight of the initial boxes' loss, lambda_0 of the paper.
        refine_weight: Weight of the refined boxes' loss, lambda_1 of the paper.
        prior: Initial score of every cell.

    Raises:
        InputError: `deformable_last` is set without convolutions, or an option is unknown or out of its range.
    """

    star_base: Tensor
    shapes: Tensor

    def __init__(
        self,
        levels: Levels,
        num_classes: int,
        interact: InteractionFactory | None = None,
        convs: int = 3,
        channels: int | None = None,
        bias: bool = False,
        norm: bool = True,
        deformable_last: bool = False,
        gradient_mul: float = 0.1,
        topk: int = 9,
        box_norm: BoxNorm = "reg_denom",
        alpha: float = 0.75,
        gamma: float = 2.0,
        box_weight: float = 1.5,
        refine_weight: float = 2.0,
        prior: float = 0.01,
    ) -> None:
        super().__init__()
        require_choice("box_norm", box_norm, BoxNorm)
        check_focal(alpha, gamma, prior)
        if not 0 <= gradient_mul <= 1:
            raise InputError(f"gradient_mul={gradient_mul} must be 0 to 1")
        channels = levels.channels[0] if channels is None else channels
        self.levels, self.num_classes, self.alpha, self.gamma = levels, num_classes, alpha, gamma
        self.gradient_mul, self.unit = gradient_mul, BOX_UNITS[box_norm]
        self.loss_weights = {"loss_cls": 1.0, "loss_box": box_weight, "loss_refine": refine_weight}
        check_loss_weights(self.loss_weights)
        self.assigner = ATSSAssigner(topk)
        self.register_buffer("shapes", make_level_points(levels, PRIOR_SCALE), persistent=False)
        steps = torch.arange(-1.0, 2.0)
        star_base = torch.cartesian_prod(steps, steps).view(1, 18, 1, 1)  # (dy, dx) pairs
        self.register_buffer("star_base", star_base, persistent=False)

        self.towers = TwinTowers(levels.channels[0], channels, convs, norm, interact, bias, deformable_last)
        self.reg_conv = make_tower(channels, channels, 1, norm, bias)
        self.reg = conv(channels, 4, 3)
        self.scales = nn.Parameter(torch.ones(len(levels)))
        self.refine_star = DeformConv(channels, channels)
        self.refine = conv(channels, 4, 3)
        self.scales_refine = nn.Parameter(torch.ones(len(levels)))
        self.cls_star = DeformConv(channels, channels)
        self.cls = conv(channels, num_classes, 3)
        init_normal(self)
        init_prior_bias(self.cls.bias, prior)

    def forward(self, features: Features) -> Outputs:
        """Compute the maps "cls", logits, and "reg" and "refine", distances to the initial and to the refined box.

        Shape:
            features: levels (N, C, H, W); per level cls (N, K, H, W), and reg and refine (N, 4, H, W), float32, pixels
            to the left, upper, right and lower side.
        """
        levels = [self._forward_level(feature, i) for i, feature in enumerate(features)]
        maps = {name: list(column) for name, column in zip(("cls", "reg", "refine"), zip(*levels))}
        return Outputs(maps, grid_priors(features, self.levels, self.shapes))

    def _forward_level(self, feature: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        stride = self.levels.strides[level]
        cls, reg = self.towers(feature)
        # exp in float32: half precision overflows at 11
        box = (self.reg(self.reg_conv(reg)) * self.scales[level]).float().exp() * (self.unit * stride)  # (N, 4, H, W)
        offset = self.star_offsets(box, stride)
        factor = self.refine(F.relu(self.refine_star(reg, offset))) * self.scales_refine[level]
        logits = self.cls(F.relu(self.cls_star(cls, offset)))
        return logits, box, factor.float().exp() * box.detach()

    def star_offsets(self, box: Tensor, stride: int) -> Tensor:
        """Compute the offsets that move a 3x3 convolution's sampling points to the star points.

        The star points are the box's corners, the points of its sides nearest to the cell, and the cell itself. Only
        `gradient_mul` of the gradient reaches the box.

        Shape:
            box (N, 4, H, W), distances in pixels; result (N, 18, H, W), in cells.
        """
        box = (1 - self.gradient_mul) * box.detach() + self.gradient_mul * box
        left, top, right, bottom = (box / stride).unbind(dim=1)
        zero = torch.zeros_like(left)
        points = [(y, x) for y in (-top, zero, bottom) for x in (-left, zero, right)]
        return torch.stack([coordinate for point in points for coordinate in point], dim=1) - self.star_base

    def loss(self, outputs: Outputs, targets: Sequence[Target], sizes: Tensor | None = None) -> Losses:
        """Compute the varifocal loss and the GIoU losses of the initial and of the refined boxes.

        The varifocal loss is divided by the number of positives. A GIoU loss is weighted with the positives' IoU and
        divided by the sum of these weights. All divisors are means over ranks, at least 1. Cells beyond an image's own
        padding are never positive, but count as background in the varifocal loss, as in MMDetection 3.x.

        Shape:
            sizes (N, 2), height and width of every image inside the padding, None for no padding.
        """
        priors = outputs.priors
        valid = valid_prior_mask(outputs, self.levels.strides, sizes)
        assigned = assign_batch(self.assigner, priors, targets, valid)  # (N, P)
        image, prior, wanted, classes = gather_positives(assigned, targets)
        points = box_centers(priors.boxes)[prior]  # (R, 2)
        predicted = [
            distances_to_boxes(points, flatten_maps(outputs.maps[name], 4)[image, prior]) for name in ("reg", "refine")
        ]
        ious = [aligned_iou(boxes.detach(), wanted).clamp(min=MIN_IOU) for boxes in predicted]
        box_losses = [(giou_loss(boxes, wanted) * iou).sum() for boxes, iou in zip(predicted, ious)]
        sums = torch.stack([points.new_full((), len(points)), *(iou.sum() for iou in ious)])
        count, weight, refined_weight = mean_over_ranks(sums)
        logits = flatten_maps(outputs.maps["cls"], self.num_classes).flatten(0, 1)  # (N * P, K)
        rows = image * len(priors) + prior
        return {
            "loss_cls": varifocal_loss(logits, rows, classes, ious[1], self.alpha, self.gamma) / count,
            "loss_box": box_losses[0] / weight,
            "loss_refine": box_losses[1] / refined_weight,
        }

    def decode(self, outputs: Outputs) -> Candidates:
        """Decode the refined boxes (N, P, 4) and the IoU-aware scores (N, P, K)."""
        boxes = distances_to_boxes(box_centers(outputs.priors.boxes), flatten_maps(outputs.maps["refine"], 4))
        return Candidates(boxes, class_scores(outputs, self.num_classes))
