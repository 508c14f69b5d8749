"""DDOD's head, with the semantics of MMDetection 3.x.

References:
    "Disentangle Your Dense Object Detector", Chen et al., 2021.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedet.errors import InputError
from fusedet.models.heads.quality_anchors import QualityAnchorHead, QualityOptions, count_positives
from fusedet.models.heads.scores import class_scores
from fusedet.models.heads.towers import InteractionFactory
from fusedet.models.ops.assigners import valid_prior_mask
from fusedet.models.ops.atss import ATSSAssigner
from fusedet.models.ops.boxes import aligned_iou
from fusedet.models.ops.losses import giou_loss, mean_over_ranks
from fusedet.types import Levels, Losses, Outputs, Target

_LEAST_SPREAD = 1e-10  # added to the difference of the levels' counts before the division


class DDODHead(QualityAnchorHead):
    """ATSS's structure with an assignment for each branch, towers that begin deformable, and weighted levels.

    Args:
        levels: Levels of the pyramid.
        num_classes: K.
        interact: Makes the interaction between the branches; None for no interaction.
        deformable_first: Make each tower's first convolution deformable (use_dcn).
        topk: Candidates per level of ATSS.
        cls_exponent: Exponent of the IoU in the classification's assignment; that of the score is 1 minus it.
        box_exponent: The same in the assignment of the boxes.
        box_weight: Weight of the box loss.
        iou_weight: Weight of the predicted IoU's loss.
        **options: As in `QualityAnchorHead`.

    Attributes:
        level_counts: (L,) int64, the positives of each level in the training up to now; saved with the weights.

    Raises:
        InputError: An option is out of its range.
    """

    level_counts: Tensor

    def __init__(
        self,
        levels: Levels,
        num_classes: int,
        interact: InteractionFactory | None = None,
        deformable_first: bool = True,
        topk: int = 9,
        cls_exponent: float = 0.8,
        box_exponent: float = 0.5,
        box_weight: float = 2.0,
        iou_weight: float = 1.0,
        **options: Unpack[QualityOptions],
    ) -> None:
        if not (0 <= cls_exponent <= 1 and 0 <= box_exponent <= 1):
            raise InputError(f"cls_exponent={cls_exponent} and box_exponent={box_exponent} must be 0 to 1")
        weights = {"loss_cls": 1.0, "loss_box": box_weight, "loss_iou": iou_weight}
        super().__init__(levels, num_classes, interact, weights, deformable_first=deformable_first, **options)
        self.assigner = ATSSAssigner(topk)
        self.cls_exponent, self.box_exponent = cls_exponent, box_exponent
        self.register_buffer("level_counts", torch.zeros(len(levels), dtype=torch.int64))

    def loss(self, outputs: Outputs, targets: Sequence[Target], sizes: Tensor | None = None) -> Losses:
        """Compute the focal loss, the GIoU loss and the predicted IoU's binary cross-entropy, and count positives.

        The focal loss is divided by the positives of the classification's assignment, the other two by those of the
        boxes' assignment, at least one per image both. Every level has a weight (section 3.3). Anchors beyond an
        image's own padding do not count.

        Shape:
            sizes (N, 2), height and width of every image inside the padding, None for no padding.
        """
        assigned = self.assign(outputs, targets, sizes, self.cls_exponent)  # (N, P)
        positives, number = count_positives(assigned, targets)
        box_assigned = self.assign(outputs, targets, sizes, self.box_exponent)  # (N, P)
        box_positives, box_number = count_positives(box_assigned, targets)
        count, box_count = mean_over_ranks(torch.stack([number, box_number]))
        weights, box_weights = (self.count_levels(x, outputs.priors.counts) for x in (assigned, box_assigned))  # (P,)
        boxes = self.boxes_at(outputs, box_positives)
        iou = aligned_iou(boxes.detach(), box_positives.boxes)
        quality = F.binary_cross_entropy_with_logits(self.quality_at(outputs, box_positives), iou, reduction="none")
        own = box_weights[box_positives.prior]  # (R,)
        return {
            "loss_cls": self.focal_loss(outputs, assigned, positives, weights) / count,
            "loss_box": (giou_loss(boxes, box_positives.boxes) * own).sum() / box_count,
            "loss_iou": (quality * own).sum() / box_count,
        }

    @torch.no_grad()
    def assign(
        self, outputs: Outputs, targets: Sequence[Target], sizes: Tensor | None = None, exponent: float = 0.8
    ) -> Tensor:
        """Assign the anchors of every image (N, P) as ATSS does, by score^(1 - exponent) * IoU^exponent (eq. 3).

        Scores and boxes are the predicted ones.

        Args:
            outputs: Raw outputs of the head.
            targets: Of each image.
            sizes: (N, 2) height and width inside the padding; None for no padding.
            exponent: Of the IoU, in 0..1.
        """
        valid = valid_prior_mask(outputs, self.levels.strides, sizes)  # (N, P)
        scores = class_scores(outputs, self.num_classes)  # (N, P, K)
        boxes = self.decode_all(outputs)  # (N, P, 4)

        def assign_image(i: int, target: Target) -> Tensor:
            def similarity(indices: Tensor, instances: Tensor) -> Tensor:
                score = scores[i, indices, target.labels[:, None]]  # (G, M)
                return score ** (1 - exponent) * aligned_iou(boxes[i, indices], instances) ** exponent

            return self.assigner.assign_by(similarity, outputs.priors, target, valid[i])

        return torch.stack([assign_image(i, target) for i, target in enumerate(targets)])

    def count_levels(self, assigned: Tensor, counts: Sequence[int]) -> Tensor:
        """Add an assignment's positives to the levels' counts, and compute the weights (P,) of the levels' anchors.

        They fall linearly from 2 for the level of the fewest positives to 1 for that of the most (eq. 5). Without
        gradients nothing is counted.
        """
        number = torch.stack([(level >= 0).sum() for level in assigned.split(list(counts), dim=1)])
        total = self.level_counts + number
        if torch.is_grad_enabled():
            self.level_counts.copy_(total)
        spread = (total - total.amin()).float()
        weights = 2 - spread / (spread.amax() + _LEAST_SPREAD)  # (L,)
        return torch.cat([weight.expand(n) for weight, n in zip(weights, counts)])
