"""FSAF's anchor-free head, with the semantics of MMDetection 3.x.

References:
    "Feature Selective Anchor-Free Module for Single-Shot Object Detection", Zhu et al., 2019.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError
from fusedet.models.heads.scores import class_scores
from fusedet.models.heads.towers import InteractionFactory, TwinTowers
from fusedet.models.ops.argument_checks import check_focal
from fusedet.models.ops.assigners import gather_positives, valid_prior_mask
from fusedet.models.ops.boxes import box_centers, grid_priors, make_level_points
from fusedet.models.ops.layers import conv, flatten_maps, init_normal, init_prior_bias
from fusedet.models.ops.losses import iou_loss, mean_over_ranks, negative_focal_loss
from fusedet.models.ops.region_assigners import CenterRegionAssigner
from fusedet.types import Candidates, Features, Levels, Losses, Outputs, Priors, Target

UNIT = 4.0  # of the predicted distances, in strides
LEAST_DISTANCE = 1e-4  # in the loss, so that no predicted box is empty
BOX_BIAS = 0.25  # initial distance, so that the ReLU is open


class FSAFHead(nn.Module):
    """Two towers, then class logits and distances to the box's sides; each instance selects its level by the loss.

    Args:
        levels: Levels of the pyramid.
        num_classes: K.
        interact: Makes the interaction between the branches; None for no interaction.
        convs: Number of convolutions in each tower.
        channels: Channels of the towers; those of the pyramid by default.
        norm: Use GroupNorm(32) in the towers.
        bias: Give the towers' convolutions a bias.
        scale: Size of the central part of a box whose cells are positive, in sizes of the box.
        alpha: Weight of the positives in the focal loss.
        gamma: Exponent of the focal loss.
        prior: Initial score of every cell.

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
        scale: float = 0.2,
        alpha: float = 0.25,
        gamma: float = 2.0,
        prior: float = 0.01,
    ) -> None:
        super().__init__()
        check_focal(alpha, gamma, prior)
        if not 0 < scale <= 1:
            raise InputError(f"scale={scale} must be above 0 and at most 1")
        channels = levels.channels[0] if channels is None else channels
        self.levels, self.num_classes, self.alpha, self.gamma = levels, num_classes, alpha, gamma
        self.loss_weights = {"loss_cls": 1.0, "loss_box": 1.0}
        self.assigner = CenterRegionAssigner(num_classes, scale)
        self.register_buffer("shapes", make_level_points(levels), persistent=False)
        self.towers = TwinTowers(levels.channels[0], channels, convs, norm, interact, bias)
        self.cls = conv(channels, num_classes, 3)
        self.reg = conv(channels, 4, 3)
        init_normal(self)
        nn.init.constant_(self.reg.bias, BOX_BIAS)  # type: ignore[arg-type]
        init_prior_bias(self.cls.bias, prior)

    def forward(self, features: Features) -> Outputs:
        """Compute the maps "cls", logits, and "reg", distances to the upper, lower, left and right side.

        Shape:
            features: levels (N, C, H, W); per level cls (N, K, H, W), and reg (N, 4, H, W), float32, 0 or more, in
            units of 4 strides.
        """
        towers = [self.towers(f) for f in features]
        maps = {"cls": [self.cls(c) for c, _ in towers], "reg": [self.reg(r).float().relu() for _, r in towers]}
        return Outputs(maps, grid_priors(features, self.levels, self.shapes))

    def loss(self, outputs: Outputs, targets: Sequence[Target], sizes: Tensor | None = None) -> Losses:
        """Compute the focal loss and the IoU loss, -log IoU, of each instance on its best level.

        The best level is that of the lowest mean loss of the instance's cells, both losses together (section 3.2). On
        other levels its cells lose the loss of their class. Both sums are divided by the positives on best levels, or,
        without any, by the number of images. Cells beyond an image's own padding do not count.

        Shape:
            sizes (N, 2), height and width of every image inside the padding, None for no padding.
        """
        priors = outputs.priors
        logits = flatten_maps(outputs.maps["cls"], self.num_classes)  # (N, P, K)
        valid = valid_prior_mask(outputs, self.levels.strides, sizes)  # (N, P)
        pairs = [self.assigner.assign_with_contested(priors, *image) for image in zip(targets, valid)]
        assigned, contested = (torch.stack(column) for column in zip(*pairs))  # (N, P), (N, P, K)
        image, prior, boxes, classes = gather_positives(assigned, targets)
        counted = valid[..., None] & ~contested
        distances = flatten_maps(outputs.maps["reg"], 4)[image, prior].clamp(min=LEAST_DISTANCE)
        box_losses = iou_loss(_decode(box_centers(priors.boxes)[prior], distances, priors.strides[prior]), boxes)
        own = logits[image, prior, classes].float()
        gains = self.alpha * (-own).sigmoid() ** self.gamma * F.softplus(-own)
        with torch.no_grad():
            x = logits[image, prior].float()  # (R, K)
            rest = (1 - self.alpha) * x.sigmoid() ** self.gamma * F.softplus(x) * counted[image, prior]
            row_losses = gains + rest.sum(dim=1) - rest.gather(1, classes[:, None])[:, 0] + box_losses
            kept = self._select_levels(row_losses, image, assigned[image, prior], prior, priors, targets)
            counted = counted.index_put((image, prior, classes), torch.zeros_like(kept))
            number = kept.sum()
            count = mean_over_ranks(torch.where(number > 0, number, len(targets)))
        negative = negative_focal_loss(logits.flatten(0, 1), counted.flatten(0, 1), 1 - self.alpha, self.gamma)
        return {"loss_cls": (negative + (gains * kept).sum()) / count, "loss_box": (box_losses * kept).sum() / count}

    def _select_levels(
        self,
        losses: Tensor,
        image: Tensor,
        instance: Tensor,
        prior: Tensor,
        priors: Priors,
        targets: Sequence[Target],
    ) -> Tensor:
        """Compute which positives (R,) lie on the level of their instance's lowest mean loss, the finest on ties."""
        most = max(map(len, targets))
        index = torch.cat([prior.new_full((n,), i) for i, n in enumerate(priors.counts)])
        level, row = index[prior], image * most + instance  # (R,)
        cell = row * len(self.levels) + level
        empty = losses.new_zeros(len(targets) * most * len(self.levels))
        sums, counts = empty.index_add(0, cell, losses), empty.index_add(0, cell, torch.ones_like(losses))
        means = torch.where(counts > 0, sums / counts.clamp(min=1), torch.inf)
        best = means.view(-1, len(self.levels)).min(dim=1).indices  # (N * G,)
        return best[row] == level

    def decode(self, outputs: Outputs) -> Candidates:
        """Decode boxes (N, P, 4) and scores (N, P, K)."""
        priors = outputs.priors
        boxes = _decode(box_centers(priors.boxes), flatten_maps(outputs.maps["reg"], 4), priors.strides)
        return Candidates(boxes, class_scores(outputs, self.num_classes))


def _decode(points: Tensor, distances: Tensor, strides: Tensor) -> Tensor:
    """Compute boxes (..., P, 4) of points (P, 2) and distances (..., P, 4), upper side first, in units of 4 strides."""
    top, bottom, left, right = (distances * (UNIT * strides[:, None])).unbind(dim=-1)
    x, y = points.unbind(dim=-1)
    return torch.stack([x - left, y - top, x + right, y + bottom], dim=-1)
