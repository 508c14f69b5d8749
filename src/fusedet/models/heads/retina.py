"""RetinaNet's head, with the semantics of MMDetection 3.x.

References:
    "Focal Loss for Dense Object Detection", Lin et al., 2017.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError
from fusedet.models.heads.scores import class_scores
from fusedet.models.heads.towers import InteractionFactory, TwinTowers
from fusedet.models.ops.argument_checks import check_anchors, check_focal, check_iou_thresholds, check_weight
from fusedet.models.ops.assigners import MaxIoUAssigner, assign_batch, gather_positives, valid_prior_mask
from fusedet.models.ops.boxes import decode_boxes, encode_boxes, grid_priors, make_base_anchors
from fusedet.models.ops.layers import conv, flatten_maps, init_normal, init_prior_bias
from fusedet.models.ops.losses import assigned_focal_loss, mean_over_ranks
from fusedet.types import Candidates, Features, Levels, Losses, Outputs, Target


class RetinaHead(nn.Module):
    """Two towers, then class logits and box deltas for A anchors per cell.

    The anchors' sizes are stride * base_scale * 2^(i / scales_per_octave); A = scales_per_octave * len(ratios).

    Args:
        levels: Levels of the pyramid.
        num_classes: K.
        interact: Makes the interaction between the branches; None for no interaction.
        convs: Number of convolutions in each tower.
        channels: Channels of the towers; those of the pyramid by default.
        norm: Use GroupNorm(32) in the towers, which narrow towers need when trained from scratch.
        bias: Give the towers' convolutions a bias.
        base_scale: Size of the smallest anchor, in strides.
        scales_per_octave: Number of anchor sizes.
        ratios: Height / width of the anchors.
        offset: Position of an anchor's center in its cell, in strides: 0 at the upper left corner (0.5 in MMDetection
            1.x).
        round_anchors: Round the anchors' corners to whole pixels (MMDetection 1.x, torchvision).
        whole_sizes: Truncate the anchors' sizes to whole pixels before the ratios are applied (torchvision).
        positive: IoU from which an anchor is positive (section 4).
        negative: IoU below which an anchor is background.
        alpha: Weight of the positives in the focal loss.
        gamma: Exponent of the focal loss.
        prior: Initial score of every anchor.
        cls_weight: Weight of the classification loss (lambda in eq. 10 of MSIL, 2023).

    Raises:
        InputError: An option is out of its range.
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
        base_scale: float = 4.0,
        scales_per_octave: int = 3,
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        offset: float = 0.0,
        round_anchors: bool = False,
        whole_sizes: bool = False,
        positive: float = 0.5,
        negative: float = 0.4,
        alpha: float = 0.25,
        gamma: float = 2.0,
        prior: float = 0.01,
        cls_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_focal(alpha, gamma, prior)
        check_weight("cls_weight", cls_weight)
        check_iou_thresholds(positive, negative)
        check_anchors("base_scale", base_scale, ratios)
        if scales_per_octave < 1:
            raise InputError(f"scales_per_octave={scales_per_octave} must be at least 1")
        channels = levels.channels[0] if channels is None else channels
        self.levels, self.num_classes, self.alpha, self.gamma = levels, num_classes, alpha, gamma
        self.loss_weights = {"loss_cls": cls_weight, "loss_box": 1.0}
        self.assigner = MaxIoUAssigner(positive, negative)
        shapes = torch.stack(
            [make_base_anchors(stride, base_scale, scales_per_octave, ratios, whole_sizes) for stride in levels.strides]
        )
        self.offset = offset
        self.register_buffer("shapes", shapes.round() if round_anchors else shapes, persistent=False)  # (L, A, 4)
        anchors = shapes.shape[1]
        self.towers = TwinTowers(levels.channels[0], channels, convs, norm, interact, bias)
        self.cls = conv(channels, anchors * num_classes, 3)
        self.reg = conv(channels, anchors * 4, 3)
        init_normal(self)
        init_prior_bias(self.cls.bias, prior)

    def forward(self, features: Features) -> Outputs:
        """Compute the maps "cls", logits, and "reg", box deltas.

        Shape:
            features: levels (N, C, H, W); per level cls (N, A * K, H, W) and reg (N, A * 4, H, W).
        """
        towers = [self.towers(f) for f in features]
        maps = {"cls": [self.cls(c) for c, _ in towers], "reg": [self.reg(r) for _, r in towers]}
        return Outputs(maps, grid_priors(features, self.levels, self.shapes, self.offset))

    def loss(self, outputs: Outputs, targets: Sequence[Target], sizes: Tensor | None = None) -> Losses:
        """Compute the focal loss and the L1 loss of the deltas.

        Both are divided by the positives of the batch, at least one per image. Anchors beyond an image's own padding do
        not count.

        Shape:
            sizes (N, 2), height and width of every image inside the padding, None for no padding.
        """
        priors = outputs.priors
        logits = flatten_maps(outputs.maps["cls"], self.num_classes)  # (N, P, K)
        deltas = flatten_maps(outputs.maps["reg"], 4)  # (N, P, 4)
        valid = valid_prior_mask(outputs, self.levels.strides, sizes)  # (N, P)
        assigned = assign_batch(self.assigner, priors, targets, valid)  # (N, P)
        positives = gather_positives(assigned, targets)
        image, prior, boxes, _ = positives
        count = mean_over_ranks((assigned >= 0).sum(dim=1).clamp(min=1).sum())
        wanted = encode_boxes(priors.boxes[prior], boxes)
        return {
            "loss_cls": assigned_focal_loss(logits, assigned, positives, self.alpha, self.gamma) / count,
            "loss_box": F.l1_loss(deltas[image, prior].float(), wanted, reduction="sum") / count,
        }

    def decode(self, outputs: Outputs) -> Candidates:
        """Decode boxes (N, P, 4) and scores (N, P, K)."""
        boxes = decode_boxes(outputs.priors.boxes, flatten_maps(outputs.maps["reg"], 4).float())
        return Candidates(boxes, class_scores(outputs, self.num_classes))
