"""TOOD's head, with the semantics of MMDetection 3.x.

References:
    "TOOD: Task-aligned One-stage Object Detection", Feng et al., 2021.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError
from fusedet.models.heads.fcos import centerness
from fusedet.models.heads.quality_anchors import decode_deltas
from fusedet.models.heads.task_decomposition import SharedTower, TaskDecomposition, make_alignment, sample_boxes
from fusedet.models.heads.towers import InteractionFactory
from fusedet.models.ops.argument_checks import check_focal, check_length, check_weight
from fusedet.models.ops.assigners import IGNORED, assign_batch, gather_positives, valid_prior_mask
from fusedet.models.ops.atss import ATSSAssigner
from fusedet.models.ops.boxes import box_centers, boxes_to_distances, grid_priors, make_level_points, select_detections
from fusedet.models.ops.cells import boxes_around_cells, cell_positions
from fusedet.models.ops.layers import conv, flatten_maps, init_normal, init_prior_bias
from fusedet.models.ops.losses import giou_loss, mean_over_ranks
from fusedet.models.ops.quality_losses import focal_loss_of_scores, quality_focal_loss_of_scores
from fusedet.models.ops.task_aligned import TaskAlignedAssigner
from fusedet.types import BatchDetections, Candidates, Features, Levels, Losses, Outputs, Target


class TOODHead(nn.Module):
    """A stack of shared convolutions, two task-specific features of all its layers, and aligned scores and boxes.

    Args:
        levels: Levels of the pyramid.
        num_classes: K.
        interact: Makes the interaction between the task-specific features; None for no interaction.
        convs: Number of shared convolutions.
        channels: Channels of the convolutions; those of the pyramid by default.
        norm: Use GroupNorm(32) after the convolutions.
        deformable: Number of shared convolutions, the first ones, that are deformable and modulated, with 4 groups of
            offsets (num_dcn).
        anchor_based: Predict deltas of an anchor instead of distances from the cell (anchor_type).
        base_scale: Side of the anchors, in strides.
        topk: Candidates per level of ATSS.
        initial_epochs: Number of the first epochs, in which ATSS assigns.
        aligned_topk: Candidates of the task-aligned assignment.
        metric_alpha: Exponent of the score in the alignment metric.
        metric_beta: Exponent of the IoU in the alignment metric.
        alpha: Weight of the positives in the focal loss of the first epochs.
        gamma: Exponent of the focal loss of the first epochs.
        beta: Exponent of the quality focal loss.
        prior: Initial value of both factors of a score.
        box_weight: Weight of the box loss.

    Raises:
        InputError: An option is out of its range.
    """

    shapes: Tensor

    def __init__(
        self,
        levels: Levels,
        num_classes: int,
        interact: InteractionFactory | None = None,
        convs: int = 6,
        channels: int | None = None,
        norm: bool = True,
        deformable: int = 0,
        anchor_based: bool = False,
        base_scale: float = 8.0,
        topk: int = 9,
        initial_epochs: int = 4,
        aligned_topk: int = 13,
        metric_alpha: float = 1.0,
        metric_beta: float = 6.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        beta: float = 2.0,
        prior: float = 0.01,
        box_weight: float = 2.0,
    ) -> None:
        super().__init__()
        check_focal(alpha, gamma, prior)
        check_weight("beta", beta)
        check_length("base_scale", base_scale)
        check_weight("box_weight", box_weight)
        if not 0 <= deformable <= convs or convs < 1:
            raise InputError(f"convs={convs} must be 1 or more, and deformable={deformable} 0 to convs")
        channels = levels.channels[0] if channels is None else channels
        self.levels, self.num_classes = levels, num_classes
        self.anchor_based, self.base_scale = anchor_based, base_scale
        self.alpha, self.gamma, self.beta = alpha, gamma, beta
        self.epoch, self.initial_epochs = 0, initial_epochs
        self.loss_weights = {"loss_cls": 1.0, "loss_box": box_weight}
        self.assigner = ATSSAssigner(topk)
        self.aligned_assigner = TaskAlignedAssigner(aligned_topk, metric_alpha, metric_beta)
        self.register_buffer("shapes", make_level_points(levels, base_scale), persistent=False)
        self.shared = SharedTower(levels.channels[0], channels, convs, norm, deformable)
        self.cls_task = TaskDecomposition(channels, convs, norm)
        self.reg_task = TaskDecomposition(channels, convs, norm)
        self.interact = interact(channels) if interact else None
        self.cls = conv(channels, num_classes, 3)
        self.reg = conv(channels, 4, 3)
        self.cls_alignment = make_alignment(channels, convs, 1)
        self.reg_alignment = make_alignment(channels, convs, 8)
        self.scales = nn.Parameter(torch.ones(len(levels)))
        init_normal(self)
        for part in (self.cls_task.attention, self.reg_task.attention, self.reg_alignment):
            init_normal(part, 0.001)
        init_prior_bias(self.cls.bias, prior)
        init_prior_bias(self.cls_alignment[-1].bias, prior)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0, which decides on the assignment."""
        self.epoch = epoch

    def forward(self, features: Features) -> Outputs:
        """Compute the maps "cls", scores, and "reg", boxes (x1, y1, x2, y2) in strides.

        Shape:
            features: levels (N, C, H, W); per level cls (N, K, H, W) in 0..1 and reg (N, 4, H, W), float32 both.
        """
        maps: dict[str, list[Tensor]] = {"cls": [], "reg": []}
        for feature, scale in zip(features, self.scales, strict=True):
            joint = self.shared(feature)  # (N, convs * C, H, W)
            average = joint.mean(dim=(2, 3), keepdim=True)
            cls, reg = self.cls_task(joint, average), self.reg_task(joint, average)
            if self.interact:
                cls, reg = self.interact(cls, reg)
            factors = self.cls(cls).float(), self.cls_alignment(joint).float()
            # the root of the product of two sigmoids (eq. 6), whose gradient is finite
            maps["cls"].append(((F.logsigmoid(factors[0]) + F.logsigmoid(factors[1])) / 2).exp())
            boxes = self._decode_level(self.reg(reg).float(), scale)
            maps["reg"].append(sample_boxes(boxes, self.reg_alignment(joint).float()))
        return Outputs(maps, grid_priors(features, self.levels, self.shapes))

    def _decode_level(self, raw: Tensor, scale: Tensor) -> Tensor:
        """Decode the boxes (N, 4, H, W), in strides, of a level's raw outputs."""
        if not self.anchor_based:
            return boxes_around_cells(raw.exp() * scale)
        cells, half = cell_positions(raw), self.base_scale / 2
        anchors = torch.cat([cells - half, cells + half])  # (4, H, W)
        return decode_deltas(anchors.flatten(1).mT, (raw * scale).flatten(2).mT).mT.unflatten(2, raw.shape[2:])

    def loss(self, outputs: Outputs, targets: Sequence[Target], sizes: Tensor | None = None) -> Losses:
        """Compute the classification loss and the GIoU loss of the epoch.

        In the first epochs they are ATSS's: the focal loss is divided by the positives, the GIoU loss weighted with the
        anchors' centerness. Later the quality focal loss has the target scores of the task-aligned assignment, which
        are also the weights of the GIoU loss. Otherwise each loss is divided by the sum of its weights, at least 1.
        Cells beyond an image's own padding do not count.

        Shape:
            sizes (N, 2), height and width of every image inside the padding, None for no padding.
        """
        priors = outputs.priors
        scores = flatten_maps(outputs.maps["cls"], self.num_classes)  # (N, P, K)
        boxes = flatten_maps(outputs.maps["reg"], 4)  # (N, P, 4), in strides
        valid = valid_prior_mask(outputs, self.levels.strides, sizes)  # (N, P)
        is_initial = self.epoch < self.initial_epochs
        if is_initial:
            assigned, quality = assign_batch(self.assigner, priors, targets, valid), None  # (N, P)
        else:
            pixels = boxes.detach() * priors.strides[:, None]
            assigned, quality = self.aligned_assigner.assign_predictions(scores, pixels, priors, targets, valid)
        image, prior, wanted, classes = gather_positives(assigned, targets)
        rows, counted = image * len(priors) + prior, (assigned != IGNORED).flatten()
        flat = scores.flatten(0, 1)  # (N * P, K)
        if quality is None:
            weights = centerness(boxes_to_distances(box_centers(priors.boxes)[prior], wanted))  # (R,)
            cls_loss = focal_loss_of_scores(flat, counted, rows, classes, self.alpha, self.gamma)
        else:
            weights = quality[image, prior]
            cls_loss = quality_focal_loss_of_scores(flat, counted, rows, classes, weights, self.beta)
        count, weight = mean_over_ranks(
            torch.stack([(assigned >= 0).sum() if is_initial else weights.sum(), weights.sum()])
        )
        box_losses = giou_loss(boxes[image, prior], wanted / priors.strides[prior, None])
        return {"loss_cls": cls_loss / count, "loss_box": (box_losses * weights).sum() / weight}

    def decode(self, outputs: Outputs) -> Candidates:
        """Decode boxes (N, P, 4) and scores (N, P, K)."""
        scores = flatten_maps(outputs.maps["cls"], self.num_classes)
        return Candidates(flatten_maps(outputs.maps["reg"], 4) * outputs.priors.strides[:, None], scores)

    def select(
        self, candidates: Candidates, sizes: Tensor, level_counts: Sequence[int], **options: Any
    ) -> BatchDetections:
        """Select as `select_detections` does, without clipping the boxes to the images."""
        return select_detections(candidates, sizes, level_counts, clip=False, **options)
