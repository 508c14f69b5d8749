"""RepPoints' head, with the semantics of MMDetection 3.x.

References:
    "RepPoints: Point Set Representation for Object Detection", Yang et al., 2019.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError, require_choice
from fusedet.models.heads.scores import class_scores
from fusedet.models.heads.towers import InteractionFactory, TwinTowers
from fusedet.models.ops.argument_checks import check_focal, check_iou_thresholds, check_length, check_loss_weights
from fusedet.models.ops.assigners import (
    MaxIoUAssigner,
    Positives,
    assign_batch,
    gather_positives,
    valid_prior_mask,
)
from fusedet.models.ops.boxes import box_centers, grid_priors, make_level_points
from fusedet.models.ops.deformable import DeformConv
from fusedet.models.ops.layers import conv, flatten_maps, init_normal, init_prior_bias
from fusedet.models.ops.losses import assigned_focal_loss, mean_over_ranks
from fusedet.models.ops.point_assigner import PointAssigner
from fusedet.types import Candidates, Features, Levels, Losses, Outputs, Priors, Target

Transform = Literal["moment", "minmax", "partial_minmax"]
PARTIAL_POINTS = 4  # of partial_minmax (the authors' code; the paper says "a subset")


class RepPointsHead(nn.Module):
    """Two towers, initial points around each cell, then class logits and refined points from the features there.

    Args:
        levels: Levels of the pyramid.
        num_classes: K.
        interact: Makes the interaction between the branches; None for no interaction. The initial
            points too are predicted from its outputs.
        convs: Number of convolutions in each tower.
        channels: Channels of the towers; those of the pyramid by default.
        point_channels: Channels of the points' features; those of the towers by default.
        norm: Use GroupNorm(32) in the towers, which then have no biases (MMDetection's gn-head).
        num_points: Points per set, the square of an odd number.
        transform_method: Box of a set of points (section 3.2): "moment", mean and standard deviation times two learned
            factors; "minmax", the box around all points; "partial_minmax", around the first four.
        gradient_mul: Share of the sampling points' gradient that reaches the initial points.
        moment_mul: Share of the gradient that reaches the learned factors.
        base_scale: Length that the box losses count as 1, and scale of the first assignment, in strides.
        positive: IoU of the initial box from which a cell is positive in the second assignment (section 4).
        negative: IoU below which it is background.
        beta: Transition point of the smooth L1 loss.
        init_weight: Weight of the initial boxes' loss.
        refine_weight: Weight of the refined boxes' loss.
        alpha: Weight of the positives in the focal loss.
        gamma: Exponent of the focal loss.
        prior: Initial score of every cell.

    Raises:
        InputError: An option is unknown or out of its range.
    """

    base: Tensor
    shapes: Tensor

    def __init__(
        self,
        levels: Levels,
        num_classes: int,
        interact: InteractionFactory | None = None,
        convs: int = 3,
        channels: int | None = None,
        point_channels: int | None = None,
        norm: bool = False,
        num_points: int = 9,
        transform_method: Transform = "moment",
        gradient_mul: float = 0.1,
        moment_mul: float = 0.01,
        base_scale: float = 4.0,
        positive: float = 0.5,
        negative: float = 0.4,
        beta: float = 0.11,
        init_weight: float = 0.5,
        refine_weight: float = 1.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        prior: float = 0.01,
    ) -> None:
        super().__init__()
        require_choice("transform_method", transform_method, Transform)
        check_focal(alpha, gamma, prior)
        check_iou_thresholds(positive, negative)
        check_length("base_scale", base_scale)
        kernel = math.isqrt(max(num_points, 0))
        if kernel < 3 or kernel % 2 == 0 or kernel**2 != num_points:
            raise InputError(f"num_points={num_points} must be the square of 3, 5, 7, ...: 9, 25, 49, ...")
        for key, value in (("gradient_mul", gradient_mul), ("moment_mul", moment_mul)):
            if not 0 <= value <= 1:
                raise InputError(f"{key}={value} must be 0 to 1")
        if not beta >= 0:
            raise InputError(f"beta={beta} must be 0 or more")
        channels = levels.channels[0] if channels is None else channels
        width = channels if point_channels is None else point_channels
        if width < 1:
            raise InputError(f"channels={channels}, point_channels={point_channels} must be at least 1")
        self.levels, self.num_classes, self.alpha, self.gamma = levels, num_classes, alpha, gamma
        self.num_points, self.transform_method = num_points, transform_method
        self.gradient_mul, self.moment_mul, self.base_scale, self.beta = gradient_mul, moment_mul, base_scale, beta
        self.loss_weights = {"loss_cls": 1.0, "loss_init": init_weight, "loss_refine": refine_weight}
        check_loss_weights(self.loss_weights)
        self.init_assigner, self.refine_assigner = PointAssigner(base_scale), MaxIoUAssigner(positive, negative)
        self.register_buffer("shapes", make_level_points(levels, base_scale), persistent=False)
        steps = torch.arange(kernel, dtype=torch.float32) - kernel // 2
        grid = torch.cartesian_prod(steps, steps).view(1, 2 * num_points, 1, 1)  # (dy, dx) pairs
        self.register_buffer("base", grid, persistent=False)

        self.towers = TwinTowers(levels.channels[0], channels, convs, norm, interact, bias=not norm)
        self.pts_init_conv = conv(channels, width, 3)
        self.pts_init = conv(width, 2 * num_points, 1)
        self.cls_conv = DeformConv(channels, width, kernel)
        self.cls = conv(width, num_classes, 1)
        self.pts_refine_conv = DeformConv(channels, width, kernel)
        self.pts_refine = conv(width, 2 * num_points, 1)
        # logs of lambda_x, lambda_y
        self.moment_transfer = nn.Parameter(torch.zeros(2)) if transform_method == "moment" else None
        init_normal(self)
        init_prior_bias(self.cls.bias, prior)

    def forward(self, features: Features) -> Outputs:
        """Compute the maps "cls", logits, and "pts_init" and "pts_refine", offsets of the points from their cell.

        Shape:
            features: levels (N, C, H, W); per level cls (N, K, H, W), and pts_init and pts_refine
            (N, 2 * num_points, H, W), float32, (dy, dx) pairs in strides.
        """
        levels = [self._forward_level(feature) for feature in features]
        maps = {name: list(column) for name, column in zip(("cls", "pts_init", "pts_refine"), zip(*levels))}
        return Outputs(maps, grid_priors(features, self.levels, self.shapes))

    def _forward_level(self, feature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cls, pts = self.towers(feature)
        init = self.pts_init(F.relu(self.pts_init_conv(pts))).float()  # (N, 2 * num_points, H, W)
        offset = scale_gradient(init, self.gradient_mul) - self.base
        logits = self.cls(F.relu(self.cls_conv(cls, offset)))
        refinement = self.pts_refine(F.relu(self.pts_refine_conv(pts, offset))).float()
        return logits, init, init.detach() + refinement

    def pseudo_boxes(self, points: Tensor) -> Tensor:
        """Convert sets of points to boxes: the function T of section 3.2.

        Shape:
            points (..., 2 * num_points), (y, x) pairs; result (..., 4).
        """
        xy = points.float().unflatten(-1, (-1, 2)).flip(-1)  # (..., num_points, 2)
        if self.moment_transfer is not None:
            middle = xy.mean(dim=-2)
            deviation = (xy - middle.unsqueeze(-2)).norm(dim=-2) / math.sqrt(self.num_points - 1)  # unbiased
            half = deviation * scale_gradient(self.moment_transfer.float(), self.moment_mul).exp()
            return torch.cat([middle - half, middle + half], dim=-1)
        subset = xy[..., :PARTIAL_POINTS, :] if self.transform_method == "partial_minmax" else xy
        return torch.cat([subset.amin(dim=-2), subset.amax(dim=-2)], dim=-1)

    def loss(self, outputs: Outputs, targets: Sequence[Target], sizes: Tensor | None = None) -> Losses:
        """Compute the focal loss and the smooth L1 losses of the initial and of the refined boxes.

        The smooth L1 losses are those of the corners in `base_scale` strides. Each loss is divided by its positives of
        the batch, at least one per image. Initial points are assigned by position and size (`PointAssigner`), scores
        and refined points by the initial box's IoU (`MaxIoUAssigner`). Cells beyond an image's own padding do not
        count.

        Shape:
            sizes (N, 2), height and width of every image inside the padding, None for no padding.
        """
        priors = outputs.priors
        logits = flatten_maps(outputs.maps["cls"], self.num_classes)  # (N, P, K)
        # (N, P, 2 * num_points) each
        init, refine = (flatten_maps(outputs.maps[name], 2 * self.num_points) for name in ("pts_init", "pts_refine"))
        with torch.no_grad():
            boxes = self._decode_boxes(priors, init)  # (N, P, 4)
        valid = valid_prior_mask(outputs, self.levels.strides, sizes)  # (N, P)
        assigned_init = assign_batch(self.init_assigner, priors, targets, valid)  # (N, P)
        assigned = torch.stack(
            [self.refine_assigner.match_boxes(b, t, v)[0] for b, t, v in zip(boxes, targets, valid, strict=True)]
        )
        first, second = gather_positives(assigned_init, targets), gather_positives(assigned, targets)
        counts = torch.stack([(a >= 0).sum(dim=1).clamp(min=1).sum() for a in (assigned_init, assigned)])
        count_init, count = mean_over_ranks(counts)
        cls_loss = assigned_focal_loss(logits, assigned, second, self.alpha, self.gamma)
        return {
            "loss_cls": cls_loss / count,
            "loss_init": self._box_loss(priors, init, first) / count_init,
            "loss_refine": self._box_loss(priors, refine, second) / count,
        }

    def _box_loss(self, priors: Priors, points: Tensor, positives: Positives) -> Tensor:
        """Sum over the positives of the smooth L1 loss between their points' boxes and their instances' boxes."""
        center, stride = box_centers(priors.boxes[positives.prior]).repeat(1, 2), priors.strides[positives.prior, None]
        wanted = (positives.boxes - center) / stride  # (R, 4)
        predicted = self.pseudo_boxes(points[positives.image, positives.prior])
        scale = self.base_scale
        return F.smooth_l1_loss(predicted / scale, wanted / scale, reduction="sum", beta=self.beta)

    def _decode_boxes(self, priors: Priors, points: Tensor) -> Tensor:
        """Decode points (N, P, 2 * num_points) in strides to boxes (N, P, 4) in pixels."""
        return box_centers(priors.boxes).repeat(1, 2) + self.pseudo_boxes(points) * priors.strides[:, None]

    def decode(self, outputs: Outputs) -> Candidates:
        """Decode the refined boxes (N, P, 4) and scores (N, P, K)."""
        boxes = self._decode_boxes(outputs.priors, flatten_maps(outputs.maps["pts_refine"], 2 * self.num_points))
        return Candidates(boxes, class_scores(outputs, self.num_classes))


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return x, through which only `factor` of the gradient flows back."""
    return torch.lerp(x.detach(), x, factor)
