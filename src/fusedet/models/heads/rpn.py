"""Region proposal network (RPN) on a pyramid, with the semantics of MMDetection 3.x.

References:
    "Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks", Ren et al., 2015.
    "Feature Pyramid Networks for Object Detection", Lin et al., 2017.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError, require_choice
from fusedet.models.heads.towers import InteractionFactory, make_tower
from fusedet.models.ops.argument_checks import check_anchors, check_iou_thresholds
from fusedet.models.ops.assigners import IGNORED, MaxIoUAssigner, assign_batch, gather_positives, valid_prior_mask
from fusedet.models.ops.boxes import (
    clip_boxes,
    decode_boxes,
    encode_boxes,
    grid_priors,
    make_cell_anchors,
    nms_keep_mask_by_level,
    select_detections,
)
from fusedet.models.ops.layers import conv, flatten_maps, init_normal
from fusedet.models.ops.losses import mean_over_ranks
from fusedet.models.ops.regression_losses import l1_loss, smooth_l1_loss
from fusedet.models.ops.samplers import Sampler
from fusedet.models.ops.scale_ranges import ScaleRange, ignore_outside_ranges, is_in_range
from fusedet.types import BatchDetections, Candidates, Features, Levels, Losses, Outputs, Proposals, Target

RegressionLoss = Literal["l1", "smooth_l1"]


class RPNHead(nn.Module):
    """A convolution on every level, then objectness logits and box deltas for A anchors per cell.

    Args:
        levels: Levels of the pyramid.
        num_classes: Unused, the head is class-agnostic.
        interact: Must be None: there is one branch.
        convs: Number of shared 3x3 convolutions.
        channels: Their channels; those of the pyramid by default.
        scale: Side of the anchors, in strides, or several sides (C4 detectors).
        ratios: Height / width of the anchors; A = len(ratios) per side.
        round_anchors: Round the anchors' corners to whole pixels (torchvision, Detectron).
        offset: Position of an anchor's center in its cell, in strides: 0 at the upper left corner (0.5 in MMDetection
            1.x).
        positive: IoU from which an anchor is positive (section 3.1.2).
        negative: IoU below which an anchor is background.
        min_positive: Minimum IoU of an instance's best anchors to be positive.
        allowed_border: Maximum pixels that training anchors may reach outside their image (section 3.1.3: 0); None for
            no limit.
        num: Samples per image, as in `ops.samplers.Sampler`.
        fraction: Maximum share of positives among them.
        most_negatives: Maximum negatives per positive; None for no limit.
        loss: Loss of the deltas: "l1" or "smooth_l1".
        beta: Transition point of "smooth_l1".
        nms: IoU threshold of NMS among the proposals of one level.
        proposals: Maximum proposals per image at inference.
        train_proposals: Maximum proposals per image in training.
        train_pre_nms: Maximum proposals per level that enter NMS in training.

    Raises:
        InputError: There is an interaction, or an option is unknown or out of its range.
    """

    shapes: Tensor

    def __init__(
        self,
        levels: Levels,
        num_classes: int = 1,
        interact: InteractionFactory | None = None,
        convs: int = 1,
        channels: int | None = None,
        scale: float | Sequence[float] = 8.0,
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        round_anchors: bool = False,
        offset: float = 0.0,
        positive: float = 0.7,
        negative: float = 0.3,
        min_positive: float = 0.3,
        allowed_border: float | None = None,
        num: int = 256,
        fraction: float = 0.5,
        most_negatives: float | None = None,
        loss: RegressionLoss = "l1",
        beta: float = 1 / 9,
        nms: float = 0.7,
        proposals: int = 1000,
        train_proposals: int = 1000,
        train_pre_nms: int = 2000,
    ) -> None:
        super().__init__()
        require_choice("loss", loss, RegressionLoss)
        check_iou_thresholds(positive, negative)
        check_anchors("scale", scale, ratios)
        if interact:
            raise InputError("the RPN has one branch, an interaction needs two: leave model.interact null")
        if min(proposals, train_proposals, train_pre_nms) < 1 or convs < 1:
            raise InputError(
                f"proposals={proposals}, train_proposals={train_proposals}, train_pre_nms={train_pre_nms}, "
                f"convs={convs} must be at least 1"
            )
        if allowed_border is not None and not allowed_border >= 0:
            raise InputError(f"allowed_border={allowed_border} must be 0 or more, in pixels, or null: no limit")
        channels = levels.channels[0] if channels is None else channels
        self.levels, self.num_classes, self.nms, self.offset = levels, 1, nms, offset
        self.allowed_border = allowed_border
        self.proposals, self.train_proposals, self.train_pre_nms = proposals, train_proposals, train_pre_nms
        self.regression_loss = l1_loss if loss == "l1" else partial(smooth_l1_loss, beta=beta)
        self.loss_weights = {"loss_rpn_cls": 1.0, "loss_rpn_box": 1.0}
        self.assigner = MaxIoUAssigner(positive, negative, min_positive)
        self.sampler = Sampler(num, fraction, most_negatives)
        scales = torch.tensor([scale] if isinstance(scale, (int, float)) else list(scale), dtype=torch.float64)
        shapes = torch.stack([make_cell_anchors(stride * scales, ratios) for stride in levels.strides])  # (L, A, 4)
        self.register_buffer("shapes", shapes.round() if round_anchors else shapes, persistent=False)
        self.tower = make_tower(levels.channels[0], channels, convs)
        self.cls = conv(channels, shapes.shape[1], 1)
        self.reg = conv(channels, 4 * shapes.shape[1], 1)
        init_normal(self)

    def forward(self, features: Features) -> Outputs:
        """Compute the maps "cls", logits, and "reg", box deltas.

        Shape:
            features: levels (N, C, H, W); per level cls (N, A, H, W) and reg (N, A * 4, H, W).
        """
        shared = [self.tower(f) for f in features]
        maps = {"cls": [self.cls(x) for x in shared], "reg": [self.reg(x) for x in shared]}
        return Outputs(maps, grid_priors(features, self.levels, self.shapes, self.offset))

    def loss(
        self,
        outputs: Outputs,
        targets: Sequence[Target],
        sizes: Tensor | None = None,
        ranges: Sequence[ScaleRange] | None = None,
    ) -> Losses:
        """Compute the binary cross-entropy of the sampled anchors and the deltas' loss of the positive ones.

        Both are divided by the number of samples; an image counts for at least one positive and one negative
        (MMDetection 3.x). Anchors beyond an image's own padding or, with `allowed_border`, its edge are never sampled.

        Args:
            outputs: Raw outputs of the head.
            targets: Ground truth of each image.
            sizes: (N, 2), height and width of every image inside the padding, None for no padding.
            ranges: Valid range of every image; None for no limits. Anchors that overlap an instance outside it are
                ignored.
        """
        priors = outputs.priors
        valid = valid_prior_mask(outputs, self.levels.strides, sizes, self.allowed_border)  # (N, P)
        assigned = assign_batch(self.assigner, priors, targets, valid)  # (N, P)
        if ranges is not None:
            assigned = ignore_outside_ranges(assigned, priors.boxes, targets, ranges)
        sampled = self.sampler.sample(assigned)
        positive = sampled & (assigned >= 0)
        counts = [mask.sum(dim=1).clamp(min=1) for mask in (positive, sampled & ~positive)]  # (N,) each
        count = mean_over_ranks(torch.cat(counts).sum())
        # all anchors with a weight, not a selection of them, which would synchronize with a GPU
        logits = flatten_maps(outputs.maps["cls"], 1).squeeze(2).float().masked_fill(~sampled, 0)
        image, prior, boxes, _ = gather_positives(assigned.masked_fill(~sampled, IGNORED), targets)
        deltas = flatten_maps(outputs.maps["reg"], 4)[image, prior].float()
        return {
            "loss_rpn_cls": F.binary_cross_entropy_with_logits(
                logits, positive.float(), weight=sampled.float(), reduction="sum"
            )
            / count,
            "loss_rpn_box": self.regression_loss(deltas, encode_boxes(priors.boxes[prior], boxes)).sum() / count,
        }

    def decode(self, outputs: Outputs) -> Candidates:
        """Decode boxes (N, P, 4) and scores (N, P, 1)."""
        scores = flatten_maps(outputs.maps["cls"], 1).float().sigmoid()
        return Candidates(decode_boxes(outputs.priors.boxes, flatten_maps(outputs.maps["reg"], 4).float()), scores)

    def select(
        self, candidates: Candidates, sizes: Tensor, level_counts: Sequence[int], **options: Any
    ) -> BatchDetections:
        """Select the detections of an RPN without RoI stages: NMS among those of one level, as between classes.

        Args and options are those of `ops.boxes.select_detections`.
        """
        levels = torch.arange(len(level_counts), device=sizes.device)
        level = torch.cat([n.expand(count) for n, count in zip(levels, level_counts)])  # (P,)
        by_level = candidates.scores * (level[:, None] == levels)  # (N, P, L)
        score = options.get("score", 0.0)
        options["score"] = score if isinstance(score, (int, float)) else score[0]  # that of the one class
        selected = select_detections(candidates._replace(scores=by_level), sizes, level_counts, **options)
        return selected._replace(labels=torch.zeros_like(selected.labels))

    @torch.no_grad()
    def propose(
        self,
        outputs: Outputs,
        sizes: Tensor,
        pre_nms: int = 1000,
        to_train: bool = False,
        ranges: Sequence[ScaleRange] | None = None,
    ) -> Proposals:
        """Select each image's proposals, without gradient.

        Per level: the best anchors by score, decoded and clipped, without empty boxes, after NMS. Then the best of all
        levels together.

        Args:
            outputs: Raw outputs of the head.
            sizes: (N, 2), height and width of every image inside the padding.
            pre_nms: Proposals per level that enter NMS.
            to_train: Use the limits for training instead.
            ranges: Valid range of every image, outside which nothing is proposed; None for no limits.
        """
        most, limit = (self.train_pre_nms, self.train_proposals) if to_train else (pre_nms, self.proposals)
        boxes, scores = [], []
        levels = zip(outputs.maps["cls"], outputs.maps["reg"], outputs.priors.boxes.split(list(outputs.priors.counts)))
        for cls, reg, priors in levels:
            logits = flatten_maps([cls], 1).squeeze(2)  # (N, P)
            best, index = logits.topk(torch.sym_min(most, priors.shape[0]), dim=1)  # (N, M)
            deltas = flatten_maps([reg], 4).gather(1, index[..., None].expand(-1, -1, 4))
            proposed = clip_boxes(decode_boxes(priors[index], deltas.float()), sizes)  # (N, M, 4)
            valid = (proposed[..., 2] > proposed[..., 0]) & (proposed[..., 3] > proposed[..., 1])
            if ranges is not None:
                valid &= torch.stack([is_in_range(own, limits) for own, limits in zip(proposed, ranges)])
            score = best.float().sigmoid().masked_fill(~valid, -1)
            boxes.append(proposed)
            scores.append(score)
        all_scores = torch.cat(scores, dim=1).masked_fill(~nms_keep_mask_by_level(boxes, scores, self.nms), -1)
        best, index = all_scores.topk(torch.sym_min(limit, all_scores.shape[1]), dim=1)  # (N, R)
        chosen = torch.cat(boxes, dim=1).gather(1, index[..., None].expand(-1, -1, 4))
        real = best >= 0
        return Proposals(chosen * real[..., None], best.clamp(min=0), real.sum(dim=1))
