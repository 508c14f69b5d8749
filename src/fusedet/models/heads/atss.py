"""ATSS's head, with the semantics of MMDetection 3.x.

References:
    "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training Sample Selection",
    Zhang et al., 2020.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedet.models.heads.fcos import centerness
from fusedet.models.heads.quality_anchors import QualityAnchorHead, QualityOptions, count_positives
from fusedet.models.heads.towers import InteractionFactory
from fusedet.models.ops.assigners import assign_batch, valid_prior_mask
from fusedet.models.ops.atss import ATSSAssigner
from fusedet.models.ops.boxes import box_centers, boxes_to_distances
from fusedet.models.ops.losses import giou_loss, mean_over_ranks
from fusedet.types import Levels, Losses, Outputs, Target


class ATSSHead(QualityAnchorHead):
    """RetinaNet's structure with one square anchor per cell, ATSS's assignment, and FCOS's centerness.

    Args:
        levels: Levels of the pyramid.
        num_classes: K.
        interact: Makes the interaction between the branches; None for no interaction.
        topk: Candidates per level of ATSS.
        box_weight: Weight of the box loss.
        centerness_weight: Weight of the centerness' loss.
        kernel: Side of the last convolutions' kernels (pred_kernel_size).
        offset: Position of an anchor's center in its cell, in strides: 0 at the upper left corner (0.5 in the authors'
            code).
        **options: As in `QualityAnchorHead`.

    Raises:
        InputError: An option is out of its range.
    """

    def __init__(
        self,
        levels: Levels,
        num_classes: int,
        interact: InteractionFactory | None = None,
        topk: int = 9,
        box_weight: float = 2.0,
        centerness_weight: float = 1.0,
        kernel: int = 3,
        offset: float = 0.0,
        **options: Unpack[QualityOptions],
    ) -> None:
        weights = {"loss_cls": 1.0, "loss_box": box_weight, "loss_centerness": centerness_weight}
        super().__init__(levels, num_classes, interact, weights, kernel=kernel, offset=offset, **options)
        self.assigner = ATSSAssigner(topk)

    def loss(self, outputs: Outputs, targets: Sequence[Target], sizes: Tensor | None = None) -> Losses:
        """Compute the focal loss, the GIoU loss and the centerness' binary cross-entropy.

        The focal loss and the cross-entropy are divided by the positives of the batch, at least one per image. The GIoU
        loss is weighted with the anchors' centerness and divided by its sum, at least 1. Anchors beyond an image's own
        padding do not count.

        Shape:
            sizes (N, 2), height and width of every image inside the padding, None for no padding.
        """
        valid = valid_prior_mask(outputs, self.levels.strides, sizes)  # (N, P)
        assigned = assign_batch(self.assigner, outputs.priors, targets, valid)  # (N, P)
        positives, number = count_positives(assigned, targets)
        centers = box_centers(outputs.priors.boxes)[positives.prior]  # (R, 2)
        central = centerness(boxes_to_distances(centers, positives.boxes))  # (R,)
        count, weight = mean_over_ranks(torch.stack([number, central.sum()]))
        box_losses = giou_loss(self.boxes_at(outputs, positives), positives.boxes) * central
        quality = self.quality_at(outputs, positives)
        return {
            "loss_cls": self.focal_loss(outputs, assigned, positives) / count,
            "loss_box": box_losses.sum() / weight,
            "loss_centerness": F.binary_cross_entropy_with_logits(quality, central, reduction="sum") / count,
        }
