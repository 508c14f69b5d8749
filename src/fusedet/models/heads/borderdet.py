"""BorderDet's head.

References:
    "BorderDet: Border Feature for Dense Object Detection", Qiu et al., 2020.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from fusedet.errors import InputError
from fusedet.models.heads.border_module import BorderModule
from fusedet.models.heads.fcos import FCOSHead
from fusedet.models.heads.scores import fuse_quality
from fusedet.models.heads.towers import InteractionFactory, TowerOptions
from fusedet.models.ops.argument_checks import check_iou_thresholds, check_length, check_loss_weights
from fusedet.models.ops.assigners import MaxIoUAssigner, gather_positives
from fusedet.models.ops.cells import boxes_around_cells
from fusedet.models.ops.layers import conv, flatten_maps, init_normal, init_prior_bias
from fusedet.models.ops.losses import assigned_focal_loss, mean_over_ranks
from fusedet.types import Candidates, Levels, Losses, Outputs, Target


class BorderDetHead(FCOSHead):
    """FCOS's improved head, whose boxes and scores are refined by the features along the boxes' borders.

    FCOS's predictions are the coarse ones. A border module on each tower's features and a 1x1 convolution predict the
    border scores and the shifts of the box's four sides. `borderdet_r50` has 33,079,086 trainable parameters with 80
    classes: those of FCOS with biases, 656,896 of the classification and 328,576 of the regression module, and 21,588
    of the two predictors. Points lie at the upper left corners of cells, as in the authors' code.

    Args:
        levels: As in `FCOSHead`.
        num_classes: As in `FCOSHead`.
        interact: As in `FCOSHead`. The border modules too take its outputs.
        radius: As in `FCOSHead`.
        ranges: As in `FCOSHead`.
        cls_border_channels: Channels of each border in the classification module; `channels` by default.
        reg_border_channels: Channels of each border in the regression module; half of `channels` by default.
        points: Points of a border, N of the paper.
        both_ends: Also take the point at the right or lower end of a border (the authors' code, MMCV).
        positive: IoU of a coarse box from which its border prediction is positive.
        std: Unit of the sides' shifts, in widths and heights of the coarse box (sigma of the paper).
        alpha: Weight of the positives in both focal losses.
        gamma: Exponent of both focal losses.
        prior: Initial score of every point, coarse and border.
        border_cls_weight: Weight of the border classification loss.
        border_box_weight: Weight of the border regression loss.
        **towers: As in `FCOSHead`.

    Raises:
        InputError: As `FCOSHead`, or an option is out of its range.
    """

    def __init__(
        self,
        levels: Levels,
        num_classes: int,
        interact: InteractionFactory | None = None,
        radius: float = 1.5,
        ranges: tuple[float, ...] | None = None,
        cls_border_channels: int | None = None,
        reg_border_channels: int | None = None,
        points: int = 10,
        both_ends: bool = False,
        positive: float = 0.6,
        std: float = 0.5,
        alpha: float = 0.25,
        gamma: float = 2.0,
        prior: float = 0.01,
        border_cls_weight: float = 1.0,
        border_box_weight: float = 1.0,
        **towers: Unpack[TowerOptions],
    ) -> None:
        super().__init__(
            levels,
            num_classes,
            interact,
            center_sampling=True,
            radius=radius,
            normalize_boxes=True,
            centerness_on_box=True,
            box_loss="giou",
            ranges=ranges,
            alpha=alpha,
            gamma=gamma,
            prior=prior,
            offset=0.0,
            **towers,
        )
        channels = self.cls.in_channels
        widths = {
            "cls_border_channels": channels if cls_border_channels is None else cls_border_channels,
            "reg_border_channels": max(1, channels // 2) if reg_border_channels is None else reg_border_channels,
        }
        for name, width in widths.items():
            if width < 1:
                raise InputError(f"{name}={width} must be 1 or more")
        check_iou_thresholds(positive, positive)
        check_length("std", std)
        self.std = std
        self.border_assigner = MaxIoUAssigner(positive, positive, low_quality=False)
        self.loss_weights |= {"loss_border_cls": border_cls_weight, "loss_border_box": border_box_weight}
        check_loss_weights(self.loss_weights)
        self.cls_border = BorderModule(channels, widths["cls_border_channels"], points, both_ends)
        self.reg_border = BorderModule(channels, widths["reg_border_channels"], points, both_ends)
        self.border_cls = conv(channels, num_classes, 1)
        self.border_reg = conv(channels, 4, 1)
        for module in (self.cls_border, self.reg_border, self.border_cls, self.border_reg):
            init_normal(module)
        init_prior_bias(self.border_cls.bias, prior)

    def predict_level(self, cls: Tensor, box: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """Compute the maps of a level.

        They are those of `FCOSHead`, the border logits "border_cls" (N, K, H, W), and "border_reg" (N, 4, H, W),
        float32, the shifts of the left, upper, right and lower side.
        """
        maps = super().predict_level(cls, box, scale)
        boxes = boxes_around_cells(maps["reg"].detach())  # (N, 4, H, W)
        return maps | {
            "border_cls": self.border_cls(self.cls_border(cls, boxes)),
            "border_reg": self.border_reg(self.reg_border(box, boxes)).float(),
        }

    def loss(self, outputs: Outputs, targets: Sequence[Target], sizes: Tensor | None = None) -> Losses:
        """Compute FCOS's losses of the coarse predictions, and the border focal and L1 losses (section 3.4).

        A border prediction is positive for the instance with which its coarse box has the largest IoU, if that is
        `positive` or more, else background. Its target is the difference of each side from the instance's, in `std`
        times the coarse box's width or height. Both losses are divided by the border positives of the batch, at
        least 1. The coarse box is a constant in them. `sizes` is unused, as in FCOS.
        """
        losses = super().loss(outputs, targets, sizes)
        boxes = self.decode_all(outputs).detach()  # (N, P, 4)
        assigned = torch.stack([self.border_assigner.match_boxes(b, t)[0] for b, t in zip(boxes, targets, strict=True)])
        positives = gather_positives(assigned, targets)
        place = (positives.image, positives.prior)
        coarse = boxes[place]  # (R, 4)
        wanted = (positives.boxes - coarse) / (self.std * _sides(coarse))
        shifts = flatten_maps(outputs.maps["border_reg"], 4)[place]
        logits = flatten_maps(outputs.maps["border_cls"], self.num_classes)
        count = mean_over_ranks((assigned >= 0).sum())
        return losses | {
            "loss_border_cls": assigned_focal_loss(logits, assigned, positives, self.alpha, self.gamma) / count,
            "loss_border_box": (shifts - wanted).abs().sum() / count,
        }

    def decode(self, outputs: Outputs) -> Candidates:
        """Decode boxes (N, P, 4), coarse boxes with shifted sides, and scores (N, P, K).

        A score is the root of the border score times the coarse one, itself the root of class score times centerness.
        """
        boxes, scores, _ = fuse_quality(super().decode(outputs))
        boxes = boxes + flatten_maps(outputs.maps["border_reg"], 4) * self.std * _sides(boxes)
        border = flatten_maps(outputs.maps["border_cls"], self.num_classes).float().sigmoid()
        return Candidates(boxes, (scores * border).sqrt())


def _sides(boxes: Tensor) -> Tensor:
    """Return width, height, width and height (..., 4) of boxes (..., 4)."""
    sides = boxes[..., 2:] - boxes[..., :2]
    return torch.cat([sides, sides], dim=-1)
