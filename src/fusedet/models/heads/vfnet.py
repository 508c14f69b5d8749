"""VFNet's head: "VarifocalNet: An IoU-aware Dense Object Detector", Zhang et al., 2021, with the semantics of MMDetection 3.x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError, one_of
from fusedet.models.heads import argument_checks
from fusedet.models.heads.towers import InteractionFactory, TwinTowers, tower
from fusedet.models.ops.assigners import assign_batch, gather_positives, valid_prior_mask
from fusedet.models.ops.atss import ATSSAssigner
from fusedet.models.ops.boxes import aligned_iou, box_centres, distances_to_boxes, grid_priors, make_base_points
from fusedet.models.ops.deformable import DeformConv
from fusedet.models.ops.layers import conv, flatten_maps, init_normal, init_prior_bias
from fusedet.models.ops.losses import giou_loss, mean_over_ranks
from fusedet.models.ops.varifocal import varifocal_loss
from fusedet.types import Candidates, Features, Levels, Losses, Outputs, Target

PRIOR_SCALE = 8.0  # the squares that ATSS compares with objects have sides of 8 strides (ATSS, 2020)
UNITS = {"reg_denom": 8.0, "stride": 1.0}  # of the initial distances, in strides
LEAST_IOU = 1e-6  # keeps a positive's target above 0, which would make it a negative


BoxNorm = Literal["reg_denom", "stride"]


class VFNetHead(nn.Module):
    """Two towers, an initial box per cell, then a refined box and IoU-aware class scores from the box's nine star points.

    levels: of the pyramid. num_classes: K. interact: an interaction between the branches, or None; its outputs are what all that
    follows takes. convs, channels (those of the pyramid by default), bias, norm (GroupNorm(32)): of the towers.
    deformable_last: the last convolution of each tower is deformable and modulated (MMDetection's dcn_on_last_conv).
    gradient_mul: what of their gradient the star points pass on to the initial box. topk: of ATSS.
    box_norm: the unit of the initial distances: "reg_denom" 8 strides (64 to 1024 pixels for P3 to P7), "stride" one.
    alpha, gamma: of the varifocal loss (its eq. 2). box_weight, refine_weight: the paper's lambda_0 and lambda_1, kept in
    `loss_weights`. prior: the score that every cell starts with.
    Raises InputError for deformable_last without convolutions, an unknown box_norm and numbers out of their ranges.
    """

    star_base: Tensor
    shapes: Tensor

    def __init__(
        self,
        levels: Levels,
        num_classes: int,
        interact: InteractionFactory = None,
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
        one_of("box_norm", box_norm, BoxNorm)
        argument_checks.focal(alpha, gamma, prior)
        if deformable_last and convs == 0:
            raise InputError("deformable_last=true needs convs of 1 or more, got 0")
        if not 0 <= gradient_mul <= 1:
            raise InputError(f"gradient_mul={gradient_mul} must be 0 to 1")
        channels = levels.channels[0] if channels is None else channels
        self.levels, self.num_classes, self.alpha, self.gamma = levels, num_classes, alpha, gamma
        self.gradient_mul, self.unit = gradient_mul, UNITS[box_norm]
        self.loss_weights = {"loss_cls": 1.0, "loss_box": box_weight, "loss_refine": refine_weight}
        self.assigner = ATSSAssigner(topk)
        self.register_buffer(
            "shapes", torch.stack([make_base_points(s, PRIOR_SCALE) for s in levels.strides]), persistent=False
        )  # (L, 1, 4)
        steps = torch.arange(-1.0, 2.0)
        self.register_buffer(
            "star_base", torch.cartesian_prod(steps, steps).view(1, 18, 1, 1), persistent=False
        )  # (dy, dx) pairs

        self.towers = TwinTowers(levels.channels[0], channels, convs, norm, interact, bias, deformable_last)
        self.reg_conv = tower(channels, channels, 1, norm, bias)
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
        """Levels (N, C, H, W) to maps "cls" (N, K, H, W), logits, and "reg" and "refine" (N, 4, H, W), float32: how many pixels the
        left, upper, right and lower side of the initial and of the refined box are away."""
        levels = [self._level(feature, i) for i, feature in enumerate(features)]
        maps = {name: list(column) for name, column in zip(("cls", "reg", "refine"), zip(*levels))}
        return Outputs(maps, grid_priors(features, self.levels, self.shapes))

    def _level(self, feature: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        stride = self.levels.strides[level]
        cls, reg = self.towers(feature)
        # exp in float32: half precision overflows at 11
        box = (self.reg(self.reg_conv(reg)) * self.scales[level]).float().exp() * (self.unit * stride)  # (N, 4, H, W)
        offset = self.star(box, stride)
        growth = self.refine(F.relu(self.refine_star(reg, offset))) * self.scales_refine[level]
        logits = self.cls(F.relu(self.cls_star(cls, offset)))
        return logits, box, growth.float().exp() * box.detach()

    def star(self, box: Tensor, stride: int) -> Tensor:
        """Offsets (N, 18, H, W), in cells, that move a 3x3 convolution's points to those of the star.

        box (N, 4, H, W): distances in pixels. The points are the box's corners, the middles of its sides as seen from the cell, and the
        cell itself. Only `gradient_mul` of the gradient goes back to the box.
        """
        box = (1 - self.gradient_mul) * box.detach() + self.gradient_mul * box
        left, top, right, bottom = (box / stride).unbind(dim=1)
        here = torch.zeros_like(left)
        points = [(y, x) for y in (-top, here, bottom) for x in (-left, here, right)]
        return torch.stack([side for point in points for side in point], dim=1) - self.star_base

    def loss(self, outputs: Outputs, targets: Sequence[Target], sizes: Tensor | None = None) -> Losses:
        """Varifocal loss, divided by the number of positives, and GIoU loss of the initial and of the refined boxes, each positive
        weighted with its overlap and divided by the sum of these weights; all divisors are means over ranks, at least 1.

        sizes (N, 2): of the images inside the canvas, None: all of it. Cells beyond an image's own padding answer for no object, but
        are background to the scores (as in MMDetection 3.x).
        """
        priors = outputs.priors
        owners = assign_batch(
            self.assigner.assign, priors, targets, valid_prior_mask(outputs, self.levels.strides, sizes)
        )  # (N, P)
        image, prior, wanted, classes = gather_positives(owners, targets)
        points = box_centres(priors.boxes)[prior]  # (R, 2)
        found = [
            distances_to_boxes(points, flatten_maps(outputs.maps[name], 4)[image, prior]) for name in ("reg", "refine")
        ]
        overlaps = [aligned_iou(boxes.detach(), wanted).clamp(min=LEAST_IOU) for boxes in found]
        costs = [(giou_loss(boxes, wanted) * overlap).sum() for boxes, overlap in zip(found, overlaps)]
        sums = torch.stack([points.new_full((), len(points)), *(overlap.sum() for overlap in overlaps)])
        count, weight, refined_weight = mean_over_ranks(sums)
        logits = flatten_maps(outputs.maps["cls"], self.num_classes).flatten(0, 1)  # (N * P, K)
        return {
            "loss_cls": varifocal_loss(
                logits, image * len(priors) + prior, classes, overlaps[1], self.alpha, self.gamma
            )
            / count,
            "loss_box": costs[0] / weight,
            "loss_refine": costs[1] / refined_weight,
        }

    def decode(self, outputs: Outputs) -> Candidates:
        """The refined boxes (N, P, 4) and scores (N, P, K), which tell class and overlap in one."""
        scores = flatten_maps(outputs.maps["cls"], self.num_classes).float().sigmoid()
        return Candidates(
            distances_to_boxes(box_centres(outputs.priors.boxes), flatten_maps(outputs.maps["refine"], 4)), scores
        )
