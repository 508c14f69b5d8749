"""FCOS: "FCOS: Fully Convolutional One-Stage Object Detection", Tian et al., 2019, with the semantics of MMDetection 3.x."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError, one_of
from fusedet.models.heads import argument_checks
from fusedet.models.heads.towers import InteractionFactory, TwinTowers
from fusedet.models.ops.assigners import PointInBoxAssigner, assign_batch, gather_positives
from fusedet.models.ops.boxes import box_centres, boxes_to_distances, distances_to_boxes, grid_priors, make_base_points
from fusedet.models.ops.layers import conv, flatten_maps, init_normal, init_prior_bias
from fusedet.models.ops.losses import giou_loss, iou_loss, mean_over_ranks, sigmoid_focal_loss
from fusedet.types import Candidates, Features, Levels, Losses, Outputs, Target

BOX_LOSSES = {"iou": iou_loss, "giou": giou_loss}
BoxLoss = Literal["iou", "giou"]


class FCOSHead(nn.Module):
    """Two towers of `convs` convolutions over every level, then, for each cell's centre, class scores, the distances to the four
    sides of its object's box, and how central it lies in the box.

    levels: of the pyramid. num_classes: K. interact: an interaction between the branches, or None.
    channels: of the towers, those of the pyramid by default. norm: GroupNorm(32) in the towers. bias: of the towers' convolutions
    (MMDetection: conv_bias, which is false unless its config says so; the paper's code has them).
    ranges: where the range of distances of one level ends and that of the next begins, in pixels: one number less than levels, 8
    strides of each level but the last by default (64, 128, 256 and 512 for P3 to P7, section 3.2).
    alpha, gamma: of the focal loss. prior: the score that every point starts with. offset: where in its cell a point is, in strides,
    0.5 in the middle (section 3.1), 0 at the upper left corner (torchvision).

    Beyond the first paper, the authors' later improvements ("FCOS: A Simple and Strong Anchor-free Object Detector", 2020), off by
    default; MMDetection's name in brackets:
    center_sampling: only points nearer than radius * stride to a box's centre answer for it. radius (center_sample_radius).
    normalize_boxes (norm_on_bbox): distances in strides, by a ReLU instead of the exponential.
    centerness_on_box (centerness_on_reg): centerness from the box tower instead of the classification tower.
    box_loss (loss_bbox): "iou", -log IoU, or "giou", 1 - GIoU.
    deformable_last (dcn_on_last_conv): each tower's last convolution is deformable and modulated.

    Raises InputError for ranges that do not fit the levels, an unknown box_loss and numbers out of their ranges.
    """

    shapes: Tensor

    def __init__(
        self,
        levels: Levels,
        num_classes: int,
        interact: InteractionFactory = None,
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
        offset: float = 0.5,
    ) -> None:
        super().__init__()
        one_of("box_loss", box_loss, BoxLoss)
        argument_checks.focal(alpha, gamma, prior)
        argument_checks.above_zero("radius", radius)
        limits = tuple(8.0 * stride for stride in levels.strides[:-1]) if ranges is None else tuple(ranges)
        _check(limits, len(levels))
        if deformable_last and convs == 0:
            raise InputError("deformable_last=true needs convs of 1 or more, got 0")
        channels = levels.channels[0] if channels is None else channels
        self.levels, self.num_classes, self.alpha, self.gamma = levels, num_classes, alpha, gamma
        self.normalize_boxes, self.centerness_on_box, self.box_loss = (
            normalize_boxes,
            centerness_on_box,
            BOX_LOSSES[box_loss],
        )
        self.offset = offset
        self.loss_weights = {"loss_cls": 1.0, "loss_box": 1.0, "loss_centerness": 1.0}
        self.assigner = PointInBoxAssigner(limits, radius if center_sampling else None)
        self.register_buffer(
            "shapes", torch.stack([make_base_points(stride) for stride in levels.strides]), persistent=False
        )  # (L, 1, 4)
        self.towers = TwinTowers(levels.channels[0], channels, convs, norm, interact, bias, deformable_last)
        self.cls = conv(channels, num_classes, 3)
        self.reg = conv(channels, 4, 3)
        self.centerness = conv(channels, 1, 3)
        self.scales = nn.Parameter(torch.ones(len(levels)))  # s_i of section 3.2
        init_normal(self)
        init_prior_bias(self.cls.bias, prior)

    def forward(self, features: Features) -> Outputs:
        """Levels (N, C, H, W) to maps "cls" (N, K, H, W) and "centerness" (N, 1, H, W), logits, and "reg" (N, 4, H, W), distances
        to the left, upper, right and lower side: float32, 0 or more, in strides with `normalize_boxes`, else in pixels.
        """
        maps: dict[str, list[Tensor]] = {"cls": [], "reg": [], "centerness": []}
        for feature, scale in zip(features, self.scales, strict=True):
            cls, box = self.towers(feature)
            raw = self.reg(box).float() * scale
            maps["cls"].append(self.cls(cls))
            maps["reg"].append(raw.relu() if self.normalize_boxes else raw.exp())
            maps["centerness"].append(self.centerness(box if self.centerness_on_box else cls))
        return Outputs(maps, grid_priors(features, self.levels, self.shapes, self.offset))

    def loss(self, outputs: Outputs, targets: Sequence[Target], sizes: Tensor | None = None) -> Losses:
        """Focal loss and the centerness' binary cross-entropy, summed and divided by the positives of the batch; the boxes' loss,
        weighted by the wanted centerness and divided by its sum, as in the authors' code (eq. 2 has neither).

        sizes is not used: all points of the canvas count, those beyond an image as background (as in MMDetection 3.x).
        """
        priors = outputs.priors
        logits = flatten_maps(outputs.maps["cls"], self.num_classes)  # (N, P, K)
        distances = flatten_maps(outputs.maps["reg"], 4)  # (N, P, 4)
        centralities = flatten_maps(outputs.maps["centerness"], 1).squeeze(2)  # (N, P)
        owners = assign_batch(self.assigner.assign, priors, targets)  # (N, P)
        image, prior, boxes, classes = gather_positives(owners, targets)
        rows = image * len(priors) + prior
        count = mean_over_ranks((owners >= 0).sum())
        wanted = boxes_to_distances(box_centres(priors.boxes)[prior], boxes)  # (R, 4)
        central = centerness(wanted)
        if self.normalize_boxes:
            wanted = wanted / priors.strides[prior, None]
        origin = wanted.new_zeros(2)  # overlaps do not depend on the place
        apart = self.box_loss(distances_to_boxes(origin, distances[image, prior]), distances_to_boxes(origin, wanted))
        every = torch.ones_like(owners, dtype=torch.bool).flatten()
        unsure = F.binary_cross_entropy_with_logits(centralities[image, prior].float(), central, reduction="sum")
        return {
            "loss_cls": sigmoid_focal_loss(logits.flatten(0, 1), every, rows, classes, self.alpha, self.gamma) / count,
            "loss_box": (apart * central).sum() / mean_over_ranks(central.sum(), least=1e-6),
            "loss_centerness": unsure / count,
        }

    def decode(self, outputs: Outputs) -> Candidates:
        """Boxes (N, P, 4), scores (N, P, K), and the centerness as their quality (N, P)."""
        priors = outputs.priors
        distances = flatten_maps(outputs.maps["reg"], 4)
        if self.normalize_boxes:
            distances = distances * priors.strides[:, None]
        scores = flatten_maps(outputs.maps["cls"], self.num_classes).float().sigmoid()
        quality = flatten_maps(outputs.maps["centerness"], 1).squeeze(2).float().sigmoid()
        return Candidates(distances_to_boxes(box_centres(priors.boxes), distances), scores, quality)


def centerness(distances: Tensor) -> Tensor:
    """How central a point lies in a box, 0..1 (R,), from its distances (R, 4) to left, upper, right and lower side (section 3.3, eq. 3)."""
    x, y = distances[:, 0::2], distances[:, 1::2]  # (R, 2): left and right, upper and lower
    return (x.amin(dim=1) / x.amax(dim=1) * (y.amin(dim=1) / y.amax(dim=1))).sqrt()


def _check(limits: tuple[float, ...], levels: int) -> None:
    ends = (0.0, *limits, math.inf)
    if len(limits) != levels - 1 or any(not low < high for low, high in pairwise(ends)):
        raise InputError(
            f"ranges={list(limits)} must be {levels - 1} increasing numbers above 0, one between each two of {levels} levels"
        )
