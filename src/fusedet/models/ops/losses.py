"""Classification and IoU losses, their weighted sum, and the normalizer averaged over ranks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_area

from fusedet.collectives import count_processes
from fusedet.models.ops.assigners import IGNORED, Positives
from fusedet.models.ops.boxes import aligned_iou
from fusedet.types import Losses

_is_local: ContextVar[bool] = ContextVar("_is_local", default=False)


@contextmanager
def normalizing_locally() -> Iterator[None]:
    """Let `mean_over_ranks` return this process's count, for processes that do not compute losses in lockstep."""
    token = _is_local.set(True)
    try:
        yield
    finally:
        _is_local.reset(token)


@torch.no_grad()
def mean_over_ranks(count: Tensor, least: float = 1.0) -> Tensor:
    """Average a count over all ranks; float, at least `least`. Without distributed training it is the count itself."""
    count = count.detach().float().clone()
    if (world := count_processes()) > 1 and not _is_local.get():
        dist.all_reduce(count)
        count /= world
    return count.clamp(min=least)


def sum_losses(terms: Losses, weights: Mapping[str, float], dtype: torch.dtype = torch.float32) -> Tensor:
    """Sum loss terms, each in `dtype` and with its weight, to the scalar of which training takes the gradient."""
    return torch.stack([value.to(dtype) * weights[name] for name, value in terms.items()]).sum()


def bounded_log_loss(p: Tensor) -> Tensor:
    """Compute -log p of probabilities, at most 100 as in `binary_cross_entropy`; a p of 0 has no gradient."""
    least = torch.finfo(p.dtype).tiny
    return torch.where(p > least, -p.clamp(min=least).log(), 100.0)


def iou_loss(boxes: Tensor, targets: Tensor, eps: float = 1e-6) -> Tensor:
    """Compute -log IoU (R,) of boxes and targets (R, 4), row by row; an IoU counts as at least eps.

    References:
        "UnitBox: An Advanced Object Detection Network", Yu et al., 2016.
    """
    return -aligned_iou(boxes, targets, eps).clamp(min=eps).log()


def giou_loss(boxes: Tensor, targets: Tensor, eps: float = 1e-6) -> Tensor:
    """Compute 1 - GIoU (R,) of boxes and targets (R, 4), row by row; areas count as at least eps.

    The same as `torchvision.ops.generalized_box_iou_loss`, without its boolean masks, each of which synchronizes with
    the GPU.

    References:
        "Generalized Intersection over Union", Rezatofighi et al., 2019, algorithm 2.
    """
    overlap = aligned_iou(boxes, targets, eps)
    # the shared area is overlap * union
    union = ((box_area(boxes) + box_area(targets)) / (1 + overlap)).clamp(min=eps)
    corners = [torch.minimum(boxes[:, :2], targets[:, :2]), torch.maximum(boxes[:, 2:], targets[:, 2:])]
    enclosing = box_area(torch.cat(corners, dim=1)).clamp(min=eps)  # the smallest box around both
    return 1 - overlap + (enclosing - union) / enclosing


def sigmoid_focal_loss(
    logits: Tensor, counted: Tensor, rows: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Compute the sigmoid focal loss of logits, summed over rows and classes.

    Nearly every entry is a negative. All are computed as negatives at once, without a target matrix of their size, and
    the few positive entries are replaced.

    Args:
        logits: One row per prior, all classes.
        counted: Rows with a loss, or the weight of every row; the others are ignored.
        rows: Indices of the positive rows, each counted and each once.
        labels: Class of each positive row.
        alpha: Weight of the positives; the negatives' is 1 - alpha.
        gamma: Exponent of the modulating factor.

    Shape:
        logits (R, K); counted (R,) bool or float; rows and labels (R+,) int64; result: scalar.

    References:
        "Focal Loss for Dense Object Detection", Lin et al., 2017, eq. 5.
    """
    positive = logits[rows, labels].float()  # (R+,)
    p = positive.sigmoid()
    replacement = alpha * (1 - p) ** gamma * F.softplus(-positive) - (1 - alpha) * p**gamma * F.softplus(positive)
    return negative_focal_loss(logits, counted, 1 - alpha, gamma) + (replacement * counted[rows]).sum()


def assigned_focal_loss(
    logits: Tensor,
    assigned: Tensor,
    positives: Positives,
    alpha: float = 0.25,
    gamma: float = 2.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Compute the sigmoid focal loss of an assignment, summed over all priors that are not ignored.

    Args:
        logits: One row per prior, all classes.
        assigned: Assignment of every image, as of `protocols.Assigner`.
        positives: Its positives.
        alpha: As in `sigmoid_focal_loss`.
        gamma: As in `sigmoid_focal_loss`.
        weights: Weight of every prior; None for 1.

    Shape:
        logits (N, P, K); assigned (N, P) int64; weights (P,); result: scalar.
    """
    counted = assigned != IGNORED
    counted = counted if weights is None else counted * weights
    rows = positives.image * assigned.shape[1] + positives.prior
    return sigmoid_focal_loss(logits.flatten(0, 1), counted.flatten(), rows, positives.labels, alpha, gamma)


def focal_loss_rows(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Compute the sigmoid focal loss (R,) of every positive row of logits (R, K) with its class (R,)."""
    x = logits.float()
    p = x.sigmoid()
    negative = (1 - alpha) * p**gamma * F.softplus(x)  # (R, K)
    p, positive = (v.gather(1, labels[:, None]).squeeze(1) for v in (p, x))
    replaced = negative.gather(1, labels[:, None]).squeeze(1)
    return negative.sum(dim=1) - replaced + alpha * (1 - p) ** gamma * F.softplus(-positive)


def negative_focal_loss(logits: Tensor, counted: Tensor, weight: float, gamma: float) -> Tensor:
    """Compute the focal loss of logits as if all were negatives.

    It is the sum of weight * p^gamma * BCE(p, 0) over the counted rows or entries, or of it times their weights.

    Shape:
        logits (R, K); counted (R,) or (R, K), bool or float; result: scalar.
    """
    total: Tensor = _NegativeFocal.apply(logits, counted, weight, gamma)
    return total


class _NegativeFocal(torch.autograd.Function):
    """Sum over the counted rows or entries of weight * sigmoid(x)^gamma * softplus(x).

    The forward pass computes the gradient, so that nothing else is saved for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, counted: Tensor, weight: float, gamma: float) -> Tensor:
        x = logits.float()
        p, cost = x.sigmoid(), F.softplus(x)
        scale = p**gamma
        scale *= (counted if counted.ndim == 2 else counted[:, None]) * weight
        total = torch.dot(scale.flatten(), cost.flatten())
        if ctx.needs_input_grad[0]:
            # d/dx p^g s = p^g (g (1 - p) s + p)
            scale *= cost.mul_(1 - p).mul_(gamma).add_(p)
            ctx.dtype = logits.dtype
            # float16 would round small gradients to zero before the loss scale multiplies them
            ctx.save_for_backward(scale if logits.dtype == torch.float16 else scale.to(logits.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (local,) = ctx.saved_tensors
        return (local * grads[0]).to(ctx.dtype), None, None, None
