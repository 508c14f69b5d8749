"""What ATSS, PAA and DDOD share: one square anchor per cell, two towers, and a quality logit beside the box."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fusedet.errors import InputError
from fusedet.models.heads.scores import class_scores
from fusedet.models.heads.towers import InteractionFactory, TowerOptions, TwinTowers
from fusedet.models.ops.argument_checks import check_focal, check_length, check_loss_weights
from fusedet.models.ops.assigners import Positives, gather_positives
from fusedet.models.ops.boxes import decode_boxes, grid_priors, make_level_points
from fusedet.models.ops.layers import conv, flatten_maps, init_normal, init_prior_bias
from fusedet.models.ops.losses import assigned_focal_loss
from fusedet.types import Candidates, Features, Levels, Outputs, Target

SHIFT_UNIT, SIZE_UNIT = 0.1, 0.2  # of the box deltas: the center's shift in anchors, and the log of the size ratio


class QualityOptions(TowerOptions, total=False):
    """Options that ATSS, PAA and DDOD pass on to `QualityAnchorHead`, which states them and their defaults."""

    base_scale: float
    alpha: float
    gamma: float
    prior: float


class QualityAnchorHead(nn.Module):
    """Two towers, then for each cell class logits, deltas of its square anchor, and the logit of the box's quality.

    Subclasses state the assignment and the losses.

    Args:
        levels: Levels of the pyramid.
        num_classes: K.
        interact: Makes the interaction between the branches; None for no interaction.
        loss_weights: Weight in the total of every loss.
        convs: Number of convolutions in each tower.
        channels: Channels of the towers; those of the pyramid by default.
        norm: Use GroupNorm(32) in the towers.
        bias: Give the towers' convolutions a bias.
        base_scale: Side of the anchors, in strides.
        alpha: Weight of the positives in the focal loss.
        gamma: Exponent of the focal loss.
        prior: Initial score of every anchor.
        deformable_first: Make each tower's first convolution deformable.
        kernel: Side of the last convolutions' kernels.
        offset: Position of an anchor's center in its cell, in strides, 0 at the upper left corner.

    Raises:
        InputError: An option is out of its range.
    """

    shapes: Tensor

    def __init__(
        self,
        levels: Levels,
        num_classes: int,
        interact: InteractionFactory | None,
        loss_weights: dict[str, float],
        convs: int = 4,
        channels: int | None = None,
        norm: bool = True,
        bias: bool = False,
        base_scale: float = 8.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        prior: float = 0.01,
        deformable_first: bool = False,
        kernel: int = 3,
        offset: float = 0.0,
    ) -> None:
        super().__init__()
        check_focal(alpha, gamma, prior)
        if kernel < 1 or kernel % 2 == 0:
            raise InputError(f"kernel={kernel} must be odd, such as 1 or 3")
        check_length("base_scale", base_scale)
        check_loss_weights(loss_weights)
        channels = levels.channels[0] if channels is None else channels
        self.levels, self.num_classes, self.alpha, self.gamma = levels, num_classes, alpha, gamma
        self.offset = offset
        self.loss_weights = loss_weights
        self.register_buffer("shapes", make_level_points(levels, base_scale), persistent=False)
        self.towers = TwinTowers(
            levels.channels[0], channels, convs, norm, interact, bias, deformable_first=deformable_first
        )
        self.cls = conv(channels, num_classes, kernel)
        self.reg = conv(channels, 4, kernel)
        self.quality = conv(channels, 1, kernel)
        self.scales = nn.Parameter(torch.ones(len(levels)))
        init_normal(self)
        init_prior_bias(self.cls.bias, prior)

    def forward(self, features: Features) -> Outputs:
        """Compute the maps "cls" and "quality", logits, and "reg", box deltas in their units.

        Shape:
            features: levels (N, C, H, W); per level cls (N, K, H, W), reg (N, 4, H, W), float32, and quality
            (N, 1, H, W).
        """
        maps: dict[str, list[Tensor]] = {"cls": [], "reg": [], "quality": []}
        for feature, scale in zip(features, self.scales, strict=True):
            cls, reg = self.towers(feature)
            maps["cls"].append(self.cls(cls))
            maps["reg"].append(self.reg(reg).float() * scale)
            maps["quality"].append(self.quality(reg))
        return Outputs(maps, grid_priors(features, self.levels, self.shapes, self.offset))

    def decode_all(self, outputs: Outputs) -> Tensor:
        """Decode the boxes (N, P, 4) of all anchors."""
        return decode_deltas(outputs.priors.boxes, flatten_maps(outputs.maps["reg"], 4))

    def decode(self, outputs: Outputs) -> Candidates:
        """Decode boxes (N, P, 4), scores (N, P, K), and their predicted quality (N, P)."""
        quality = flatten_maps(outputs.maps["quality"], 1).squeeze(2).float().sigmoid()
        return Candidates(self.decode_all(outputs), class_scores(outputs, self.num_classes), quality)

    def boxes_at(self, outputs: Outputs, positives: Positives) -> Tensor:
        """Decode the boxes (R, 4) of the positives."""
        deltas = flatten_maps(outputs.maps["reg"], 4)[positives.image, positives.prior]
        return decode_deltas(outputs.priors.boxes[positives.prior], deltas)

    def quality_at(self, outputs: Outputs, positives: Positives) -> Tensor:
        """Return the quality logits (R,), float32, of the positives."""
        return flatten_maps(outputs.maps["quality"], 1)[positives.image, positives.prior, 0].float()

    def focal_loss(
        self, outputs: Outputs, assigned: Tensor, positives: Positives, weights: Tensor | None = None
    ) -> Tensor:
        """Compute the focal loss of an assignment (N, P), summed over all anchors that are not ignored.

        Args:
            outputs: Raw outputs of the head.
            assigned: (N, P) index of the instance, or background or ignored.
            positives: The positives among them.
            weights: (P,) of the anchors; None for 1.
        """
        logits = flatten_maps(outputs.maps["cls"], self.num_classes)  # (N, P, K)
        return assigned_focal_loss(logits, assigned, positives, self.alpha, self.gamma, weights)


def decode_deltas(anchors: Tensor, deltas: Tensor) -> Tensor:
    """Decode deltas (..., P, 4), in units of `SHIFT_UNIT` and `SIZE_UNIT`, on anchors (P, 4) to boxes (..., P, 4)."""
    return decode_boxes(anchors, torch.cat([deltas[..., :2] * SHIFT_UNIT, deltas[..., 2:] * SIZE_UNIT], dim=-1))


def count_positives(assigned: Tensor, targets: Sequence[Target]) -> tuple[Positives, Tensor]:
    """Collect the positives of an assignment (N, P), and their number, of which an image counts at least one."""
    return gather_positives(assigned, targets), (assigned >= 0).sum(dim=1).clamp(min=1).sum()
