"""Varifocal loss: "VarifocalNet: An IoU-aware Dense Object Detector", Zhang et al., 2021, eq. 2."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedet.models.ops.losses import negative_focal_loss


def varifocal_loss(
    logits: Tensor, rows: Tensor, labels: Tensor, quality: Tensor, alpha: float = 0.75, gamma: float = 2.0
) -> Tensor:
    """Varifocal loss of logits (R, K), summed over rows and classes.

    An entry of target q > 0 costs q * BCE(p, q), every other one alpha * p^gamma * BCE(p, 0).
    rows, labels (R+,) int64: the rows that answer for an object, each named once, and its class; quality (R+,) in 0..1, above 0: its q,
    the overlap of the row's box with the object, a constant. As in `sigmoid_focal_loss`, all entries are taken as negatives at once and the
    few positive ones are exchanged.
    """
    positive, q = logits[rows, labels].float(), quality.detach().float()  # (R+,)
    cost = q * F.binary_cross_entropy_with_logits(positive, q, reduction="none")
    exchange = cost - alpha * positive.sigmoid() ** gamma * F.softplus(positive)
    return negative_focal_loss(logits, logits.new_ones(len(logits), dtype=torch.bool), alpha, gamma) + exchange.sum()
