"""Varifocal loss: "VarifocalNet: An IoU-aware Dense Object Detector", Zhang et al., 2021, eq. 2."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedet.models.ops.losses import negative_focal_loss


def varifocal_loss(
    logits: Tensor, rows: Tensor, labels: Tensor, quality: Tensor, alpha: float = 0.75, gamma: float = 2.0
) -> Tensor:
    """Compute the varifocal loss of logits, summed over rows and classes.

    An entry of target q > 0 costs q * BCE(p, q), every other one alpha * p^gamma * BCE(p, 0). As in
    `sigmoid_focal_loss`, all entries are computed as negatives at once, and the few positive ones are replaced.

    Args:
        logits: One row per prior, all classes.
        rows: Indices of the positive rows, each once.
        labels: Class of each positive row.
        quality: q of each positive row, its box's IoU with the ground truth; above 0, without gradient.
        alpha: Weight of the negatives.
        gamma: Exponent of the negatives.

    Shape:
        logits (R, K); rows and labels (R+,) int64; quality (R+,) in 0..1; result: scalar.
    """
    positive, q = logits[rows, labels].float(), quality.detach().float()  # (R+,)
    cost = q * F.binary_cross_entropy_with_logits(positive, q, reduction="none")
    replacement = cost - alpha * positive.sigmoid() ** gamma * F.softplus(positive)
    return negative_focal_loss(logits, logits.new_ones(len(logits), dtype=torch.bool), alpha, gamma) + replacement.sum()
