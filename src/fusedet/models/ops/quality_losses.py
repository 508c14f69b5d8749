"""Classification losses whose targets are qualities in 0..1 instead of 1.

References:
    "VarifocalNet: An IoU-aware Dense Object Detector", Zhang et al., 2021, eq. 2.
    "Generalized Focal Loss: Learning Qualified and Distributed Bounding Boxes for Dense Object Detection", Li et al.,
    2020, eq. 3 and 5.
"""

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


def quality_focal_loss(
    logits: Tensor, counted: Tensor, rows: Tensor, labels: Tensor, quality: Tensor, beta: float = 2.0
) -> Tensor:
    """Compute the quality focal loss of logits, summed over rows and classes.

    An entry of target q costs |q - p|^beta * BCE(p, q); q is 0 for every negative.

    Args:
        logits: One row per prior, all classes.
        counted: Rows with a loss; the others are ignored.
        rows: Indices of the positive rows, each counted and each once.
        labels: Class of each positive row.
        quality: q of each positive row, without gradient.
        beta: Exponent of the modulating factor.

    Shape:
        logits (R, K); counted (R,) bool; rows and labels (R+,) int64; quality (R+,) in 0..1; result: scalar.
    """
    positive, q = logits[rows, labels].float(), quality.detach().float()  # (R+,)
    p = positive.sigmoid()
    cost = (q - p).abs() ** beta * F.binary_cross_entropy_with_logits(positive, q, reduction="none")
    replacement = cost - p**beta * F.softplus(positive)
    return negative_focal_loss(logits, counted, 1.0, beta) + replacement.sum()


def quality_focal_loss_of_scores(
    scores: Tensor, counted: Tensor, rows: Tensor, labels: Tensor, quality: Tensor, beta: float = 2.0
) -> Tensor:
    """Compute `quality_focal_loss` of scores p in 0..1 that are no sigmoid of one logit.

    Shape:
        scores (R, K); counted (R,) bool; rows and labels (R+,) int64; quality (R+,) in 0..1; result: scalar.
    """
    q = quality.detach().float()
    p = scores[rows, labels].float()
    cost = (q - p).abs() ** beta * cross_entropy_of_scores(p, q)
    return _replace_negatives(scores, counted, p, cost, 1.0, beta)


def focal_loss_of_scores(
    scores: Tensor, counted: Tensor, rows: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Compute `sigmoid_focal_loss` of scores p in 0..1 that are no sigmoid of one logit.

    Shape:
        scores (R, K); counted (R,) bool; rows and labels (R+,) int64; result: scalar.
    """
    p = scores[rows, labels].float()
    cost = alpha * (1 - p) ** gamma * cross_entropy_of_scores(p, torch.ones_like(p))
    return _replace_negatives(scores, counted, p, cost, 1 - alpha, gamma)


def cross_entropy_of_scores(scores: Tensor, targets: Tensor) -> Tensor:
    """Compute the binary cross-entropy of scores and targets in 0..1, element by element; finite also at 0 and 1."""
    least = torch.finfo(scores.dtype).tiny
    return -targets * scores.clamp(min=least).log() - (1 - targets) * (1 - scores).clamp(min=least).log()


def _replace_negatives(
    scores: Tensor, counted: Tensor, positive: Tensor, cost: Tensor, weight: float, gamma: float
) -> Tensor:
    """Sum weight * p^gamma * BCE(p, 0) over the counted rows, with `cost` in place of that of the positive scores."""

    def as_negative(p: Tensor) -> Tensor:
        return weight * p**gamma * cross_entropy_of_scores(p, torch.zeros_like(p))

    return (as_negative(scores.float()) * counted[:, None]).sum() + (cost - as_negative(positive)).sum()
