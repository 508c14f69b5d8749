"""PAA's head, with the semantics of MMDetection 3.x.

References:
    "Probabilistic Anchor Assignment with IoU Prediction for Object Detection", Kim and Lee, 2020.
"""

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedet.errors import InputError
from fusedet.models.heads.quality_anchors import QualityAnchorHead, QualityOptions, decode_deltas
from fusedet.models.heads.scores import fuse_quality
from fusedet.models.heads.towers import InteractionFactory
from fusedet.models.ops.argument_checks import check_iou_thresholds
from fusedet.models.ops.assigners import MaxIoUAssigner, assign_batch, gather_positives, valid_prior_mask
from fusedet.models.ops.boxes import aligned_iou, clip_boxes, select_detections
from fusedet.models.ops.layers import flatten_maps
from fusedet.models.ops.losses import focal_loss_rows, giou_loss, mean_over_ranks
from fusedet.models.ops.paa import separate_positives
from fusedet.types import BatchDetections, Candidates, Levels, Losses, Outputs, Target

VOTING_VARIANCE = 0.025  # sigma_t of eq. 12
VOTING_IOU = 0.01  # from which a candidate votes
PAIRS = 10  # pairs of anchor and class of a level that enter NMS, in units of pre_nms
LEAST_SUM = 1e-6  # lower bound of the sum of the positives' IoU


class PAAHead(QualityAnchorHead):
    """ATSS's structure with PAA's assignment by the head's own losses, a predicted IoU, and score voting.

    Args:
        levels: Levels of the pyramid.
        num_classes: K.
        interact: Makes the interaction between the branches; None for no interaction.
        positive: IoU from which an anchor may be positive.
        topk: Candidates per instance and level.
        box_weight: Weight of the box loss, also in the assignment.
        iou_weight: Weight of the predicted IoU's loss.
        voting: Average every detected box with the candidates of its class around it (section 3.3).
        **options: As in `QualityAnchorHead`.

    Raises:
        InputError: An option is out of its range.
    """

    def __init__(
        self,
        levels: Levels,
        num_classes: int,
        interact: InteractionFactory | None = None,
        positive: float = 0.1,
        topk: int = 9,
        box_weight: float = 1.3,
        iou_weight: float = 0.5,
        voting: bool = True,
        **options: Unpack[QualityOptions],
    ) -> None:
        check_iou_thresholds(positive, positive)
        if topk < 1:
            raise InputError(f"topk={topk} must be 1 or more")
        weights = {"loss_cls": 1.0, "loss_box": box_weight, "loss_iou": iou_weight}
        super().__init__(levels, num_classes, interact, weights, **options)
        self.assigner, self.topk, self.voting = MaxIoUAssigner(positive, positive), topk, voting

    def loss(self, outputs: Outputs, targets: Sequence[Target], sizes: Tensor | None = None) -> Losses:
        """Compute the focal loss, the GIoU loss and the predicted IoU's binary cross-entropy.

        The focal loss is divided by the positives of the batch or the number of its images, whichever is larger, the
        cross-entropy by the positives. The GIoU loss is weighted with the positives' IoU and divided by its sum.
        Anchors beyond an image's own padding do not count.

        Shape:
            sizes (N, 2), height and width of every image inside the padding, None for no padding.
        """
        assigned = self.assign(outputs, targets, sizes)  # (N, P)
        positives = gather_positives(assigned, targets)
        boxes = self.boxes_at(outputs, positives)
        iou = aligned_iou(boxes.detach(), positives.boxes)
        number = (assigned >= 0).sum()
        quality = self.quality_at(outputs, positives)
        return {
            "loss_cls": self.focal_loss(outputs, assigned, positives) / mean_over_ranks(number, len(targets)),
            "loss_box": (giou_loss(boxes, positives.boxes) * iou).sum() / mean_over_ranks(iou.sum(), LEAST_SUM),
            "loss_iou": F.binary_cross_entropy_with_logits(quality, iou, reduction="sum") / mean_over_ranks(number),
        }

    @torch.no_grad()
    def assign(self, outputs: Outputs, targets: Sequence[Target], sizes: Tensor | None = None) -> Tensor:
        """Assign the anchors of every image (N, P) by their IoU, and keep the positives of low losses (section 3.2)."""
        priors = outputs.priors
        valid = valid_prior_mask(outputs, self.levels.strides, sizes)  # (N, P)
        assigned = assign_batch(self.assigner, priors, targets, valid)  # (N, P)
        image, prior, boxes, labels = gather_positives(assigned, targets)
        logits = flatten_maps(outputs.maps["cls"], self.num_classes)[image, prior]  # (R, K)
        deltas = flatten_maps(outputs.maps["reg"], 4)[image, prior]  # (R, 4)
        box_losses = giou_loss(decode_deltas(priors.boxes[prior], deltas), boxes)
        costs = focal_loss_rows(logits, labels, self.alpha, self.gamma) + self.loss_weights["loss_box"] * box_losses
        table = costs.new_zeros(assigned.shape).index_put((image, prior), costs)
        return separate_positives(assigned, table, priors, targets, self.topk)

    def decode(self, outputs: Outputs) -> Candidates:
        """Decode boxes (N, P, 4) and scores (N, P, K), the roots of class scores times predicted IoU (eq. 11)."""
        return fuse_quality(super().decode(outputs))

    def select(
        self, candidates: Candidates, sizes: Tensor, level_counts: Sequence[int], **options: Any
    ) -> BatchDetections:
        """Select as `select_detections` does, but the `pre_nms` best anchors of a level, and vote for the boxes.

        An anchor counts with all its classes. NMS takes the best `PAIRS` * pre_nms pairs of a level; MMDetection takes
        all, with the same result unless so many pairs leave fewer than `max_det` detections.

        Shape:
            sizes (N, 2); result: boxes (N, D, 4), scores (N, D), labels (N, D), counts (N,).
        """
        limit = options.pop("pre_nms", 1000)
        candidates, counts = best_priors(candidates, level_counts, limit)
        boxes, scores = clip_boxes(candidates.boxes, sizes), candidates.scores
        chosen = select_detections(candidates, sizes, counts, pre_nms=limit * min(PAIRS, self.num_classes), **options)
        if not self.voting or boxes.is_meta:
            return chosen
        least = options.get("score", 0.05)
        limits = least if isinstance(least, (int, float)) else torch.tensor(least, device=scores.device)
        votes = torch.where(scores > limits, scores, 0.0)  # (N, P, K)
        votes = votes.mT.gather(1, chosen.labels[..., None].expand(-1, -1, votes.shape[1]))  # (N, D, P)
        iou = aligned_iou(chosen.boxes[:, :, None], boxes[:, None])  # (N, D, P)
        votes = torch.where(iou > VOTING_IOU, votes * (-(1 - iou).square() / VOTING_VARIANCE).exp(), 0.0)
        total = votes.sum(dim=2, keepdim=True)
        voted = votes @ boxes / total.clamp(min=torch.finfo(votes.dtype).tiny)
        return chosen._replace(boxes=torch.where(total > 0, voted, chosen.boxes))


def best_priors(candidates: Candidates, level_counts: Sequence[int], limit: int) -> tuple[Candidates, list[int]]:
    """Keep the `limit` priors of every level with the highest scores, all classes of them; candidates and counts."""
    boxes, scores, start = [], [], 0
    for level in candidates.scores.split(list(level_counts), dim=1):
        best = level.amax(dim=2).topk(torch.sym_min(limit, level.shape[1]), dim=1).indices[..., None]  # (N, R, 1)
        scores.append(level.gather(1, best.expand(-1, -1, level.shape[2])))
        boxes.append(candidates.boxes.gather(1, (best + start).expand(-1, -1, 4)))
        start = start + level.shape[1]
    return Candidates(torch.cat(boxes, dim=1), torch.cat(scores, dim=1)), [s.shape[1] for s in scores]
