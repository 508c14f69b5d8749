"""YOLOF's head, with the semantics of MMDetection 3.x.

References:
    "You Only Look One-level Feature", Chen et al., 2021.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fusedet.errors import InputError
from fusedet.models.heads.towers import InteractionFactory
from fusedet.models.ops.argument_checks import check_focal, check_length
from fusedet.models.ops.assigners import gather_positives, valid_prior_mask
from fusedet.models.ops.boxes import decode_boxes, grid_priors, make_level_points
from fusedet.models.ops.layers import BatchNorm, conv, flatten_maps, init_normal, init_prior_bias
from fusedet.models.ops.losses import assigned_focal_loss, giou_loss, mean_over_ranks
from fusedet.models.ops.uniform_assigner import UniformMatcher
from fusedet.types import Candidates, Features, Levels, Losses, Outputs, Target


class YOLOFHead(nn.Module):
    """A classification and a regression tower; the second also predicts an objectness that joins the class logits.

    Args:
        levels: Levels of the neck; the paper has one, of stride 32.
        num_classes: K.
        interact: Makes the interaction between the branches; None for no interaction.
        cls_convs: Number of convolutions in the classification tower.
        convs: Number of convolutions in the regression tower.
        channels: Channels of the towers; those of the neck by default.
        scales: Sides of the square anchors, in strides.
        topk: Predicted boxes and anchors that each instance matches.
        positive: IoU of anchor and instance from which a match is positive, else it is ignored.
        negative: IoU of predicted box and instance from which an unmatched anchor is ignored.
        most_shift: Most pixels by which a box's center moves from its anchor's.
        alpha: Weight of the positives in the focal loss.
        gamma: Exponent of the focal loss.
        prior: Initial score of every anchor.

    Raises:
        InputError: An option is out of its range.
    """

    shapes: Tensor

    def __init__(
        self,
        levels: Levels,
        num_classes: int,
        interact: InteractionFactory | None = None,
        cls_convs: int = 2,
        convs: int = 4,
        channels: int | None = None,
        scales: Sequence[float] = (1.0, 2.0, 4.0, 8.0, 16.0),
        topk: int = 4,
        positive: float = 0.15,
        negative: float = 0.7,
        most_shift: float = 32.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        prior: float = 0.01,
    ) -> None:
        super().__init__()
        check_focal(alpha, gamma, prior)
        if not scales or min(cls_convs, convs) < 1 or not most_shift > 0:
            raise InputError(
                f"scales={list(scales)} must be one or more, cls_convs={cls_convs}, convs={convs} 1 or more, "
                f"most_shift={most_shift} above 0"
            )
        for scale in scales:
            check_length("scales", scale)
        inputs = levels.channels[0]
        channels = inputs if channels is None else channels
        if channels < 1:
            raise InputError(f"channels={channels} must be at least 1")
        self.levels, self.num_classes, self.alpha, self.gamma = levels, num_classes, alpha, gamma
        self.most_shift = most_shift
        self.loss_weights = {"loss_cls": 1.0, "loss_box": 1.0}
        self.matcher = UniformMatcher(topk, positive, negative)
        shapes = torch.cat([make_level_points(levels, scale) for scale in scales], dim=1)
        self.register_buffer("shapes", shapes, persistent=False)  # (L, A, 4)
        self.cls_tower, self.reg_tower = _tower(inputs, channels, cls_convs), _tower(inputs, channels, convs)
        self.interact = interact(channels) if interact else None
        anchors = len(scales)
        self.cls = conv(channels, anchors * num_classes, 3)
        self.reg = conv(channels, anchors * 4, 3)
        self.objectness = conv(channels, anchors, 3)
        init_normal(self)
        init_prior_bias(self.cls.bias, prior)

    def forward(self, features: Features) -> Outputs:
        """Compute the maps "cls", logits of class and objectness together, and "reg", box deltas.

        Shape:
            features: levels (N, C, H, W); per level cls (N, A * K, H, W), float32, and reg (N, A * 4, H, W).
        """
        maps: dict[str, list[Tensor]] = {"cls": [], "reg": []}
        for feature in features:
            cls, reg = self.cls_tower(feature), self.reg_tower(feature)
            if self.interact:
                cls, reg = self.interact(cls, reg)
            logits = self.cls(cls).float().unflatten(1, (-1, self.num_classes))  # (N, A, K, H, W)
            objectness = self.objectness(reg).float()[:, :, None]  # (N, A, 1, H, W)
            # the logit of sigmoid(c) sigmoid(o): c + o - log(1 + e^c + e^o)
            joint = -torch.logaddexp(torch.logaddexp(-logits, -objectness), -logits - objectness)
            maps["cls"].append(joint.flatten(1, 2))
            maps["reg"].append(self.reg(reg))
        return Outputs(maps, grid_priors(features, self.levels, self.shapes))

    def loss(self, outputs: Outputs, targets: Sequence[Target], sizes: Tensor | None = None) -> Losses:
        """Compute the focal loss, and the GIoU loss of all positive matches.

        Both are divided by the positive anchors of the batch, at least one per image. An anchor counts in the GIoU loss
        as often as it is matched. Anchors beyond an image's own padding do not count.

        Shape:
            sizes (N, 2), height and width of every image inside the padding, None for no padding.
        """
        anchors = outputs.priors.boxes
        logits = flatten_maps(outputs.maps["cls"], self.num_classes)  # (N, P, K)
        predicted = decode_boxes(anchors, flatten_maps(outputs.maps["reg"], 4).float(), self.most_shift)  # (N, P, 4)
        valid = valid_prior_mask(outputs, self.levels.strides, sizes)  # (N, P)
        matches = [self.matcher.match(anchors, *image) for image in zip(predicted, targets, valid)]
        assigned = torch.stack([m.assigned for m in matches])  # (N, P)
        count = mean_over_ranks((assigned >= 0).sum(dim=1).clamp(min=1).sum())
        matched = torch.cat([boxes[m.priors.flatten()] for boxes, m in zip(predicted, matches)])  # (M, 4)
        wanted = torch.cat([t.boxes.repeat_interleave(m.priors.shape[1], dim=0) for t, m in zip(targets, matches)]).to(
            matched.dtype
        )
        box_losses = giou_loss(matched, wanted) * torch.cat([m.positive.flatten() for m in matches])
        positives = gather_positives(assigned, targets)
        cls_loss = assigned_focal_loss(logits, assigned, positives, self.alpha, self.gamma)
        return {"loss_cls": cls_loss / count, "loss_box": box_losses.sum() / count}

    def decode(self, outputs: Outputs) -> Candidates:
        """Decode boxes (N, P, 4) and scores (N, P, K)."""
        deltas = flatten_maps(outputs.maps["reg"], 4).float()
        scores = flatten_maps(outputs.maps["cls"], self.num_classes).sigmoid()
        return Candidates(decode_boxes(outputs.priors.boxes, deltas, self.most_shift), scores)


def _tower(inputs: int, channels: int, convs: int) -> nn.Sequential:
    """Stack `convs` times a 3x3 convolution, BatchNorm and ReLU."""
    layers: list[nn.Module] = []
    for width in [inputs, *[channels] * (convs - 1)]:
        layers += [conv(width, channels, 3, bias=False), BatchNorm(channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
