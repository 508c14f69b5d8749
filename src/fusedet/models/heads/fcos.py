"""FCOS's head, with the semantics of MMDetection 3.x.

References:
    "FCOS: Fully Convolutional One-Stage Object Detection", Tian et al., 2019.
    "FCOS: A Simple and Strong Anchor-free Object Detector", Tian et al., 2020: the improvements, off by default.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError, require_choice
from fusedet.models.heads.scores import class_scores
from fusedet.models.heads.towers import InteractionFactory, TwinTowers
from fusedet.models.ops.argument_checks import check_focal, check_length, check_weight
from fusedet.models.ops.assigners import PointInBoxAssigner, assign_batch, gather_positives
from fusedet.models.ops.boxes import box_centers, boxes_to_distances, distances_to_boxes, grid_priors, make_level_points
from fusedet.models.ops.layers import conv, flatten_maps, init_normal, init_prior_bias
from fusedet.models.ops.losses import assigned_focal_loss, giou_loss, iou_loss, mean_over_ranks
from fusedet.types import Candidates, Features, Levels, Losses, Outputs, Target

BOX_LOSSES = {"iou": iou_loss, "giou": giou_loss}
BoxLoss = Literal["iou", "giou"]


class FCOSHead(nn.Module):
    """Two towers, then for each cell's center class logits, distances to the sides of the box, and centerness.

    Args:
        levels: Levels of the pyramid.
        num_classes: K.
        interact: Makes the interaction between the branches; None for no interaction.
        convs: Number of convolutions in each tower.
        channels: Channels of the towers; those of the pyramid by default.
        norm: Use GroupNorm(32) in the towers.
        bias: Give the towers' convolutions a bias (MMDetection's conv_bias, false by default there; the paper's code
            has them).
        deformable_last: Make each tower's last convolution deformable and modulated (dcn_on_last_conv).
        center_sampling: Assign only points nearer than radius * stride to the center of the box (2020).
        radius: Radius of center_sampling, in strides (center_sample_radius).
        normalize_boxes: Predict distances in strides, with a ReLU instead of the exponential (norm_on_bbox, 2020).
        centerness_on_box: Predict the centerness in the box tower instead of the classification tower
            (centerness_on_reg, 2020).
        box_loss: "iou", -log IoU, or "giou", 1 - GIoU (2020).
        ranges: Limits between the distance ranges of neighboring levels, in pixels; by default 8 strides of each level
            but the last (64, 128, 256 and 512 for P3 to P7, section 3.2).
        alpha: Weight of the positives in the focal loss.
        gamma: Exponent of the focal loss.
        prior: Initial score of every point.
        cls_weight: Weight of the classification loss (lambda in eq. 10 of MSIL, 2023).
        offset: Position of a point in its cell, in strides: 0.5 in the middle (section 3.1), 0 at the upper left corner
            (torchvision).

    Raises:
        InputError: `ranges` does not fit the levels, or an option is unknown or out of its range.
    """

    shapes: Tensor

    def __init__(
        self,
        levels: Levels,
        num_classes: int,
        interact: InteractionFactory | None = None,
        convs: int = 4,
        channels: int | None = None,
        norm: bool = True,
        bias: bool = True,
        deformable_last: bool = False,
        center_sampling: bool = False,
        radius: float = 1.5,
        normalize_boxes: bool = False,
        centerness_on_box: bool = False,
        box_loss: BoxLoss = "iou",
        ranges: tuple[float, ...] | None = None,
        alpha: float = 0.25,
        gamma: float = 2.0,
        prior: float = 0.01,
        cls_weight: float = 1.0,
        offset: float = 0.5,
    ) -> None:
        super().__init__()
        require_choice("box_loss", box_loss, BoxLoss)
        check_focal(alpha, gamma, prior)
        check_weight("cls_weight", cls_weight)
        check_length("radius", radius)
        limits = tuple(8.0 * stride for stride in levels.strides[:-1]) if ranges is None else tuple(ranges)
        _check_limits(limits, len(levels))
        channels = levels.channels[0] if channels is None else channels
        self.levels, self.num_classes, self.alpha, self.gamma = levels, num_classes, alpha, gamma
        self.normalize_boxes, self.centerness_on_box = normalize_boxes, centerness_on_box
        self.box_loss = BOX_LOSSES[box_loss]
        self.offset = offset
        self.loss_weights = {"loss_cls": cls_weight, "loss_box": 1.0, "loss_centerness": 1.0}
        self.assigner = PointInBoxAssigner(limits, radius if center_sampling else None)
        self.register_buffer("shapes", make_level_points(levels), persistent=False)
        self.towers = TwinTowers(levels.channels[0], channels, convs, norm, interact, bias, deformable_last)
        self.cls = conv(channels, num_classes, 3)
        self.reg = conv(channels, 4, 3)
        self.centerness = conv(channels, 1, 3)
        self.scales = nn.Parameter(torch.ones(len(levels)))  # s_i of section 3.2
        init_normal(self)
        init_prior_bias(self.cls.bias, prior)

    def forward(self, features: Features) -> Outputs:
        """Compute the maps "cls" and "centerness", logits, and "reg", distances to left, upper, right and lower side.

        Shape:
            features: levels (N, C, H, W); per level cls (N, K, H, W), centerness (N, 1, H, W), and reg (N, 4, H, W),
            float32, 0 or more, in strides with `normalize_boxes`, else in pixels.
        """
        levels = []
        for feature, scale in zip(features, self.scales, strict=True):
            cls, box = self.towers(feature)
            levels.append(self.predict_level(cls, box, scale))
        maps = {name: [level[name] for level in levels] for name in levels[0]}
        return Outputs(maps, grid_priors(features, self.levels, self.shapes, self.offset))

    def predict_level(self, cls: Tensor, box: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """Compute the maps of a level from both towers' features (N, C, H, W) and the level's scale."""
        raw = self.reg(box).float() * scale
        return {
            "cls": self.cls(cls),
            "reg": raw.relu() if self.normalize_boxes else raw.exp(),
            "centerness": self.centerness(box if self.centerness_on_box else cls),
        }

    def loss(self, outputs: Outputs, targets: Sequence[Target], sizes: Tensor | None = None) -> Losses:
        """Compute the focal loss, the box loss and the centerness' binary cross-entropy.

        The focal loss and the cross-entropy are divided by the positives of the batch. The box loss is weighted with
        the target centerness and divided by its sum, as in the authors' code (eq. 2 has neither). `sizes` is unused:
        points beyond an image's edge count as background, as in MMDetection 3.x.
        """
        priors = outputs.priors
        logits = flatten_maps(outputs.maps["cls"], self.num_classes)  # (N, P, K)
        distances = flatten_maps(outputs.maps["reg"], 4)  # (N, P, 4)
        central_logits = flatten_maps(outputs.maps["centerness"], 1).squeeze(2)  # (N, P)
        assigned = assign_batch(self.assigner, priors, targets)  # (N, P)
        positives = gather_positives(assigned, targets)
        image, prior, boxes, _ = positives
        count = mean_over_ranks((assigned >= 0).sum())
        wanted = boxes_to_distances(box_centers(priors.boxes)[prior], boxes)  # (R, 4)
        central = centerness(wanted)
        if self.normalize_boxes:
            wanted = wanted / priors.strides[prior, None]
        origin = wanted.new_zeros(2)  # IoU does not depend on the position
        box_losses = self.box_loss(
            distances_to_boxes(origin, distances[image, prior]), distances_to_boxes(origin, wanted)
        )
        central_loss = F.binary_cross_entropy_with_logits(
            central_logits[image, prior].float(), central, reduction="sum"
        )
        return {
            "loss_cls": assigned_focal_loss(logits, assigned, positives, self.alpha, self.gamma) / count,
            "loss_box": (box_losses * central).sum() / mean_over_ranks(central.sum(), least=1e-6),
            "loss_centerness": central_loss / count,
        }

    def decode(self, outputs: Outputs) -> Candidates:
        """Decode boxes (N, P, 4), scores (N, P, K), and the centerness as their quality (N, P)."""
        quality = flatten_maps(outputs.maps["centerness"], 1).squeeze(2).float().sigmoid()
        return Candidates(self.decode_all(outputs), class_scores(outputs, self.num_classes), quality)

    def decode_all(self, outputs: Outputs) -> Tensor:
        """Decode the boxes (N, P, 4) of all points."""
        priors = outputs.priors
        distances = flatten_maps(outputs.maps["reg"], 4)
        if self.normalize_boxes:
            distances = distances * priors.strides[:, None]
        return distances_to_boxes(box_centers(priors.boxes), distances)


def centerness(distances: Tensor) -> Tensor:
    """Compute the target centerness (R,) in 0..1 from distances (R, 4) to left, upper, right and lower side (eq. 3)."""
    x, y = distances[:, 0::2], distances[:, 1::2]  # (R, 2): left and right, upper and lower
    return (x.amin(dim=1) / x.amax(dim=1) * (y.amin(dim=1) / y.amax(dim=1))).sqrt()


def _check_limits(limits: tuple[float, ...], levels: int) -> None:
    ends = (0.0, *limits, math.inf)
    if len(limits) != levels - 1 or any(not low < high for low, high in pairwise(ends)):
        raise InputError(
            f"ranges={list(limits)} must be {levels - 1} increasing numbers above 0, one between each two of {levels} "
            "levels"
        )
