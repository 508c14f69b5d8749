"""The heads of GFL and GFLv2, with the semantics of MMDetection 3.x.

References:
    "Generalized Focal Loss: Learning Qualified and Distributed Bounding Boxes for Dense Object Detection", Li et al.,
    2020. `quality_predictor` has the second version.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fusedet.errors import InputError
from fusedet.models.heads.quality_anchors import count_positives
from fusedet.models.heads.quality_predictor import TOP, QualityPredictor
from fusedet.models.heads.towers import InteractionFactory, TwinTowers
from fusedet.models.ops.argument_checks import check_length, check_loss_weights, check_prior, check_weight
from fusedet.models.ops.assigners import IGNORED, assign_batch, valid_prior_mask
from fusedet.models.ops.atss import ATSSAssigner
from fusedet.models.ops.boxes import (
    aligned_iou,
    box_centers,
    boxes_to_distances,
    distances_to_boxes,
    grid_priors,
    make_level_points,
)
from fusedet.models.ops.layers import conv, flatten_maps, init_normal, init_prior_bias
from fusedet.models.ops.losses import giou_loss, mean_over_ranks
from fusedet.models.ops.quality_losses import quality_focal_loss, quality_focal_loss_of_scores
from fusedet.models.ops.regression_losses import distribution_focal_loss
from fusedet.types import Candidates, Features, Levels, Losses, Outputs, Target

BEYOND = 0.1  # bins below the last one at which a target distance ends, so that it lies between two bins


class GFLHead(nn.Module):
    """Two towers, then class scores that are IoUs too, and for each side of the box a distribution of its distance.

    Args:
        levels: Levels of the pyramid.
        num_classes: K.
        interact: Makes the interaction between the branches; None for no interaction.
        convs: Number of convolutions in each tower.
        channels: Channels of the towers; those of the pyramid by default.
        norm: Use GroupNorm(32) in the towers.
        bias: Give the towers' convolutions a bias.
        bins: The largest distance, in strides; a distribution has one number more (reg_max).
        quality_channels: Channels of GFLv2's predictor of the quality from the distributions, whose output multiplies
            the scores; 0 for GFL.
        base_scale: Side of the square priors that ATSS compares with instances, in strides.
        topk: Candidates per level of ATSS.
        beta: Exponent of the quality focal loss.
        prior: Initial score of every cell.
        box_weight: Weight of the GIoU loss.
        dfl_weight: Weight of the distribution focal loss.

    Raises:
        InputError: An option is out of its range.
    """

    shapes: Tensor
    distances: Tensor

    def __init__(
        self,
        levels: Levels,
        num_classes: int,
        interact: InteractionFactory | None = None,
        convs: int = 4,
        channels: int | None = None,
        norm: bool = True,
        bias: bool = False,
        bins: int = 16,
        quality_channels: int = 0,
        base_scale: float = 8.0,
        topk: int = 9,
        beta: float = 2.0,
        prior: float = 0.01,
        box_weight: float = 2.0,
        dfl_weight: float = 0.25,
    ) -> None:
        super().__init__()
        check_prior(prior)
        check_weight("beta", beta)
        check_length("base_scale", base_scale)
        if bins < TOP or quality_channels < 0:
            raise InputError(f"bins={bins} must be {TOP} or more, and quality_channels={quality_channels} 0 or more")
        channels = levels.channels[0] if channels is None else channels
        self.levels, self.num_classes, self.beta = levels, num_classes, beta
        self.loss_weights = {"loss_cls": 1.0, "loss_box": box_weight, "loss_dfl": dfl_weight}
        check_loss_weights(self.loss_weights)
        self.assigner = ATSSAssigner(topk)
        self.register_buffer("shapes", make_level_points(levels, base_scale), persistent=False)
        self.register_buffer("distances", torch.arange(bins + 1.0))  # of the bins; MMDetection saves them too
        self.towers = TwinTowers(levels.channels[0], channels, convs, norm, interact, bias)
        self.cls = conv(channels, num_classes, 3)
        self.reg = conv(channels, 4 * (bins + 1), 3)
        self.scales = nn.Parameter(torch.ones(len(levels)))
        self.quality = QualityPredictor(quality_channels) if quality_channels else None
        init_normal(self)
        init_prior_bias(self.cls.bias, prior)

    def forward(self, features: Features) -> Outputs:
        """Compute the maps "cls", logits (scores with the quality predictor), and "reg", logits of the distances.

        Shape:
            features: levels (N, C, H, W); per level cls (N, K, H, W), and reg (N, 4 * (bins + 1), H, W), float32: a
            distribution for the left, upper, right and lower side.
        """
        maps: dict[str, list[Tensor]] = {"cls": [], "reg": []}
        for feature, scale in zip(features, self.scales, strict=True):
            cls, reg = self.towers(feature)
            logits, sides = self.cls(cls), self.reg(reg).float() * scale
            if self.quality is not None:
                logits = logits.float().sigmoid() * self.quality(sides)  # eq. 2 of GFLv2
            maps["cls"].append(logits)
            maps["reg"].append(sides)
        return Outputs(maps, grid_priors(features, self.levels, self.shapes))

    def loss(self, outputs: Outputs, targets: Sequence[Target], sizes: Tensor | None = None) -> Losses:
        """Compute the quality focal loss, the GIoU loss and the distribution focal loss.

        The quality focal loss is divided by the positives of the batch, at least one per image. The other two are
        weighted with the positives' largest score, without gradient, and divided by the sum of these weights, at least
        1; the distribution focal loss is a mean over the sides. Cells beyond an image's own padding do not count.

        Shape:
            sizes (N, 2), height and width of every image inside the padding, None for no padding.
        """
        priors = outputs.priors
        valid = valid_prior_mask(outputs, self.levels.strides, sizes)  # (N, P)
        assigned = assign_batch(self.assigner, priors, targets, valid)  # (N, P)
        positives, number = count_positives(assigned, targets)
        image, prior, boxes, classes = positives
        logits = flatten_maps(outputs.maps["cls"], self.num_classes)  # (N, P, K)
        sides = flatten_maps(outputs.maps["reg"], self.reg.out_channels)[image, prior].unflatten(1, (4, -1))
        strides = priors.strides[prior, None]
        centers = box_centers(priors.boxes)[prior] / strides  # (R, 2)
        boxes = boxes / strides
        predicted = distances_to_boxes(centers, self.expected_distances(sides))
        best = self.scores(logits[image, prior].detach()).amax(dim=1)  # (R,)
        count, weight = mean_over_ranks(torch.stack([number, best.sum()]))
        wanted = boxes_to_distances(centers, boxes).clamp(0, len(self.distances) - 1 - BEYOND)  # (R, 4)
        distribution = distribution_focal_loss(sides, wanted).mean(dim=1)
        quality_loss = quality_focal_loss if self.quality is None else quality_focal_loss_of_scores
        rows, counted = image * len(priors) + prior, (assigned != IGNORED).flatten()
        iou = aligned_iou(predicted.detach(), boxes)
        return {
            "loss_cls": quality_loss(logits.flatten(0, 1), counted, rows, classes, iou, self.beta) / count,
            "loss_box": (giou_loss(predicted, boxes) * best).sum() / weight,
            "loss_dfl": (distribution * best).sum() / weight,
        }

    def scores(self, outputs: Tensor) -> Tensor:
        """Convert the map "cls" to scores, float32."""
        return outputs.float().sigmoid() if self.quality is None else outputs.float()

    def expected_distances(self, sides: Tensor) -> Tensor:
        """Compute the means (..., 4), in strides, of the sides' distributions (..., 4, bins + 1), logits (eq. 5)."""
        return sides.softmax(dim=-1) @ self.distances.to(sides.dtype)

    def decode(self, outputs: Outputs) -> Candidates:
        """Decode boxes (N, P, 4) and scores (N, P, K)."""
        priors = outputs.priors
        sides = flatten_maps(outputs.maps["reg"], self.reg.out_channels).unflatten(2, (4, -1))
        distances = self.expected_distances(sides) * priors.strides[:, None]
        scores = self.scores(flatten_maps(outputs.maps["cls"], self.num_classes))
        return Candidates(distances_to_boxes(box_centers(priors.boxes), distances), scores)
