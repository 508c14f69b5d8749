"""FoveaBox's head, with the semantics of MMDetection 3.x.

References:
    "FoveaBox: Beyond Anchor-Based Object Detection", Kong et al., 2020; the feature alignment is its section 3.5.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusedet.errors import InputError
from fusedet.models.heads.feature_alignment import WIDER, Alignment
from fusedet.models.heads.scores import class_scores
from fusedet.models.heads.towers import InteractionFactory, TwinTowers, make_tower
from fusedet.models.ops.argument_checks import check_focal, check_length
from fusedet.models.ops.assigners import assign_batch, gather_positives
from fusedet.models.ops.boxes import (
    box_centers,
    boxes_to_distances,
    distances_to_boxes,
    grid_priors,
    make_level_points,
    select_detections,
)
from fusedet.models.ops.layers import conv, flatten_maps, init_normal, init_prior_bias
from fusedet.models.ops.losses import assigned_focal_loss, mean_over_ranks
from fusedet.models.ops.region_assigners import FoveaAssigner
from fusedet.models.ops.regression_losses import smooth_l1_loss
from fusedet.types import BatchDetections, Candidates, Features, Levels, Losses, Outputs, Target

TARGET_RANGE = (1 / 16, 16.0)  # of distances, in base sizes of the level


class FoveaHead(nn.Module):
    """Two towers, then for each cell's center class logits and the logarithms of the distances to the box's sides.

    Args:
        levels: Levels of the pyramid.
        num_classes: K.
        interact: Makes the interaction between the branches; None for no interaction.
        convs: Number of convolutions in each tower.
        channels: Channels of the towers; those of the pyramid by default.
        norm: Use GroupNorm(32).
        bias: Give the towers' convolutions a bias.
        align: Replace the classification tower by a deformable convolution whose offsets come from the predicted box,
            and two convolutions of four times the channels (section 3.5).
        sigma: Size of the part of a box whose cells are positive.
        base_scale: Base size of a level, the unit of its distances, in strides.
        ranges: Least and greatest root of an instance's area for each level, in pixels; by default 2 to 8 strides, from
            1 pixel on the first level, to 16 strides on the last.
        alpha: Weight of the positives in the focal loss.
        gamma: Exponent of the focal loss.
        beta: Transition point of the boxes' smooth L1 loss.
        prior: Initial score of every cell.

    Raises:
        InputError: `align` with `interact`, `ranges` do not fit the levels, or an option is out of its range.
    """

    shapes: Tensor

    def __init__(
        self,
        levels: Levels,
        num_classes: int,
        interact: InteractionFactory | None = None,
        convs: int = 4,
        channels: int | None = None,
        norm: bool = False,
        bias: bool = True,
        align: bool = False,
        sigma: float = 0.4,
        base_scale: float = 2.0,
        ranges: Sequence[tuple[float, float]] | None = None,
        alpha: float = 0.4,
        gamma: float = 1.5,
        beta: float = 0.11,
        prior: float = 0.01,
    ) -> None:
        super().__init__()
        check_focal(alpha, gamma, prior)
        check_length("base_scale", base_scale)
        if align and interact:
            raise InputError("align=true has no classification tower to exchange: set model.interact=null")
        if not 0 < sigma <= 1 or not beta > 0:
            raise InputError(f"sigma={sigma} must be above 0 and at most 1, beta={beta} above 0")
        ends = _default_ranges(levels.strides) if ranges is None else [(low, high) for low, high in ranges]
        if len(ends) != len(levels) or any(not 0 <= low < high for low, high in ends):
            raise InputError(f"ranges={ends} must be {len(levels)} pairs of sizes, the least one first, one per level")
        channels = levels.channels[0] if channels is None else channels
        self.levels, self.num_classes, self.alpha, self.gamma = levels, num_classes, alpha, gamma
        self.beta, self.base_scale = beta, base_scale
        self.loss_weights = {"loss_cls": 1.0, "loss_box": 1.0}
        self.assigner = FoveaAssigner(ends, sigma)
        self.register_buffer("shapes", make_level_points(levels), persistent=False)
        self.align = Alignment(levels.channels[0], channels, norm, bias) if align else None
        if align:
            self.towers: nn.Module = nn.ModuleDict({"reg": make_tower(levels.channels[0], channels, convs, norm, bias)})
        else:
            self.towers = TwinTowers(levels.channels[0], channels, convs, norm, interact, bias)
        self.cls = conv(channels * WIDER if align else channels, num_classes, 3)
        self.reg = conv(channels, 4, 3)
        init_normal(self)
        if self.align:
            self.align.init_weights()
        init_prior_bias(self.cls.bias, prior)

    def forward(self, features: Features) -> Outputs:
        """Compute the maps "cls", logits, and "reg", log of the distances to the left, upper, right and lower side.

        Shape:
            features: levels (N, C, H, W); per level cls (N, K, H, W) and reg (N, 4, H, W), float32, in base sizes.
        """
        maps: dict[str, list[Tensor]] = {"cls": [], "reg": []}
        for feature in features:
            if self.align:
                box = self.reg(self.towers["reg"](feature)).float()  # type: ignore[index]
                cls = self.align(feature, box)
            else:
                cls, reg = self.towers(feature)
                box = self.reg(reg).float()
            maps["cls"].append(self.cls(cls))
            maps["reg"].append(box)
        return Outputs(maps, grid_priors(features, self.levels, self.shapes, offset=0.5))

    def loss(self, outputs: Outputs, targets: Sequence[Target], sizes: Tensor | None = None) -> Losses:
        """Compute the focal loss, divided by positives plus images, and the smooth L1 loss, by positives.

        `sizes` is unused: cells beyond an image's edge count as background, as in MMDetection 3.x.
        """
        priors = outputs.priors
        logits = flatten_maps(outputs.maps["cls"], self.num_classes)  # (N, P, K)
        assigned = assign_batch(self.assigner, priors, targets)  # (N, P)
        positives = gather_positives(assigned, targets)
        image, prior, boxes, _ = positives
        distances = boxes_to_distances(box_centers(priors.boxes)[prior], boxes)
        base = self.base_scale * priors.strides[prior, None]
        wanted = (distances / base).clamp(*TARGET_RANGE).log()
        box_loss = smooth_l1_loss(flatten_maps(outputs.maps["reg"], 4)[image, prior], wanted, self.beta).sum()
        number = (assigned >= 0).sum()
        count, divisor = mean_over_ranks(torch.stack([number, number + len(targets)]))
        cls_loss = assigned_focal_loss(logits, assigned, positives, self.alpha, self.gamma)
        return {"loss_cls": cls_loss / divisor, "loss_box": box_loss / count}

    def decode(self, outputs: Outputs) -> Candidates:
        """Decode boxes (N, P, 4) and scores (N, P, K)."""
        priors = outputs.priors
        distances = flatten_maps(outputs.maps["reg"], 4).exp() * (self.base_scale * priors.strides[:, None])
        boxes = distances_to_boxes(box_centers(priors.boxes), distances)
        return Candidates(boxes, class_scores(outputs, self.num_classes))

    def select(
        self, candidates: Candidates, sizes: Tensor, level_counts: Sequence[int], **options: Any
    ) -> BatchDetections:
        """Select as `select_detections` does; boxes end a pixel inside the image, and those without an area stay."""
        return select_detections(candidates, sizes - 1, level_counts, keep_empty=True, **options)


def _default_ranges(strides: Sequence[int]) -> list[tuple[float, float]]:
    ranges = [(2.0 * stride, 8.0 * stride) for stride in strides]
    low, high = (1.0, ranges[0][1]), (ranges[-1][0], 16.0 * strides[-1])
    return [(1.0, high[1])] if len(ranges) == 1 else [low, *ranges[1:-1], high]
