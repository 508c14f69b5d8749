"""Losses of box regression, element by element; the caller sums them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def l1_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """|x| of the differences, in their shape."""
    return (found - wanted).abs()


def smooth_l1_loss(found: Tensor, wanted: Tensor, beta: float | Tensor = 1.0) -> Tensor:
    """x^2 / (2 beta) below beta, |x| - beta / 2 from there on ("Fast R-CNN", Girshick, 2015, eq. 3)."""
    x = (found - wanted).abs()
    return torch.where(x < beta, 0.5 * x * x / beta, x - 0.5 * beta)


def balanced_l1_loss(
    found: Tensor, wanted: Tensor, alpha: float = 0.5, gamma: float = 1.5, beta: float = 1.0
) -> Tensor:
    """alpha / b (b |x| + 1) ln(b |x| + 1) - alpha |x| below beta = 1, gamma |x| + C from there on ("Libra R-CNN", Pang et al., 2019,
    eq. 9 and 10, with alpha ln(b + 1) = gamma); beta as MMDetection 3.x has it, its constant C included."""
    x = (found - wanted).abs()
    b = math.exp(gamma / alpha) - 1
    near = alpha / b * (b * x + 1) * (b * x / beta + 1).log() - alpha * x
    return torch.where(x < beta, near, gamma * x + gamma / b - alpha * beta)
