"""FreeAnchor's head, with the semantics of MMDetection 3.x.

References:
    "FreeAnchor: Learning to Match Anchors for Visual Object Detection", Zhang et al., 2019.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou

from fusedet.errors import InputError
from fusedet.models.heads.retina import RetinaHead
from fusedet.models.heads.scores import class_scores
from fusedet.models.heads.towers import InteractionFactory, TowerOptions
from fusedet.models.ops.argument_checks import check_focal, check_weight
from fusedet.models.ops.assigners import INSTANCES_AT_ONCE
from fusedet.models.ops.boxes import decode_boxes, encode_boxes
from fusedet.models.ops.layers import flatten_maps
from fusedet.models.ops.losses import bounded_log_loss, mean_over_ranks, negative_focal_loss
from fusedet.models.ops.regression_losses import smooth_l1_loss
from fusedet.types import Candidates, Levels, Losses, Outputs, Target

STDS = (0.1, 0.1, 0.2, 0.2)  # of the box deltas, as in the authors' code


class FreeAnchorHead(RetinaHead):
    """RetinaNet's head that learns by maximum likelihood which anchors match an instance.

    An instance's bag are the `topk` anchors of largest IoU. There is no assignment by thresholds. The weights are those
    of RetinaNet's head; box deltas are divided by (0.1, 0.1, 0.2, 0.2).

    Args:
        levels: As in `RetinaHead`.
        num_classes: As in `RetinaHead`.
        interact: As in `RetinaHead`.
        base_scale: As in `RetinaHead`.
        scales_per_octave: As in `RetinaHead`.
        ratios: As in `RetinaHead`.
        offset: As in `RetinaHead`.
        round_anchors: As in `RetinaHead`.
        topk: Anchors in a bag (section 4.1: 50).
        threshold: IoU of a predicted box with an instance from which its anchor may count as matched (t in eq. 5).
        alpha: Weight of the bags' loss; that of the negatives is 1 - alpha.
        gamma: Exponent of the negatives' focal loss.
        beta: Transition point of the boxes' smooth L1 loss.
        box_weight: Weight of the box loss within an anchor's likelihood (beta in eq. 3).
        prior: Initial score of every anchor.
        **towers: As in `RetinaHead`.

    Raises:
        InputError: An option is out of its range.
    """

    stds: Tensor

    def __init__(
        self,
        levels: Levels,
        num_classes: int,
        interact: InteractionFactory | None = None,
        base_scale: float = 4.0,
        scales_per_octave: int = 3,
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        offset: float = 0.0,
        round_anchors: bool = False,
        topk: int = 50,
        threshold: float = 0.6,
        alpha: float = 0.5,
        gamma: float = 2.0,
        beta: float = 0.11,
        box_weight: float = 0.75,
        prior: float = 0.01,
        **towers: Unpack[TowerOptions],
    ) -> None:
        check_focal(alpha, gamma, prior)
        check_weight("box_weight", box_weight)
        if topk < 1 or not 0 <= threshold < 1 or not beta > 0:
            raise InputError(
                f"topk={topk} must be 1 or more, threshold={threshold} from 0 to below 1, beta={beta} above 0"
            )
        super().__init__(
            levels,
            num_classes,
            interact,
            base_scale=base_scale,
            scales_per_octave=scales_per_octave,
            ratios=ratios,
            offset=offset,
            round_anchors=round_anchors,
            prior=prior,
            **towers,
        )
        self.topk, self.threshold, self.alpha, self.gamma = topk, threshold, alpha, gamma
        self.beta, self.box_weight = beta, box_weight
        self.loss_weights = {"loss_positive": alpha, "loss_negative": 1 - alpha}
        self.register_buffer("stds", torch.tensor(STDS), persistent=False)

    def loss(self, outputs: Outputs, targets: Sequence[Target], sizes: Tensor | None = None) -> Losses:
        """Compute the losses of the bags and of the negatives (eq. 5).

        The first is divided by the number of instances, the second by `topk` times it. `sizes` is unused: anchors
        beyond an image's edge count, as in MMDetection 3.x.
        """
        anchors = outputs.priors.boxes
        logits = flatten_maps(outputs.maps["cls"], self.num_classes).float()  # (N, P, K)
        deltas = flatten_maps(outputs.maps["reg"], 4).float()  # (N, P, 4)
        count = sum(map(len, targets))
        bags, negatives = mean_over_ranks(torch.stack([anchors.new_full((), n) for n in (count, count * self.topk)]))
        positive = [self._bag_losses(anchors, *image) for image in zip(logits, deltas, targets)]
        with torch.no_grad():
            matched = torch.stack([self._match(anchors, *image) for image in zip(deltas, targets)])  # (N, P, K)
            entries = matched.nonzero(as_tuple=True)  # the only synchronization with a GPU
            q = matched[entries]
        x = logits[entries]
        p = x.sigmoid()
        # of few entries p (1 - q) replaces p; 1 - p (1 - q) without cancellation
        change = (p * (1 - q)) ** self.gamma * -((-x).sigmoid() + p * q).log() - p**self.gamma * F.softplus(x)
        every = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device).flatten()
        negative = negative_focal_loss(logits.flatten(0, 1), every, 1.0, self.gamma) + change.sum()
        return {"loss_positive": torch.cat(positive).sum() / bags, "loss_negative": negative / negatives}

    def _bag_losses(self, anchors: Tensor, logits: Tensor, deltas: Tensor, target: Target) -> Tensor:
        """Compute -log of the mean-max of each bag's likelihoods (G,).

        The weights 1 / (1 - likelihood) have a gradient, as in MMDetection.
        """
        boxes = target.boxes.to(anchors.dtype)
        k = min(self.topk, len(anchors))
        bag = torch.cat([box_iou(b, anchors).topk(k, dim=1).indices for b in boxes.split(INSTANCES_AT_ONCE)])  # (G, k)
        wanted = encode_boxes(anchors[bag].flatten(0, 1), boxes.repeat_interleave(k, dim=0)) / self.stds
        costs = smooth_l1_loss(deltas[bag].flatten(0, 1), wanted, self.beta).sum(dim=1).view(-1, k)
        likelihood = logits[bag, target.labels[:, None]].sigmoid() * (-self.box_weight * costs).exp()
        weights = 1 / (1 - likelihood).clamp(min=1e-12)
        return bounded_log_loss((weights * likelihood).sum(dim=1) / weights.sum(dim=1))

    def _match(self, anchors: Tensor, deltas: Tensor, target: Target) -> Tensor:
        """Compute the probability (P, K) that an anchor matches an instance of a class (P{A+} in eq. 6).

        It rises linearly from 0 at an IoU of `threshold` to 1 at the instance's largest IoU.
        """
        predicted = decode_boxes(anchors, deltas * self.stds)
        matched = anchors.new_zeros(self.num_classes, len(anchors))
        for boxes, labels in zip(target.boxes.split(INSTANCES_AT_ONCE), target.labels.split(INSTANCES_AT_ONCE)):
            ious = box_iou(boxes.to(anchors.dtype), predicted)  # (G', P)
            most = ious.amax(dim=1, keepdim=True).clamp(min=self.threshold + 1e-12)
            share = ((ious - self.threshold) / (most - self.threshold)).clamp(0, 1).nan_to_num()
            matched = matched.scatter_reduce(0, labels[:, None].expand_as(share), share, "amax")
        return matched.T

    def decode(self, outputs: Outputs) -> Candidates:
        """Decode boxes (N, P, 4) and scores (N, P, K)."""
        deltas = flatten_maps(outputs.maps["reg"], 4).float() * self.stds
        return Candidates(decode_boxes(outputs.priors.boxes, deltas), class_scores(outputs, self.num_classes))
