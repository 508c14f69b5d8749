"""Region proposals: "Faster R-CNN", Ren et al., 2015, on a pyramid (FPN, 2017), with the semantics of MMDetection 3.x."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError, one_of
from fusedet.models.heads import argument_checks
from fusedet.models.heads.towers import InteractionFactory, tower
from fusedet.models.ops.assigners import IGNORED, MaxIoUAssigner, assign_batch, gather_positives, valid_prior_mask
from fusedet.models.ops.boxes import (
    clip_boxes,
    decode_boxes,
    encode_boxes,
    grid_priors,
    make_base_anchors,
    nms_keep_mask,
)
from fusedet.models.ops.layers import conv, flatten_maps, init_normal
from fusedet.models.ops.losses import mean_over_ranks
from fusedet.models.ops.regression_losses import l1_loss, smooth_l1_loss
from fusedet.models.ops.samplers import Sampler
from fusedet.types import Candidates, Features, Levels, Losses, Outputs, Proposals, Target

CodeLoss = Literal["l1", "smooth_l1"]


class RPNHead(nn.Module):
    """A convolution over every level, then for A anchors per cell a score, object or not, and a box code.

    levels: of the pyramid. num_classes: not used, there is one: object. interact: must be None, there is one branch.
    convs, channels (those of the pyramid by default): of the shared 3x3 convolutions. scale: an anchor's side in strides.
    ratios: height / width; A = len(ratios). round_anchors: to whole pixels, as torchvision and Detectron have them.
    offset: where in its cell an anchor's centre is, in strides, 0 at the upper left corner (0.5 in MMDetection 1.x).
    positive, negative, min_positive: overlaps of the assignment (3.1.2). num, fraction, most_negatives: of `ops.samplers.Sampler`.
    allowed_border: by how many pixels anchors that are learned from may reach outside their image (3.1.3: 0), None: by any number.
    loss: of codes, "l1" or "smooth_l1" from beta on. nms: proposals of one level that overlap a better one by more are left out.
    proposals: how many of an image are handed on, train_proposals in training, where train_pre_nms of a level reach the suppression.
    Raises InputError for an interaction, an unknown loss and numbers out of their ranges.
    """

    shapes: Tensor

    def __init__(
        self,
        levels: Levels,
        num_classes: int = 1,
        interact: InteractionFactory = None,
        convs: int = 1,
        channels: int | None = None,
        scale: float = 8.0,
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
        loss: CodeLoss = "l1",
        beta: float = 1 / 9,
        nms: float = 0.7,
        proposals: int = 1000,
        train_proposals: int = 1000,
        train_pre_nms: int = 2000,
    ) -> None:
        super().__init__()
        one_of("loss", loss, CodeLoss)
        argument_checks.overlaps(positive, negative)
        argument_checks.anchors("scale", scale, ratios)
        if interact:
            raise InputError("the RPN has one branch, an interaction needs two: leave model.interact null")
        if min(proposals, train_proposals, train_pre_nms) < 1 or convs < 1:
            counts = f"proposals={proposals}, train_proposals={train_proposals}, train_pre_nms={train_pre_nms}, convs={convs}"
            raise InputError(f"{counts} must be at least 1")
        if allowed_border is not None and not allowed_border >= 0:
            raise InputError(f"allowed_border={allowed_border} must be 0 or more, in pixels, or null: no limit")
        channels = levels.channels[0] if channels is None else channels
        self.levels, self.num_classes, self.nms, self.offset = levels, 1, nms, offset
        self.allowed_border = allowed_border
        self.proposals, self.train_proposals, self.train_pre_nms = proposals, train_proposals, train_pre_nms
        self.cost = l1_loss if loss == "l1" else partial(smooth_l1_loss, beta=beta)
        self.loss_weights = {"loss_rpn_cls": 1.0, "loss_rpn_box": 1.0}
        self.assigner = MaxIoUAssigner(positive, negative, min_positive)
        self.sampler = Sampler(num, fraction, most_negatives)
        shapes = torch.stack([make_base_anchors(stride, scale, 1, ratios) for stride in levels.strides])  # (L, A, 4)
        self.register_buffer("shapes", shapes.round() if round_anchors else shapes, persistent=False)
        self.tower = tower(levels.channels[0], channels, convs)
        self.cls = conv(channels, len(ratios), 1)
        self.reg = conv(channels, 4 * len(ratios), 1)
        init_normal(self)

    def forward(self, features: Features) -> Outputs:
        """Levels (N, C, H, W) to maps "cls" (N, A, H, W), logits, and "reg" (N, A * 4, H, W), codes."""
        shared = [self.tower(f) for f in features]
        maps = {"cls": [self.cls(x) for x in shared], "reg": [self.reg(x) for x in shared]}
        return Outputs(maps, grid_priors(features, self.levels, self.shapes, self.offset))

    def loss(self, outputs: Outputs, targets: Sequence[Target], sizes: Tensor | None = None) -> Losses:
        """Binary cross-entropy of the sampled anchors and the loss of the positive ones' codes, both divided by the number of samples.

        An image counts for at least one positive and one negative (MMDetection 3.x). sizes (N, 2): of the images inside the canvas,
        None: all of it. Anchors beyond an image's own padding or, with `allowed_border`, its edge are never sampled.
        """
        priors = outputs.priors
        valid = valid_prior_mask(outputs, self.levels.strides, sizes, self.allowed_border)  # (N, P)
        owners = assign_batch(self.assigner.assign, priors, targets, valid)  # (N, P)
        drawn = self.sampler.sample(owners)
        positive = drawn & (owners >= 0)
        numbers = [mask.sum(dim=1).clamp(min=1) for mask in (positive, drawn & ~positive)]  # (N,) each
        count = mean_over_ranks(torch.cat(numbers).sum())
        logits = flatten_maps(outputs.maps["cls"], 1).squeeze(2)[drawn].float()
        found = gather_positives(owners.masked_fill(~drawn, IGNORED), targets)
        codes = flatten_maps(outputs.maps["reg"], 4)[found.image, found.prior].float()
        return {
            "loss_rpn_cls": F.binary_cross_entropy_with_logits(logits, positive[drawn].float(), reduction="sum")
            / count,
            "loss_rpn_box": self.cost(codes, encode_boxes(priors.boxes[found.prior], found.boxes)).sum() / count,
        }

    def decode(self, outputs: Outputs) -> Candidates:
        """Boxes (N, P, 4) and scores (N, P, 1)."""
        scores = flatten_maps(outputs.maps["cls"], 1).float().sigmoid()
        return Candidates(decode_boxes(outputs.priors.boxes, flatten_maps(outputs.maps["reg"], 4).float()), scores)

    @torch.no_grad()
    def propose(self, outputs: Outputs, sizes: Tensor, pre_nms: int = 1000, to_train: bool = False) -> Proposals:
        """The best boxes of each image of sizes (N, 2): per level the `pre_nms` best by score, clipped, those that have an area, after
        suppression within their level; of all levels together the best. to_train: as many as training takes."""
        most, limit = (self.train_pre_nms, self.train_proposals) if to_train else (pre_nms, self.proposals)
        boxes, scores = [], []
        levels = zip(outputs.maps["cls"], outputs.maps["reg"], outputs.priors.boxes.split(list(outputs.priors.counts)))
        for cls, reg, priors in levels:
            logits = flatten_maps([cls], 1).squeeze(2)  # (N, P)
            best, places = logits.topk(min(most, len(priors)), dim=1)  # (N, M)
            codes = flatten_maps([reg], 4).gather(1, places[..., None].expand(-1, -1, 4))
            found = clip_boxes(decode_boxes(priors[places], codes.float()), sizes)  # (N, M, 4)
            real = (found[..., 2] > found[..., 0]) & (found[..., 3] > found[..., 1])
            score = best.float().sigmoid().masked_fill(~real, -1)
            boxes.append(found)
            scores.append(score.masked_fill(~nms_keep_mask(found, score, self.nms), -1))
        every = torch.cat(scores, dim=1)
        best, places = every.topk(min(limit, every.shape[1]), dim=1)  # (N, R)
        chosen = torch.cat(boxes, dim=1).gather(1, places[..., None].expand(-1, -1, 4))
        there = best >= 0
        return Proposals(chosen * there[..., None], best.clamp(min=0), there.sum(dim=1))
