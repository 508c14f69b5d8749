"""Losses, summed, and the normaliser that all ranks share."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def mean_over_ranks(count: Tensor) -> Tensor:
    """The mean of a count over all processes, at least 1; float. One process: the count itself."""
    count = count.detach().float().clone()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(count)
        count /= dist.get_world_size()
    return count.clamp(min=1.0)


def sigmoid_focal(logits: Tensor, counted: Tensor, rows: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss (RetinaNet, 2017, eq. 5) of logits (R, K), summed over rows and classes.

    counted (R,) bool: the others, neither object nor background, have no loss. rows, labels (R+,) int64: the rows that answer for an
    object, each counted and named once, and its class.
    Nearly every entry is a negative, so all are taken as negatives at once, without a target matrix of their size, and
    the few positive entries are exchanged.
    """
    positive = logits[rows, labels].float()  # (R+,)
    p = positive.sigmoid()
    exchange = alpha * (1 - p) ** gamma * F.softplus(-positive) - (1 - alpha) * p**gamma * F.softplus(positive)
    negatives: Tensor = _NegativeFocal.apply(logits, counted, 1 - alpha, gamma)
    return negatives + exchange.sum()


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
