"""Box regression losses, element by element, without reduction."""

import math

import torch
from torch import Tensor


def l1_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Compute |pred - target|, of their shape."""
    return (pred - target).abs()


def smooth_l1_loss(pred: Tensor, target: Tensor, beta: float | Tensor = 1.0) -> Tensor:
    """Compute the smooth L1 loss of x = |pred - target|: x^2 / (2 beta) below beta, x - beta / 2 from there on.

    References:
        "Fast R-CNN", Girshick, 2015, eq. 3.
    """
    x = (pred - target).abs()
    return torch.where(x < beta, 0.5 * x * x / beta, x - 0.5 * beta)


def balanced_l1_loss(pred: Tensor, target: Tensor, alpha: float = 0.5, gamma: float = 1.5, beta: float = 1.0) -> Tensor:
    """Compute the balanced L1 loss of x = |pred - target|.

    It is alpha / b (b x + 1) ln(b x + 1) - alpha x below beta = 1, and gamma x + C from there on, with
    alpha ln(b + 1) = gamma. Other values of beta, and the constant C, follow MMDetection 3.x.

    References:
        "Libra R-CNN", Pang et al., 2019, eq. 9 and 10.
    """
    x = (pred - target).abs()
    b = math.exp(gamma / alpha) - 1
    near = alpha / b * (b * x + 1) * (b * x / beta + 1).log() - alpha * x
    return torch.where(x < beta, near, gamma * x + gamma / b - alpha * beta)


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """Compute the distribution focal loss (...) of logits (..., bins + 1) for distances (...) in 0..bins.

    It is the cross-entropy of the two bins around a distance, weighted by their nearness.

    References:
        "Generalized Focal Loss", Li et al., 2020, eq. 6.
    """
    lower = distances.floor()
    share = distances - lower  # of the upper bin
    costs = -logits.log_softmax(dim=-1)
    below, above = (costs.gather(-1, (lower.long() + i)[..., None]).squeeze(-1) for i in (0, 1))
    return below * (1 - share) + above * share
