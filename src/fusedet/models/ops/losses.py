"""Losses, summed, and the normaliser that all ranks share."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_area

from fusedet.models.ops.boxes import aligned_iou


@torch.no_grad()
def mean_over_ranks(count: Tensor, least: float = 1.0) -> Tensor:
    """The mean of a count over all processes, at least `least`; float. One process: the count itself."""
    count = count.detach().float().clone()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(count)
        count /= dist.get_world_size()
    return count.clamp(min=least)


def iou_loss(boxes: Tensor, targets: Tensor, eps: float = 1e-6) -> Tensor:
    """-log IoU (R,) of boxes and targets (R, 4) in the same row ("UnitBox", Yu et al., 2016); an overlap counts as at least eps."""
    return -aligned_iou(boxes, targets, eps).clamp(min=eps).log()


def giou_loss(boxes: Tensor, targets: Tensor, eps: float = 1e-6) -> Tensor:
    """1 - GIoU (R,) of boxes and targets (R, 4) in the same row (Rezatofighi et al., 2019, algorithm 2); areas count as at least eps.

    As torchvision.ops.generalized_box_iou_loss, but without its masks, for each of which a GPU is waited for.
    """
    overlap = aligned_iou(boxes, targets, eps)
    union = ((box_area(boxes) + box_area(targets)) / (1 + overlap)).clamp(
        min=eps
    )  # as the shared area is overlap * union
    corners = [torch.minimum(boxes[:, :2], targets[:, :2]), torch.maximum(boxes[:, 2:], targets[:, 2:])]
    hull = box_area(torch.cat(corners, dim=1)).clamp(min=eps)  # the smallest box around both
    return 1 - overlap + (hull - union) / hull


def sigmoid_focal_loss(
    logits: Tensor, counted: Tensor, rows: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Focal loss (RetinaNet, 2017, eq. 5) of logits (R, K), summed over rows and classes.

    counted (R,) bool: the others, neither object nor background, have no loss. rows, labels (R+,) int64: the rows that answer for an
    object, each counted and named once, and its class.
    Nearly every entry is a negative, so all are taken as negatives at once, without a target matrix of their size, and
    the few positive entries are exchanged.
    """
    positive = logits[rows, labels].float()  # (R+,)
    p = positive.sigmoid()
    exchange = alpha * (1 - p) ** gamma * F.softplus(-positive) - (1 - alpha) * p**gamma * F.softplus(positive)
    return negative_focal_loss(logits, counted, 1 - alpha, gamma) + exchange.sum()


def negative_focal_loss(logits: Tensor, counted: Tensor, weight: float, gamma: float) -> Tensor:
    """The focal loss of logits (R, K) as if all were negatives: the sum of weight * p^gamma * BCE(p, 0) over the counted (R,) bool rows."""
    total: Tensor = _NegativeFocal.apply(logits, counted, weight, gamma)
    return total


class _NegativeFocal(torch.autograd.Function):
    """Sum over the rows that count of weight * sigmoid(x)^gamma * softplus(x).

    The gradient is made in the forward pass, so that it is all that is kept of it.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, counted: Tensor, weight: float, gamma: float) -> Tensor:
        x = logits.float()
        p, cost = x.sigmoid(), F.softplus(x)
        scale = p**gamma
        scale *= counted[:, None] * weight
        total = torch.dot(scale.flatten(), cost.flatten())
        if ctx.needs_input_grad[0]:
            # d/dx p^g s = p^g (g (1 - p) s + p)
            scale *= cost.mul_(1 - p).mul_(gamma).add_(p)
            ctx.dtype = logits.dtype
            # float16 would round small gradients to zero before the loss scale has reached them
            ctx.save_for_backward(scale if logits.dtype == torch.float16 else scale.to(logits.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (local,) = ctx.saved_tensors
        return (local * grads[0]).to(ctx.dtype), None, None, None
